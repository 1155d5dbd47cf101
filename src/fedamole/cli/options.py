"""Options that all commands share, and the report of the error that ends a command."""

import inspect
import math
import platform
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import click
import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperArgument, TyperGroup, TyperOption
from typer.models import ArgumentInfo

from fedamole import __version__
from fedamole.cli.completion import complete_overrides
from fedamole.errors import FedamoleError, describe_os_error
from fedamole.terminal import say, screen

if TYPE_CHECKING:
    from fedamole.config import Config

DEBUG = "--debug"
INTERRUPTED = 130
"""Exit code after Ctrl-C."""


ConfigPath = Annotated[Path | None, typer.Argument(help="A TOML config; default: the bundled demo task with FedAMoLE.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings that replace those of the config: federation.rounds=5 method.name=fedit.",
        autocompletion=complete_overrides,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def bundled_config(name: str) -> Path:
    """Return the path of a config that is part of the package."""
    return Path(str(files("fedamole") / "bundled" / f"{name}.toml"))


def read_config(path: Path | None, overrides: list[str] | None) -> "Config":
    """Load a config, or the bundled one if `path` is None, with overrides.

    If `path` has the form key=value and is not a file, it is the first override.
    """
    from fedamole.config import load_config

    settings = list(overrides or [])
    if path is not None and "=" in str(path) and not path.exists():
        settings, path = [decoded(str(path)), *settings], None
    return load_config(path or bundled_config("fedamole"), settings)


@contextmanager
def resumable(folder: Path | None = None) -> Iterator[None]:
    """Print after Ctrl-C how to continue, and exit with INTERRUPTED.

    Args:
        folder: Folder of the run in the block; None if the command itself continues when it is repeated.
    """
    try:
        yield
    except KeyboardInterrupt:
        from fedamole.runs.run_folder import RUN

        if folder is None:
            advice = "repeat the command to continue after the last finished round"
        elif (folder / RUN).exists():
            advice = f"`fedamole resume {folder}` continues after the last finished round"
        else:
            advice = "no round had begun and nothing was saved: start the run again"
        screen(error=True).print(f"interrupted; {advice}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None


class Commands(TyperGroup):
    """The commands of the program. Adds -h, --version and --debug to all of them; nan and infinity are rejected."""

    def __init__(self, **attributes: Any) -> None:
        """Add the shared options to all commands, including those of subgroups."""
        super().__init__(**attributes)
        self.context_settings.setdefault("help_option_names", ["-h", "--help"])
        for command in _every(self):
            _complete_help(command)
            hidden = command is not self
            command.params += [_flag("--version", "Show the version and exit.", hidden, _show_version)]
            command.params += [_flag(DEBUG, "Show the traceback if the command fails.", hidden)]
            for parameter in command.params:
                if isinstance(parameter.type, click.types.FloatParamType | click.types.StringParamType):
                    parameter.callback = _checked(parameter.callback)


def _every(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        for subcommand in command.commands.values():
            yield from _every(subcommand)


def _complete_help(command: click.Command) -> None:
    """Join the lines of each paragraph of a command's help, and set the help of its arguments.

    Typer would keep the line breaks of the docstring. Typer 0.20 loses the help of arguments with click 8.4 or newer,
    whose constructor of arguments sets `help` too.
    """
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    joined = [text if text.startswith(" ") else text.replace("\n", " ") for text in paragraphs]
    command.help = "\n\n".join(joined)
    if command.callback is None:
        return
    hints = get_type_hints(command.callback, include_extras=True)
    for parameter in command.params:
        for declared in getattr(hints.get(parameter.name or ""), "__metadata__", ()):
            if isinstance(parameter, TyperArgument) and isinstance(declared, ArgumentInfo):
                parameter.help = declared.help


Callback = Callable[[click.Context, click.Parameter, Any], Any]


def _flag(name: str, text: str, hidden: bool, callback: Callback | None = None) -> TyperOption:
    """Return a flag that is not passed to the command function."""
    return TyperOption(
        param_decls=[name], is_flag=True, expose_value=False, is_eager=True, help=text, hidden=hidden, callback=callback
    )


def _show_version(context: click.Context, _: click.Parameter, requested: bool) -> None:
    if requested and not context.resilient_parsing:
        say(f"fedamole {__version__}")
        context.exit()


def _checked(then: Callback | None) -> Callback:
    """Return a callback that checks numbers and decodes texts, then calls `then`."""

    def check(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        try:
            value = (
                [_checked_value(item) for item in value] if isinstance(value, list | tuple) else _checked_value(value)
            )
        except ValueError as error:
            raise click.BadParameter(str(error), context, parameter) from error
        return value if then is None else then(context, parameter, value)

    return check


def _checked_value(value: Any) -> Any:
    """Return a value of the command line as UTF-8 text or a finite number; ValueError if it is neither.

    nan and infinity pass every comparison with a limit. In a locale that is not UTF-8, Python leaves letters of the
    command line undecoded.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number.")
    return decoded(value) if isinstance(value, str) else value


def decoded(word: str) -> str:
    """Decode a word of the command line as UTF-8 in every locale; ValueError if it is not UTF-8."""
    try:
        return word.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{word!a} is not UTF-8 text.") from error


def run_command_line(app: typer.Typer, console: Console) -> None:
    """Run the command in sys.argv. An error is reported in one line on `console`, and sets the exit code (SystemExit).

    The traceback is shown for a bug of this program, and with --debug.
    """
    debug = DEBUG in sys.argv[1:]
    try:
        app()
    except Exception as error:
        known = describe(error)
        if debug or known is None:
            console.print(traceback.format_exc(), soft_wrap=True)
        if known is None:
            known = (
                f"this is a bug in fedamole {__version__} (Python {platform.python_version()}, {platform.system()}): "
                "please report it with the lines above and the command, without any confidential content"
            )
        console.print(Text.assemble(("error:", "bold red"), f" {known}"), soft_wrap=True)
        sys.exit(error.exit_code if isinstance(error, FedamoleError) else 1)


def describe(error: Exception) -> str | None:
    """Return the message for an error whose cause is outside this program; None for a bug."""
    if isinstance(error, FedamoleError):
        return str(error)
    if isinstance(error, OSError):
        return describe_os_error(error)
    if isinstance(error, UnicodeError) and not sys.getfilesystemencoding().lower().startswith("utf"):
        return (
            f"a name or a text cannot be encoded in {sys.getfilesystemencoding()}, the encoding of this locale: set "
            "LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        )
    if isinstance(error, MemoryError) or _out_of_device_memory(error):
        return "there is not enough memory: lower run.group, training.batch_size or training.max_length"
    return None


def _out_of_device_memory(error: Exception) -> bool:
    """Return whether PyTorch ran out of memory. Does not import PyTorch if nothing else did."""
    if "torch" not in sys.modules:
        return False
    from fedamole.model.memory import out_of_memory

    return isinstance(error, RuntimeError) and out_of_memory(error)
