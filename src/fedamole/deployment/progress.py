"""What a coordinator sees: who is connected, and how far each client is.

Names, reasons of failures and warnings come from elsewhere: none of them can steer the terminal, style the table or
begin a line of its own.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedamole.federation.progress import outcome
from fedamole.terminal import Screen, printable

Say = Callable[[str], None]
Show = Callable[[dict[str, Any]], None]


class Board:
    """The state of a run as a table; fed with lines of progress."""

    def __init__(self, title: str) -> None:
        """Begin with nobody."""
        self.title, self.round, self.rounds, self.note = title, 0, 0, "starting"
        self.clients: dict[str, dict[str, Any]] = {}
        self.here: set[str] = set()

    def feed(self, line: dict[str, Any]) -> str | None:
        """Take a line in; return what it says in words, where that is news."""
        kind = line["what"]
        if kind == "joined":
            self.clients.setdefault(line["client"], {})
            return f"{line['client']} has joined"
        if kind == "agreed":
            return f"settings {line['hash']}; a client that insists on them gives this hash by --agree"
        if kind == "exposure":
            return f"  {line['text']}"
        if kind == "present":
            return self._present(line)
        if kind == "round":
            self.round, self.rounds, self.note = line["round"] + 1, line["rounds"], "training"
            return f"round {self.round}/{self.rounds}: {len(line['cohort'])} clients"
        if kind == "asked":
            for name in line["clients"]:
                self.clients.setdefault(name, {}).update(state="training", since=line["time"])
        elif kind == "answered":
            return self._answered(line)
        elif kind == "warning":
            return str(line["text"])
        elif kind == "stage":
            self.note = line["text"]
        elif kind == "done":
            values = "  ".join(f"{row} {value:.4f}" for row, value in line["validation"].items())
            self.note = f"validation: {values}"
            return f"round {line['round'] + 1}/{self.rounds} done  {self.note}"
        return None

    def _present(self, line: dict[str, Any]) -> str | None:
        self.here = set(line["clients"])
        if line["waiting_for"]:
            self.note = f"waiting for {line['waiting_for']} more clients"
            return f"connected: {', '.join(line['clients']) or 'nobody'}; {self.note}"
        return None

    def _answered(self, line: dict[str, Any]) -> str:
        seen = self.clients.setdefault(line["client"], {})
        result = outcome(line)
        seen.update(state=result, since=None, seconds=line.get("seconds"))
        return f"round {line['round'] + 1}  {line['client']}  {result}  {line.get('seconds', 0.0):.1f} s of its own"

    def __rich__(self) -> Table:
        """Draw the table."""
        caption = f"round {self.round}/{self.rounds}  {self.note}" if self.rounds else self.note
        table = Table(
            "client",
            "connected",
            "state",
            "seconds",
            title=_cell(self.title, "table.title"),
            caption=_cell(caption, "table.caption"),
        )
        for name in sorted(self.clients):
            seen = self.clients[name]
            since, seconds = seen.get("since"), seen.get("seconds")
            told = time.time() - since if since else seconds
            table.add_row(
                _cell(name),
                "yes" if name in self.here else "no",
                _cell(seen.get("state", "has joined")),
                "" if told is None else f"{told:.0f}",
            )
        return table


def _one_line(text: object) -> str:
    """Text from elsewhere that cannot end its line."""
    return printable(text).replace("\n", "\\n")


def _cell(text: object, style: str = "") -> Text:
    """Text from elsewhere as it stands, without markup."""
    return Text(_one_line(text), style=style)


@contextmanager
def watching(console: Screen, folder: Path) -> Iterator[tuple[Say, Show]]:
    """Show progress on a terminal as a table that changes, elsewhere in lines."""
    board = Board(str(folder))

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    def show(line: dict[str, Any]) -> None:
        told = board.feed(line)
        if told is not None and (not console.is_terminal or line["what"] in ("done", "warning")):
            say(_one_line(told))

    if not console.is_terminal:
        yield say, show
        return
    with Live(board, console=console, refresh_per_second=2, transient=True):
        yield say, show
