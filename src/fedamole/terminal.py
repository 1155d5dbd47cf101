"""Everything that this package says to people goes through here: text from elsewhere cannot steer a terminal.

`screen` makes the only kind of console there is. What it is given as `str` (printed, in cells, titles and captions of a
table) stands there as it is: no markup, and no character that a terminal would obey or that nobody would see. Style
comes as an argument, or in a `rich.text.Text`. Results that are no table go through `say`, JSON through `say_json`.
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

KEPT = frozenset("\n\t")
"""Control characters that stay as they are."""
UNSAFE = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Unicode categories of characters that steer, cannot be seen, or end a line unnoticed."""
NON_JOINER, JOINER = "\u200c", "\u200d"
_BEFORE_JOINER = frozenset(("So", "Sk", "Mn"))
"""Categories of what an emoji consists of before a joiner: a picture, a skin tone, a variation selector."""


def printable(text: object) -> str:
    """Return text from elsewhere in a form that cannot steer a terminal.

    Control characters (escape sequences among them), surrogates, line separators and invisible direction marks are
    written as ``\\x1b`` or ``\\u202e``. Line breaks and tabs stay, and so do joiners where a script or an emoji needs
    them: between two pictures, behind a virama, between two Arabic letters.
    """
    whole = str(text)
    if whole.isascii() and whole.isprintable():
        return whole
    return "".join(
        letter
        if letter in KEPT or unicodedata.category(letter) not in UNSAFE or _joins(whole, place)
        else _escaped(letter)
        for place, letter in enumerate(whole)
    )


def _joins(text: str, place: int) -> bool:
    """Whether the character is a joiner that stands where joiners belong."""
    if text[place] not in (NON_JOINER, JOINER) or not 0 < place < len(text) - 1:
        return False
    before, after = text[place - 1], text[place + 1]
    if unicodedata.combining(before) == 9:  # a virama, of the scripts of India
        return True
    if text[place] == NON_JOINER:
        return unicodedata.bidirectional(before) == unicodedata.bidirectional(after) == "AL"
    pictures = unicodedata.category(before) in _BEFORE_JOINER and unicodedata.category(after) == "So"
    return pictures and not before.isascii()


def _escaped(letter: str) -> str:
    number = ord(letter)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"


def printable_json(value: Any) -> str:
    """JSON on one line that says the same to a machine and cannot steer a terminal.

    Letters of all languages stay; what `printable` would escape is escaped as JSON does it.
    """
    written = json.dumps(value, ensure_ascii=False)
    if written.isascii() and written.isprintable():
        return written
    return "".join(json.dumps(letter)[1:-1] if unicodedata.category(letter) in UNSAFE else letter for letter in written)


class Screen(Console):
    """A console that shows every `str` as it is, and lets nothing through that steers a terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a text into what is shown, without markup, emoji codes or guesses at what to highlight."""
        options |= {"markup": False, "emoji": False, "highlight": False, "highlighter": None}
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Make sure of what did not come as a `str`."""
        for segment in super().render(renderable, options):
            # Control codes are the program's own: of a progress bar, of the cursor.
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def screen(error: bool = False, wide: int | None = None) -> Screen:
    """The console of standard output, or of standard error; `wide` columns where the output goes into a file."""
    stream = sys.stderr if error else sys.stdout
    return Screen(stderr=error, width=None if wide is None or stream.isatty() else wide, highlight=False)


def say(text: object, end: str = "\n") -> None:
    """Write a line of results to standard output."""
    sys.stdout.write(printable(text) + end)
    sys.stdout.flush()


def say_json(value: Any) -> None:
    """Write a line of JSON to standard output; letters that its encoding lacks are escaped as JSON does it."""
    written = printable_json(value)
    try:
        written.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        written = json.dumps(value)
    say(written)


class PrintableFormatter(logging.Formatter):
    """Makes whole records printable, their tracebacks too; for every handler that writes for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one text."""
        return printable(super().format(record))


def set_up() -> Screen:
    """Set the environment, standard output and logging up; return the console of standard error.

    Where the locale's encoding is not UTF-8, letters that it lacks are printed as escapes, and never end a command.
    Where it is ASCII, which UTF-8 includes, standard input is read as UTF-8.
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
