"""What all commands have in common: options of every command, and what is said when one ends in an error."""

import math
import platform
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup, TyperOption

from fedamole import __version__
from fedamole.errors import FedamoleError, describe_os_error

if TYPE_CHECKING:
    from fedamole.config import Config

DEBUG = "--debug"
INTERRUPTED = 130
"""Exit code after Ctrl-C."""


ConfigPath = Annotated[Path | None, typer.Argument(help="A TOML config; left out: the bundled demo with FedAMoLE.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings that differ, e.g. federation.rounds=5 method.assignment=random.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]


def bundled_config(name: str) -> Path:
    """Path of a config that comes with the package."""
    return Path(__file__).parent / "bundled" / f"{name}.toml"


def read_config(path: Path | None, overrides: list[str] | None) -> "Config":
    """Read the config that a command names, or the bundled one, with the settings given beside it."""
    from fedamole.config import load_config

    words = list(overrides or [])
    if path is not None and "=" in str(path) and not path.exists():  # no config named, settings only
        words, path = [decoded(str(path)), *words], None
    return load_config(path or bundled_config("fedamole"), words)


class Commands(TyperGroup):
    """The commands of the program. All of them take -h, --version and --debug, and no number may be nan or infinite."""

    def __init__(self, **attributes: Any) -> None:
        """Complete the commands, and those of groups among them."""
        super().__init__(**attributes)
        self.context_settings.setdefault("help_option_names", ["-h", "--help"])
        for command in _every(self):
            hidden = command is not self
            command.params += [_flag("--version", "Show the version and end.", hidden, _show_version)]
            command.params += [_flag(DEBUG, "Show the traceback of an error that ends the command.", hidden)]
            for parameter in command.params:
                if isinstance(parameter.type, click.types.FloatParamType | click.types.StringParamType):
                    parameter.callback = _checked(parameter.callback)


def _every(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from _every(inner)


Callback = Callable[[click.Context, click.Parameter, Any], Any]


def _flag(name: str, text: str, hidden: bool, callback: Callback | None = None) -> TyperOption:
    """An option without a value, of which the command itself is not told."""
    return TyperOption(
        param_decls=[name], is_flag=True, expose_value=False, is_eager=True, help=text, hidden=hidden, callback=callback
    )


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    from fedamole.terminal import say

    if wanted and not context.resilient_parsing:
        say(f"fedamole {__version__}")
        context.exit()


def _checked(then: Callback | None) -> Callback:
    """Check numbers and decode texts before what else an option's value goes through."""

    def check(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        try:
            value = [_good(one) for one in value] if isinstance(value, list | tuple) else _good(value)
        except ValueError as error:
            raise click.BadParameter(str(error), context, parameter) from error
        return value if then is None else then(context, parameter, value)

    return check


def _good(value: Any) -> Any:
    """Return a value of the command line; ValueError for one that cannot be used.

    nan and infinity pass every comparison with a limit. In a locale that is not UTF-8, Python leaves letters of the
    command line undecoded.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number.")
    return decoded(value) if isinstance(value, str) else value


def decoded(word: str) -> str:
    """Return a word of the command line as what its bytes are in UTF-8; ValueError where they are no UTF-8."""
    try:
        return word.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{word!a} is not UTF-8 text.") from error


def run_command_line(app: typer.Typer, console: Console) -> None:
    """Run the command that sys.argv names. A mistake ends in one line on `console` and an exit code (SystemExit).

    A traceback is shown for errors of this program alone, or on request by --debug.
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
                "please report it with the lines above and the command; first remove what others must not read"
            )
        console.print(Text.assemble(("error:", "bold red"), f" {known}"), soft_wrap=True)
        sys.exit(error.exit_code if isinstance(error, FedamoleError) else 1)


def describe(error: Exception) -> str | None:
    """Return what to tell the user about an error that has its cause outside of this program; None for a bug."""
    if isinstance(error, FedamoleError):
        return str(error)
    if isinstance(error, OSError):
        return describe_os_error(error)
    if isinstance(error, UnicodeError) and not sys.getfilesystemencoding().lower().startswith("utf"):
        return (
            f"a name or a text cannot be expressed in {sys.getfilesystemencoding()}, the encoding of this locale: set "
            "LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        )
    if isinstance(error, MemoryError) or _on_device(error):
        return "there is not enough memory: lower run.group, training.batch_size or training.max_length"
    return None


def _on_device(error: Exception) -> bool:
    """Whether PyTorch found no memory; it is not imported for that."""
    if "torch" not in sys.modules:
        return False
    from fedamole.model.memory import out_of_memory

    return isinstance(error, RuntimeError) and out_of_memory(error)
