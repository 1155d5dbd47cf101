"""Tables that fit the terminal: numbers and names of methods are never cut off or wrapped.

A table that is too wide is printed with shortened names of clients, else with rows and columns exchanged, else in
several parts one below the other.
"""

from collections.abc import Collection, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from fedamole.terminal import printable

Line = tuple[str, ...]
Lines = tuple[Line, ...]
"""Lines of a table; the first one is the head."""

SHORTEST_NAME = 11
"""Number of characters to which a client's name may be shortened."""
CORNERS = {"client": "method"}
"""Head of the first column after rows and columns were exchanged, by the one before."""


def print_table(
    console: Console,
    lines: Sequence[Sequence[str]],
    *,
    title: str,
    caption: str = "",
    text_columns: int = 1,
    names: Collection[str] = (),
    bold: str = "",
    section_end: int = 0,
) -> None:
    """Print a table in the width of the console.

    Args:
        console: Where it is printed.
        lines: The head, then the body.
        title: Text above the table.
        caption: Text below it.
        text_columns: Number of columns on the left that name what a line is about.
        names: Names that may be shortened in the middle.
        bold: Lines with this first cell are bold.
        section_end: Number of the line of the body, from 1, below which a rule is drawn; 0: none.
    """
    content = tuple(tuple(printable(cell) for cell in line) for line in lines)
    ellipsis = "…" if (console.encoding or "").lower().startswith("utf") else ".."
    shorter = shortened([printable(name) for name in names], ellipsis)
    parts, exchanged = fitted(content, text_columns, shorter, console.width)
    for number, part in enumerate(parts):
        table = Table(title=None if number else title, title_style="bold", title_justify="left")
        text = 1 if exchanged else text_columns
        for index, (name, width) in enumerate(zip(part[0], _widths(part, console.width), strict=True)):
            table.add_column(name, justify="left" if index < text else "right", width=width)
        for index, line in enumerate(part[1:], 1):
            ends = not exchanged and index == section_end
            table.add_row(*line, end_section=ends, style="bold" if bold and line[0] == bold else None)
        console.print(table)
    if caption:
        console.print(caption, style="table.caption")


def fitted(lines: Lines, text_columns: int, shorter: dict[str, str], width: int) -> tuple[list[Lines], bool]:
    """Return the parts of a table that are printed, and whether rows and columns were exchanged.

    Args:
        lines: The head, then the body.
        text_columns: Number of columns that every part repeats.
        shorter: Shortened names by name.
        width: Width of the terminal in characters.
    """
    short = tuple(tuple(shorter.get(cell, cell) for cell in line) for line in lines)
    layouts = [(lines, text_columns, False), (short, text_columns, False)]
    if text_columns == 1:
        layouts += [(_exchanged(lines), 1, True), (_exchanged(short), 1, True)]
    for layout, _, exchanged in layouts:
        if _least_width(layout) <= width:
            return [layout], exchanged
    all_parts = [(_parts(layout, text, width), exchanged) for layout, text, exchanged in layouts[1::2]]
    return min(all_parts, key=lambda parts: len(parts[0]))


def shortened(names: Sequence[str], ellipsis: str = "…") -> dict[str, str]:
    """Return each name shortened in the middle to SHORTEST_NAME characters, or as few more as keep them different."""
    longest = max((len(name) for name in names), default=0)
    for most in range(SHORTEST_NAME, longest):
        short = {name: _shortened(name, most, ellipsis) for name in names}
        if len(set(short.values())) == len(short):
            return short
    return {name: name for name in names}


def _shortened(name: str, most: int, ellipsis: str) -> str:
    if len(name) <= most:
        return name
    kept = most - len(ellipsis)
    return name[: kept - kept // 2] + ellipsis + name[len(name) - kept // 2 :]


def _exchanged(lines: Lines) -> Lines:
    """Exchange rows and columns."""
    corner = CORNERS.get(lines[0][0], "")
    head, *body = zip(*((corner, *lines[0][1:]), *lines[1:]), strict=True)
    return (head, *body)


def _parts(lines: Lines, text_columns: int, width: int) -> list[Lines]:
    """Cut a table into parts with as many columns as fit into the width, after the text columns."""
    least = _least_widths(lines)
    fixed, parts = sum(least[:text_columns]) + 3 * text_columns + 1, list[list[int]]()
    room = 0
    for index in range(text_columns, len(least)):
        room -= least[index] + 3
        if not parts or room < 0:
            parts.append([])
            room = width - fixed - least[index] - 3
        parts[-1].append(index)
    return [
        tuple(tuple(line[index] for index in (*range(text_columns), *columns)) for line in lines) for columns in parts
    ]


def _least_widths(lines: Lines) -> list[int]:
    """Return the least width of each column: that of its widest cell, or of the longest word of its head."""
    head, *body = lines
    return [
        max(
            *(cell_len(word) for word in (*head[index].split(), "")),
            *(cell_len(line[index]) for line in body),
        )
        for index in range(len(head))
    ]


def _least_width(lines: Lines) -> int:
    """Return the least width of a table: of its columns, with a border and two spaces for each, and a border."""
    return sum(_least_widths(lines)) + 3 * len(lines[0]) + 1


def _widths(lines: Lines, width: int) -> list[int]:
    """Return the widths of the columns; heads stay in one line as far as there is room."""
    widths = _least_widths(lines)
    room = max(0, width - sum(widths) - 3 * len(widths) - 1)
    for index, head in enumerate(lines[0]):
        more = min(room, max(0, cell_len(head) - widths[index]))
        widths[index] += more
        room -= more
    return widths
