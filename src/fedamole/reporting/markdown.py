"""Markdown output: tables, and text from outside the program with all markup escaped."""

import re
from collections.abc import Iterable, Sequence

from fedamole.terminal import printable

_SIGNS = re.compile(
    r"[\\`*\[\]<>|~#&$!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=[A-Za-z]):(?=//)|(?<=www)\.", re.IGNORECASE
)
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", ":": "&#58;", ".": "&#46;"}


def literal(text: object) -> str:
    """Return Markdown that shows a text literally: no tags, links, images, emphasis or line breaks."""
    line = " ".join(printable(text).split())
    return _SIGNS.sub(lambda match: _ENTITIES.get(match[0], "\\" + match[0]), line)


def code(text: object) -> str:
    """Return a text as a code span; backticks in it are handled."""
    line = " ".join(printable(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    padding = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int | None = None) -> str:
    """Return a table whose cells are already Markdown; bars in them are escaped.

    The first `text_columns` columns (default: all) are aligned left, the others, which hold numbers, right.
    """
    left = len(head) if text_columns is None else text_columns
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    lines = [head, rule, *rows]
    return "\n".join("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\|", cell) for cell in line) + " |" for line in lines)


def literal_table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """Return a table whose cells are shown literally; see `table` for `text_columns`."""
    return table([*map(literal, head)], [[*map(literal, row)] for row in rows], text_columns)
