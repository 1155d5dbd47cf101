"""Progress of runs that are started in Python: in a notebook a table, elsewhere lines or bars on standard error."""

import html
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Literal

from typing_extensions import override

from fedamole.cli.console import ProgressBars
from fedamole.cli.trial_progress import TrialProgress
from fedamole.comparison.trials import TrialListener
from fedamole.errors import ConfigError
from fedamole.federation.progress import PlainProgress, ProgressListener
from fedamole.terminal import screen

Progress = Literal["auto", "none"]


class NotebookProgress(ProgressListener):
    """A table of the rounds in the output of a notebook's cell, which grows while the run goes on."""

    def __init__(self, name: str) -> None:
        """Show an empty table with the run's name."""
        from IPython.display import HTML, display

        self._html, self._name, self._rounds, self._stage = HTML, name, 0, "starting"
        self._lines: list[Mapping[str, float]] = []
        self._handle = display(HTML(self._text()), display_id=True)

    @override
    def round_started(self, round_: int, rounds: int, cohort: Sequence[str]) -> None:
        self._rounds = rounds
        self._show(f"round {round_ + 1} of {rounds}: {len(cohort)} clients")

    @override
    def stage(self, text: str) -> None:
        self._show(text)

    @override
    def stopped(self, text: str) -> None:
        self._show(text)

    @override
    def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
        self._lines.append({"round": round_ + 1, **validation})
        self._show(f"round {round_ + 1} of {self._rounds} done")

    def _show(self, stage: str) -> None:
        self._stage = stage
        self._handle.update(self._html(self._text()))

    def _text(self) -> str:
        """Return the table as HTML; the values are the means that choose the best round, on validation."""
        names = list(self._lines[-1]) if self._lines else []
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        body = "".join(
            f"<tr><td>{line['round']}</td>" + "".join(f"<td>{line[name]:.4f}</td>" for name in names[1:]) + "</tr>"
            for line in self._lines
        )
        return f"<p>{html.escape(self._name)}: {html.escape(self._stage)}</p><table><tr>{head}</tr>{body}</table>"


@contextmanager
def shown_progress(progress: Progress, name: str) -> Iterator[ProgressListener]:
    """Yield the listener that shows a run's progress here: in a notebook, on a terminal, in a log, or not at all."""
    _check(progress)
    console = screen(error=True)
    if progress == "none":
        yield ProgressListener()
    elif in_notebook():
        yield NotebookProgress(name)
    elif console.is_terminal:
        bars = ProgressBars(console, name)
        with bars.progress:
            yield bars
    else:
        yield PlainProgress(console)


@contextmanager
def shown_trials(progress: Progress) -> Iterator[TrialListener]:
    """Yield the listener that shows a comparison's progress: one line per finished trial, and a bar on a terminal."""
    _check(progress)
    listener = TrialListener() if progress == "none" else TrialProgress(screen(error=True))
    with listener.progress if isinstance(listener, TrialProgress) else nullcontext():
        yield listener


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    if find_spec("IPython") is None:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")


def _check(progress: str) -> None:
    if progress not in ("auto", "none"):
        raise ConfigError(f"progress = {progress!r}: must be 'auto' or 'none'")
