"""Terminal output: progress bars of a run, and tables of runs, comparisons, data and methods."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from fedamole.cli.table_layout import print_table, shortened
from fedamole.federation.progress import ProgressListener
from fedamole.reporting.run_table import SUMMARY_LINES, RunTable, as_text, run_tables
from fedamole.reporting.runs import read_runs
from fedamole.terminal import printable, screen

if TYPE_CHECKING:
    from fedamole.comparison.tables import Table as ComparisonTable


WIDE = 120
"""Width from which on names of clients are never shortened in the table of their numbers of examples."""
SENTENCES = ("value", "answers")
"""Columns of that table whose text is wrapped."""


class ProgressBars(ProgressListener):
    """Shows two progress bars: the rounds of the run, and the steps of the clients that are training."""

    def __init__(self, console: Console, title: str) -> None:
        """Draw on a terminal; enter `progress` as a context manager."""
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
        self.rounds = self.progress.add_task(printable(title), total=None, note="")
        self.steps = self.progress.add_task("", total=None, note="", visible=False)

    @override
    def round_started(self, round_: int, rounds: int, cohort: Sequence[str]) -> None:
        self.progress.update(self.rounds, total=rounds, completed=round_)

    @override
    def group_started(self, round_: int, names: Sequence[str]) -> None:
        self.stage(names[0] if len(names) == 1 else f"{len(names)} clients")

    @override
    def step(self, done: int, steps: int) -> None:
        self.progress.update(self.steps, completed=done, total=steps)

    @override
    def client_done(self, round_: int, name: str, report: Mapping[str, Any]) -> None:
        note = "failed" if "failed" in report else f"training loss {report['loss']:.3f}" if "loss" in report else "done"
        self.progress.update(self.steps, note=note)

    @override
    def stopped(self, text: str) -> None:
        self.progress.console.print(text, soft_wrap=True)

    @override
    def stage(self, text: str) -> None:
        self.progress.reset(self.steps, total=None, description=f"  {printable(text)}", visible=True, note="")

    @override
    def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
        note = "validation " + ", ".join(f"{variant} {value:.3f}" for variant, value in validation.items())
        self.progress.update(self.rounds, completed=round_ + 1, note=note)


def show_tables(console: Console, tables: "Sequence[ComparisonTable]") -> None:
    """Print the tables of a comparison."""
    for content in tables:
        print_table(
            console,
            (content.head, *content.body),
            title=content.title,
            caption=content.caption,
            text_columns=content.text_columns,
            names=content.clients,
        )


def show_run_tables(console: Console, tables: Sequence[RunTable], with_clients: bool) -> None:
    """Print tables of runs, one per partition."""
    for content in tables:
        for warning in content.warnings:
            console.print(warning, style="bold red", soft_wrap=True)
        lines = as_text(content, with_clients)
        seeds = ", ".join(map(str, content.seeds))
        print_table(
            console,
            lines,
            title=f"test score at the best validation round (seed {seeds})",
            caption=content.caption,
            names=[content.labels.get(client, client) for client in content.clients],
            bold="mean",
            section_end=len(lines) - 1 - len(SUMMARY_LINES),
        )
        if content.verdict:
            console.print(content.verdict, style="bold", soft_wrap=True)
        for note in content.notes:
            console.print(note, soft_wrap=True)


def show_runs(paths: Sequence[Path], with_clients: bool = True) -> None:
    """Print tables of finished runs to standard output."""
    show_run_tables(screen(wide=160), run_tables(read_runs(paths)), with_clients)


def show_sizes(console: Console, clients: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print a table of the clients' numbers of examples; `clients` has a record per client with equal keys.

    Names of clients are shortened and sentences wrapped on a narrow terminal, numbers are not.
    """
    table = Table(title=title, title_style="bold", title_justify="left")
    names = shortened([client["client"] for client in clients]) if console.width < WIDE else {}
    for key in clients[0]:
        is_text = isinstance(clients[0][key], str)
        table.add_column(key, justify="left" if is_text else "right", no_wrap=key not in SENTENCES)
    for client in clients:
        cells = {**client, "client": names.get(client["client"], client["client"])}
        table.add_row(*(str(value) for value in cells.values()))
    console.print(table)


def show_methods(console: Console, descriptions: Sequence[Mapping[str, Any]]) -> None:
    """Print a table with a row for each method."""
    keys = ("name", "paper", "communicates", "stays_local", "scored")
    table = Table(title=f"{len(descriptions)} methods")
    for key in ("method", *keys[1:]):
        table.add_column(key, no_wrap=key == "method")
    for description in descriptions:
        table.add_row(*(description[key] for key in keys))
    console.print(table)
    console.print("`fedamole methods NAME` explains a method: its round, deviations from the paper, settings")


def show_method(console: Console, description: Mapping[str, Any]) -> None:
    """Print the explanation and the settings of one method."""
    console.print(description["name"], style="bold")
    console.print(description["about"], soft_wrap=True)
    for key in ("communicates", "stays_local", "scored"):
        console.print(Text.assemble((key, "bold"), f": {description[key]}"))
    console.print("\n[method]")
    for key, value in {"name": description["name"], **description["parameters"]}.items():
        console.print(f"# {key}: computed by default" if value is None else f"{key} = {json.dumps(value)}")
