"""What a person sees while a run goes on: progress bars on a terminal, plain lines elsewhere; and tables."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedamole.comparison.trials import Cell, TrialListener
from fedamole.federation.progress import ProgressListener
from fedamole.reporting.runs import read_runs
from fedamole.reporting.table import CAPTION, SUMMARY_LINES, Comparison, compare, grid
from fedamole.terminal import printable, screen

if TYPE_CHECKING:
    from fedamole.comparison.tables import Sheet


class ProgressBars(ProgressListener):
    """Two bars: the rounds, and the steps of the clients at work."""

    def __init__(self, console: Console, title: str) -> None:
        """Draw on a terminal."""
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
            transient=True,
        )
        self.title = title
        self.rounds = self.progress.add_task(printable(title), total=None, note="")
        self.steps = self.progress.add_task("", total=None, note="", visible=False)

    def round_started(self, round_: int, rounds: int, cohort: Sequence[str]) -> None:
        """Move the upper bar."""
        self.progress.update(self.rounds, total=rounds, completed=round_)

    def group_started(self, round_: int, names: Sequence[str]) -> None:
        """Start the lower bar anew."""
        who = names[0] if len(names) == 1 else f"{len(names)} clients"
        self.progress.reset(self.steps, total=None, description=f"  {printable(who)}", visible=True, note="")

    def step(self, done: int, steps: int) -> None:
        """Move the lower bar."""
        self.progress.update(self.steps, completed=done, total=steps)

    def client_done(self, round_: int, name: str, report: Mapping[str, Any]) -> None:
        """Show the client's loss."""
        note = "failed" if "failed" in report else f"training loss {report['loss']:.3f}" if "loss" in report else "done"
        self.progress.update(self.steps, note=note)

    def stage(self, text: str) -> None:
        """Say what else takes a while."""
        self.progress.reset(self.steps, total=None, description=f"  {printable(text)}", visible=True, note="")

    def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
        """Show the validation of the round."""
        note = "validation " + ", ".join(f"{row} {value:.3f}" for row, value in validation.items())
        self.progress.update(self.rounds, completed=round_ + 1, note=note)


class TrialLines(TrialListener):
    """A line per cell that has ended, and below them, on a terminal, one bar of all cells."""

    def __init__(self, console: Console) -> None:
        """Write to a console; use `progress` as a context."""
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("cells", total=None)

    def cells_started(self, cells: int, finished: int) -> None:
        """Say how much there is to do."""
        self.progress.reset(self.task, total=cells)
        self._say(f"{cells} cells to run" + (f", {finished} finished before" if finished else ""))

    def cell_done(self, cell: Cell, seconds: float, summary: Mapping[str, Any]) -> None:
        """What the cell's methods reached on test, on average over the clients."""
        scores = "  ".join(f"{method} {summary['rows'][row]['mean']:.1f}" for method, row in cell.rows.items())
        self._say(f"{cell.name}  {seconds:.0f} s  score: {scores}")
        self.progress.advance(self.task)

    def cell_failed(self, cell: Cell, seconds: float, error: str) -> None:
        """Why a cell failed."""
        self._say(f"{cell.name}  {seconds:.0f} s  failed: {error}")
        self.progress.advance(self.task)

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


def show_sheets(console: Console, sheets: "Sequence[Sheet]") -> None:
    """Print the tables of a comparison."""
    for sheet in sheets:
        table = Table(
            title=sheet.title,
            title_style="bold",
            title_justify="left",
            caption=sheet.caption,
            caption_justify="left",
        )
        for place, name in enumerate(sheet.head):
            words = place < sheet.words
            table.add_column(name, justify="left" if words else "right", no_wrap=place == 0)
        for line in sheet.body:
            table.add_row(*line)
        console.print(table)


def show_cells(console: Console, cells: Sequence[Mapping[str, Any]]) -> None:
    """Print what the next call of a comparison would do."""
    table = Table("cell", "what", "size", "rounds", "learning rate")
    for cell in cells:
        rate = "" if cell["learning_rate"] is None else f"{cell['learning_rate']:g}"
        table.add_row(cell["cell"], cell["does"], cell["size"], str(cell["rounds"]), rate)
    console.print(table)


def show(console: Console, comparisons: Sequence[Comparison], with_clients: bool) -> None:
    """Print one table per partition."""
    for comparison in comparisons:
        for warning in comparison.warnings:
            console.print(warning, style="bold red", soft_wrap=True)
        head, *body = grid(comparison, with_clients)
        seeds = ", ".join(map(str, comparison.seeds))
        table = Table(
            title=f"test score of the best validation round (seed {seeds})",
            title_style="bold",
            caption=CAPTION,
            caption_justify="left",
        )
        for place, name in enumerate(head):
            table.add_column(name, justify="left" if place == 0 else "right", no_wrap=place == 0)
        for place, line in enumerate(body):
            last_client = place + 1 == len(body) - len(SUMMARY_LINES)
            table.add_row(*line, end_section=last_client, style="bold" if line[0] == "mean" else None)
        console.print(table)


def show_runs(paths: Sequence[Path], with_clients: bool = True) -> None:
    """Print tables of finished runs; wide where the output goes into a file."""
    show(screen(wide=160), compare(read_runs(paths)), with_clients)


def sizes(console: Console, clients: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print who has how many examples of what."""
    table = Table(title=title, title_style="bold", title_justify="left")
    for key in clients[0]:
        table.add_column(key, justify="left" if isinstance(clients[0][key], str) else "right")
    for client in clients:
        table.add_row(*(str(value) for value in client.values()))
    console.print(table)


def several_methods(console: Console, listed: Sequence[Mapping[str, Any]]) -> None:
    """A line for each method."""
    table = Table("method", "paper", "communicates", "stays_local", "scored", title=f"{len(listed)} methods")
    for entry in listed:
        table.add_row(*(entry[key] for key in ("name", "paper", "communicates", "stays_local", "scored")))
    console.print(table)
    console.print("`fedamole methods NAME` explains one: its round, its deviations from the paper, its settings")


def one_method(console: Console, entry: Mapping[str, Any]) -> None:
    """What a method's file says of it, and its settings."""
    console.print(entry["name"], style="bold")
    console.print(entry["about"], soft_wrap=True)
    for key in ("communicates", "stays_local", "scored"):
        console.print(Text.assemble((key, "bold"), f": {entry[key]}"))
    console.print("\n[method]")
    for key, value in {"name": entry["name"], **entry["parameters"]}.items():
        text = f"# {key} is worked out" if value is None else f"{key} = {json.dumps(value)}"
        console.print(text)
