"""Progress of a run: an interface that the loop and the engines report to, and one that prints lines."""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console


class ProgressListener:
    """Told what goes on, to show it; this one shows nothing."""

    def round_started(self, round_: int, rounds: int, cohort: Sequence[str]) -> None:
        """A round has begun."""

    def joined(self, name: str, about: Mapping[str, Any]) -> None:
        """A client has come for the first time, and told this of itself."""

    def present(self, names: Collection[str], waiting_for: int) -> None:
        """Who can be asked now; `waiting_for` more are needed before the run goes on."""

    def group_started(self, round_: int, names: Sequence[str]) -> None:
        """A group of clients begins its local training."""

    def step(self, done: int, steps: int) -> None:
        """The group at work has taken a step."""

    def client_done(self, round_: int, name: str, report: Mapping[str, Any]) -> None:
        """A client has answered."""

    def stage(self, text: str) -> None:
        """Something else that takes a while has begun."""

    def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
        """A round has been committed; what chooses the best round, by row."""


class PlainProgress(ProgressListener):
    """One line per client and round, for logs."""

    def __init__(self, console: Console) -> None:
        """Write to a console that is not a terminal."""
        self.console, self.rounds = console, 0
        self.started = time.perf_counter()

    def round_started(self, round_: int, rounds: int, cohort: Sequence[str]) -> None:
        """Remember how many rounds there are."""
        self.rounds = rounds

    def client_done(self, round_: int, name: str, report: Mapping[str, Any]) -> None:
        """A client's loss and time, or why it failed."""
        what = f"failed: {report['failed']}" if "failed" in report else f"loss {report['loss']:.4f}"
        self._say(f"round {round_ + 1}/{self.rounds}  {name}  {what}  {report['seconds']:.1f} s")

    def stage(self, text: str) -> None:
        """What else takes a while."""
        self._say(text)

    def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
        """Validation of the round, and the time left."""
        elapsed = time.perf_counter() - self.started
        scores = "  ".join(f"{row} {value:.4f}" for row, value in validation.items())
        self._say(f"round {round_ + 1}/{self.rounds} done  validation: {scores}  after {elapsed:.0f} s")

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)
