"""Text from elsewhere in Markdown: what it says stays, what it would do does not."""

import re
from collections.abc import Iterable, Sequence

from fedamole.terminal import printable

_SIGNS = re.compile(
    r"[\\`*\[\]<>|~#&$!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=[A-Za-z]):(?=//)|(?<=www)\.", re.IGNORECASE
)
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", ":": "&#58;", ".": "&#46;"}


def literal(text: object) -> str:
    """Return a text as Markdown that shows it letter by letter: no tags, links, images, emphasis or new lines."""
    line = " ".join(printable(text).split())
    return _SIGNS.sub(lambda found: _ENTITIES.get(found[0], "\\" + found[0]), line)


def code(text: object) -> str:
    """Return a text as a code span, whatever it holds."""
    line = " ".join(printable(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    room = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{room}{line}{room}{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], rule: Sequence[str] = ()) -> str:
    """Return a table of cells that are Markdown already; bars in code spans are escaped, as elsewhere."""
    lines = [head, rule or ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\|", cell) for cell in line) + " |" for line in lines)
