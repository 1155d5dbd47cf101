"""Terminal output of a comparison: progress of its trials, and the list of trials of a dry run."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typing_extensions import override

from fedamole.comparison.trials import Trial, TrialListener
from fedamole.federation.summary import stopped_early


class TrialProgress(TrialListener):
    """Prints a line per finished trial and, on a terminal, one progress bar for all trials."""

    def __init__(self, console: Console) -> None:
        """Write to a console; enter `progress` as a context manager."""
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
        self.task = self.progress.add_task("trials", total=None)

    @override
    def trials_started(self, trials: int, finished: int) -> None:
        self.progress.reset(self.task, total=trials)
        self._print(f"{trials} trials to run" + (f", {finished} already finished" if finished else ""))

    @override
    def trial_done(self, trial: Trial, seconds: float, summary: Mapping[str, Any]) -> None:
        """Print the mean test score of each method of the trial."""
        scores = "  ".join(
            f"{method} {summary['rows'][variant]['mean']:.1f}" for method, variant in trial.variants.items()
        )
        early = f"  {text}" if (text := stopped_early(summary)) else ""
        self._print(f"{trial.name}  {seconds:.0f} s  score: {scores}{early}")
        self.progress.advance(self.task)

    @override
    def trial_failed(self, trial: Trial, seconds: float, error: str) -> None:
        self._print(f"{trial.name}  {seconds:.0f} s  failed: {error}")
        self.progress.advance(self.task)

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


def show_trials(console: Console, trials: Sequence[Mapping[str, Any]]) -> None:
    """Print the trials of a dry run and what would be done with each."""
    table = Table("trial", "action", "size", "rounds", "learning rate")
    for trial in trials:
        rate = "" if trial["learning_rate"] is None else f"{trial['learning_rate']:g}"
        table.add_row(trial["trial"], trial["action"], trial["size"], str(trial["rounds"]), rate)
    console.print(table)
