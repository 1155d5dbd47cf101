"""What every process of this package does first: quieten the libraries, and send warnings to standard error."""

import logging
import os
import unicodedata

from rich.console import Console
from rich.logging import RichHandler

KEPT = frozenset("\n\t")
"""Control characters that stay as they are."""


def printable(text: object) -> str:
    """Return text from elsewhere in a form that cannot steer a terminal.

    Control characters (escape sequences among them), surrogates and invisible direction marks are written as
    ``\\x1b`` or ``\\u202e``; line breaks and tabs stay.
    """
    return "".join(
        letter if letter in KEPT or unicodedata.category(letter) not in ("Cc", "Cf", "Cs") else _escaped(letter)
        for letter in str(text)
    )


def _escaped(letter: str) -> str:
    number = ord(letter)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"


def set_up() -> Console:
    """Set the environment and logging up; return the console of standard error."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    return console
