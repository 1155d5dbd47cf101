"""The progress of a deployed run: a table that updates in place on a terminal, lines elsewhere.

Client names, reasons of failures and warnings come from other machines. They are escaped, so they cannot control the
terminal, style the table or start a new line.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedamole.deployment.processes import PrintLine
from fedamole.deployment.server_run import OnProgress
from fedamole.federation.progress import outcome
from fedamole.terminal import Screen, printable


class RunTable:
    """The state of a run, which rich draws as a table with one row per client."""

    def __init__(self, title: str) -> None:
        """Start with no clients."""
        self.title, self.round, self.rounds, self.note = title, 0, 0, "starting"
        self.clients: dict[str, dict[str, Any]] = {}
        self.connected: set[str] = set()

    def update(self, event: dict[str, Any]) -> str | None:
        """Apply an event of the run (a line of progress.jsonl); return the text to print for it, or None."""
        kind = event["what"]
        if kind == "joined":
            self.clients.setdefault(event["client"], {})
            return f"{event['client']} has joined"
        if kind == "agreed":
            return f"settings {event['hash']}; a client that accepts only these settings passes this hash as --agree"
        if kind == "exposure":
            return f"  {event['text']}"
        if kind == "present":
            return self._update_connected(event)
        if kind == "round":
            self.round, self.rounds, self.note = event["round"] + 1, event["rounds"], "training"
            return f"round {self.round}/{self.rounds}: {len(event['cohort'])} clients"
        if kind == "asked":
            for name in event["clients"]:
                self.clients.setdefault(name, {}).update(state="training", since=event["time"])
        elif kind == "answered":
            return self._update_client(event)
        elif kind == "warning":
            return str(event["text"])
        elif kind == "stopped":
            self.note = event["text"]
            return self.note
        elif kind == "stage":
            self.note = event["text"]
        elif kind == "done":
            scores = "  ".join(f"{name} {value:.4f}" for name, value in event["validation"].items())
            self.note = f"validation: {scores}"
            return f"round {event['round'] + 1}/{self.rounds} done  {self.note}"
        return None

    def _update_connected(self, event: dict[str, Any]) -> str | None:
        self.connected = set(event["clients"])
        if event["waiting_for"]:
            self.note = f"waiting for {event['waiting_for']} more clients"
            return f"connected: {', '.join(event['clients']) or 'none'}; {self.note}"
        return None

    def _update_client(self, event: dict[str, Any]) -> str:
        client = self.clients.setdefault(event["client"], {})
        result = outcome(event)
        client.update(state=result, since=None, seconds=event.get("seconds"))
        return f"round {event['round'] + 1}  {event['client']}  {result}  {event.get('seconds', 0.0):.1f} s of its own"

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
            client = self.clients[name]
            since = client.get("since")
            seconds = time.time() - since if since else client.get("seconds")
            table.add_row(
                _cell(name),
                "yes" if name in self.connected else "no",
                _cell(client.get("state", "has joined")),
                "" if seconds is None else f"{seconds:.0f}",
            )
        return table


def _one_line(text: object) -> str:
    """Escape untrusted text, line breaks included."""
    return printable(text).replace("\n", "\\n")


def _cell(text: object, style: str = "") -> Text:
    """Untrusted text for a table: escaped and without markup."""
    return Text(_one_line(text), style=style)


@contextmanager
def show_progress(console: Screen, folder: Path) -> Iterator[tuple[PrintLine, OnProgress]]:
    """Show the progress of the run in `folder`; yield a function that prints a line and one that takes run events."""
    table = RunTable(str(folder))

    def print_line(text: str) -> None:
        console.print(text, soft_wrap=True)

    def on_progress(event: dict[str, Any]) -> None:
        text = table.update(event)
        if text is not None and (not console.is_terminal or event["what"] in ("done", "stopped", "warning")):
            print_line(_one_line(text))

    if not console.is_terminal:
        yield print_line, on_progress
        return
    with Live(table, console=console, refresh_per_second=2, transient=True):
        yield print_line, on_progress
