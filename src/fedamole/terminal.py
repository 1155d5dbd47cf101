"""Output for people: text from other sources is escaped so that it cannot control a terminal.

`screen` creates the only kind of console in use. A `str` given to it (printed text, table cells, titles and captions)
is shown literally: no markup, no control characters, no invisible characters. Style is given as an argument or in a
`rich.text.Text`. Results that are not tables are written by `say`, JSON by `say_json`.
"""

import codecs
import io
import json
import logging
import os
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.logging import RichHandler
from rich.segment import Segment
from rich.text import Text

ALLOWED_CONTROLS = frozenset("\n\t")
"""Control characters that are not escaped."""
UNSAFE_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Unicode categories of control characters, invisible characters and line separators."""
NON_JOINER, JOINER = "\u200c", "\u200d"
_BEFORE_JOINER_CATEGORIES = frozenset(("So", "Sk", "Mn"))
"""Categories that an emoji may have before a joiner: pictograph, skin tone, variation selector."""


def printable(text: object) -> str:
    """Return untrusted text in a form that cannot control a terminal.

    Control characters (including escape sequences), surrogates, line separators and invisible direction marks are
    written as ``\\x1b`` or ``\\u202e``. Line breaks and tabs stay, and so do joiners where a script or an emoji needs
    them: between two pictographs, after a virama, between two Arabic letters.
    """
    string = str(text)
    if string.isascii() and string.isprintable():
        return string
    return "".join(
        character
        if character in ALLOWED_CONTROLS
        or unicodedata.category(character) not in UNSAFE_CATEGORIES
        or _joins(string, index)
        else _escaped(character)
        for index, character in enumerate(string)
    )


def _joins(text: str, index: int) -> bool:
    """Return whether the character at `index` is a joiner in a valid position."""
    if text[index] not in (NON_JOINER, JOINER) or not 0 < index < len(text) - 1:
        return False
    before, after = text[index - 1], text[index + 1]
    if unicodedata.combining(before) == 9:  # a virama (Indic scripts)
        return True
    if text[index] == NON_JOINER:
        return unicodedata.bidirectional(before) == unicodedata.bidirectional(after) == "AL"
    pictures = unicodedata.category(before) in _BEFORE_JOINER_CATEGORIES and unicodedata.category(after) == "So"
    return pictures and not before.isascii()


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"


def printable_json(value: Any) -> str:
    """Return one line of JSON that cannot control a terminal.

    Letters of all languages stay; characters that `printable` would escape are escaped as in JSON.
    """
    encoded = json.dumps(value, ensure_ascii=False)
    if encoded.isascii() and encoded.isprintable():
        return encoded
    return "".join(
        json.dumps(character)[1:-1] if unicodedata.category(character) in UNSAFE_CATEGORIES else character
        for character in encoded
    )


class Screen(Console):
    """A console that shows every `str` literally and escapes control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string to text without markup, emoji codes or highlighting."""
        options |= {"markup": False, "emoji": False, "highlight": False, "highlighter": None}
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Escape text that was not given as a `str`."""
        for segment in super().render(renderable, options):
            # Control segments come from rich itself, such as cursor movements of a progress bar.
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def screen(error: bool = False, wide: int | None = None) -> Screen:
    """Return a console for standard output or standard error; `wide` is the width when the output is not a terminal."""
    stream = sys.stderr if error else sys.stdout
    return Screen(stderr=error, width=None if wide is None or stream.isatty() else wide, highlight=False)


def say(text: object, end: str = "\n") -> None:
    """Write one line of results to standard output."""
    sys.stdout.write(printable(text) + end)
    sys.stdout.flush()


def say_json(value: Any) -> None:
    """Write one line of JSON to standard output; characters that its encoding lacks are escaped as in JSON."""
    encoded = printable_json(value)
    try:
        encoded.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        encoded = json.dumps(value)
    say(encoded)


class PrintableFormatter(logging.Formatter):
    """Formats log records with `printable`, including their tracebacks; for every handler that people read."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as escaped text."""
        return printable(super().format(record))


def log_bare_lines(log: logging.Logger) -> None:
    """Write a logger's records to standard error, one unwrapped line each, for programs that read them."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


def set_up() -> Screen:
    """Configure the environment, standard streams and logging; return the console of standard error.

    If the locale's encoding is not UTF-8, characters that it lacks are printed as escapes instead of raising an error.
    If it is ASCII, standard input is read as UTF-8, which includes ASCII.
    """
    if isinstance(sys.stdin, io.TextIOWrapper) and codecs.lookup(sys.stdin.encoding).name == "ascii":
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    console = screen(error=True)
    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False, rich_tracebacks=False)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    return console
