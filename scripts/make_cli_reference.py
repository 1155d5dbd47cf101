"""Write docs/cli.md, the reference of the command line, from the commands: python scripts/make_cli_reference.py

Texts, types, ranges and defaults are those that `fedamole COMMAND --help` prints.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from fedamole.cli.main import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
INTRODUCTION = """# Command line

All commands with their arguments and options, as `fedamole COMMAND --help` prints them. `fedamole --debug COMMAND ...`
shows the traceback of an error, `fedamole --version` the version. Written by `scripts/make_cli_reference.py`; do not
edit by hand.
"""


def page() -> str:
    """Return the page: a list of the commands, and a section for each."""
    commands = dict(_commands(typer.main.get_command(app)))
    rows = [
        f"| [`fedamole {name}`](#fedamole-{name.replace(' ', '-')}) | {_first(each)} |"
        for name, each in commands.items()
    ]
    table = "\n".join(["| command | what it does |", "|---|---|", *rows])
    sections = "\n".join(_section(name, command) for name, command in commands.items())
    return f"{INTRODUCTION}\n{table}\n\n{sections}"


def _commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and command, in the order of `fedamole --help`; a group is followed by its commands."""
    for name, command in group.commands.items():
        if command.hidden:
            continue
        yield prefix + name, command
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")


def _paragraphs(command: Any) -> list[str]:
    text = (command.help or "").replace("\b", "").replace("\f", "")
    return [paragraph for paragraph in re.split(r"\n\s*\n", text.strip()) if paragraph.strip()]


def _first(command: Any) -> str:
    return " ".join(_paragraphs(command)[0].split()).replace("|", "\\|")


def _section(name: str, command: Any) -> str:
    lines = [f"## fedamole {name}", ""]
    examples: list[str] = []
    for paragraph in _paragraphs(command):
        # An indented paragraph is a block of commands; one without indentation is text.
        if all(line.startswith("  ") for line in paragraph.splitlines()):
            examples += [line.strip() for line in paragraph.splitlines()]
            continue
        lines += _block(examples)
        examples = []
        lines += [" ".join(paragraph.split()).replace("<", "&lt;"), ""]
    lines += _block(examples)
    arguments = [
        each for each in command.params if each.param_type_name == "argument" and not getattr(each, "hidden", False)
    ]
    options = [
        each
        for each in command.params
        if each.param_type_name == "option" and not each.hidden and each.name not in ("help", "version")
    ]
    if arguments:
        lines += ["| argument | type | meaning |", "|---|---|---|"]
        lines += [f"| `{_argument(each)}` | {_type(each)} | {_text(each)} |" for each in arguments]
        lines.append("")
    if options:
        lines += ["| option | type | default | meaning |", "|---|---|---|---|"]
        lines += [f"| {_flags(each)} | {_type(each)} | {_default(each)} | {_text(each)} |" for each in options]
        lines.append("")
    return "\n".join(lines)


def _block(commands: list[str]) -> list[str]:
    return ["```text", *commands, "```", ""] if commands else []


def _argument(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name).upper()
    repeated = "..." if parameter.nargs == -1 else ""
    return f"{name}{repeated}" if parameter.required else f"[{name}{repeated}]"


def _flags(parameter: Any) -> str:
    flags = " / ".join(filter(None, [", ".join(parameter.opts), ", ".join(parameter.secondary_opts)]))
    return f"`{flags}`{', required' * parameter.required}{', repeatable' * parameter.multiple}"


def _type(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return "flag"
    kind = parameter.type
    if choices := getattr(kind, "choices", None):
        return ", ".join(f"`{choice}`" for choice in choices)
    name = {"integer range": "integer", "float range": "number", "float": "number", "directory": "path", "file": "path"}
    text: str = name.get(kind.name, kind.name)
    low, high = getattr(kind, "min", None), getattr(kind, "max", None)
    bounds = {
        (True, True): f", {low} to {high}",
        (True, False): f", at least {low}",
        (False, True): f", at most {high}",
    }
    return text + bounds.get((low is not None, high is not None), "")


def _default(parameter: Any) -> str:
    value = parameter.default
    if callable(value) or value is None or value is False or value == () or parameter.required:
        return ""
    if value is True:
        return f"`{parameter.opts[0]}`"
    return f"`{value}`"


def _text(parameter: Any) -> str:
    """Return the help of a parameter as a cell of a table."""
    parts = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|").split("`")
    return "`".join(part.replace("<", "&lt;") if index % 2 == 0 else part for index, part in enumerate(parts))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
