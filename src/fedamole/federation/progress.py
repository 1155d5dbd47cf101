"""Progress of a run: the interface that the round loop and the engines report to, and a listener for log files."""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console
from typing_extensions import override

from fedamole.errors import ConfigError


class ProgressListener:
    """Receives the events of a run; this base class ignores them all. Rounds count from 0."""

    def round_started(self, round_: int, rounds: int, cohort: Sequence[str]) -> None:
        """A round has started, with these clients."""

    def joined(self, name: str, about: Mapping[str, Any]) -> None:
        """A client has joined for the first time; `about` is the description that it sent of itself."""

    def present(self, names: Collection[str], waiting_for: int) -> None:
        """The available clients have changed; the run waits for `waiting_for` more (0: it continues)."""

    def group_started(self, round_: int, names: Sequence[str]) -> None:
        """A group of clients has started local training."""

    def step(self, done: int, steps: int) -> None:
        """The current group has taken `done` of `steps` optimiser steps."""

    def client_done(self, round_: int, name: str, report: Mapping[str, Any]) -> None:
        """A client has finished an update; `report` is that of `UpdateResult`."""

    def stopped(self, text: str) -> None:
        """The run ends before its configured number of rounds; `text` says after which round, and why."""

    def stage(self, text: str) -> None:
        """A part of the run that takes a while, described by `text`, has started."""

    def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
        """A round has been committed; `validation` is the mean value by variant that chooses the best round."""

    def should_stop(self) -> bool:
        """Return whether the run ends here, as if this was its last round. Asked after each committed round."""
        return False


class Listeners(ProgressListener):
    """Passes each event of a run to several listeners, in their order."""

    def __init__(self, listeners: Sequence[ProgressListener]) -> None:
        """Refuse listeners of another type with a ConfigError, before the run starts."""
        for listener in listeners:
            if not isinstance(listener, ProgressListener):
                raise ConfigError(f"callbacks: {type(listener).__name__} is not derived from fedamole.Callback")
        self.listeners = list(listeners)

    @override
    def round_started(self, round_: int, rounds: int, cohort: Sequence[str]) -> None:
        for listener in self.listeners:
            listener.round_started(round_, rounds, cohort)

    @override
    def joined(self, name: str, about: Mapping[str, Any]) -> None:
        for listener in self.listeners:
            listener.joined(name, about)

    @override
    def present(self, names: Collection[str], waiting_for: int) -> None:
        for listener in self.listeners:
            listener.present(names, waiting_for)

    @override
    def group_started(self, round_: int, names: Sequence[str]) -> None:
        for listener in self.listeners:
            listener.group_started(round_, names)

    @override
    def step(self, done: int, steps: int) -> None:
        for listener in self.listeners:
            listener.step(done, steps)

    @override
    def client_done(self, round_: int, name: str, report: Mapping[str, Any]) -> None:
        for listener in self.listeners:
            listener.client_done(round_, name, report)

    @override
    def stopped(self, text: str) -> None:
        for listener in self.listeners:
            listener.stopped(text)

    @override
    def stage(self, text: str) -> None:
        for listener in self.listeners:
            listener.stage(text)

    @override
    def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
        for listener in self.listeners:
            listener.round_done(round_, validation)

    @override
    def should_stop(self) -> bool:
        return any([listener.should_stop() for listener in self.listeners])  # a list: each is asked


def outcome(report: Mapping[str, Any]) -> str:
    """Describe the report of a finished update: why it failed, its training loss, or that nothing was trained."""
    if "failed" in report:
        return f"failed: {report['failed']}"
    if "loss" in report:
        return f"loss {report['loss']:.4f}"
    return "done" if report.get("steps") else "done, nothing trained"


class PlainProgress(ProgressListener):
    """Prints one line per client and round, for log files."""

    def __init__(self, console: Console) -> None:
        """Print to a console that is not a terminal."""
        self.console, self.rounds = console, 0
        self.started = time.perf_counter()

    def round_started(self, round_: int, rounds: int, cohort: Sequence[str]) -> None:
        """Remember the number of rounds."""
        self.rounds = rounds

    def client_done(self, round_: int, name: str, report: Mapping[str, Any]) -> None:
        """Print the client's loss and time, or why it failed."""
        self._say(f"round {round_ + 1}/{self.rounds}  {name}  {outcome(report)}  {report['seconds']:.1f} s")

    def stopped(self, text: str) -> None:
        """Print the text."""
        self._say(text)

    def stage(self, text: str) -> None:
        """Print the text."""
        self._say(text)

    def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
        """Print the validation of the round and the time so far."""
        elapsed = time.perf_counter() - self.started
        values = "  ".join(f"{variant} {value:.4f}" for variant, value in validation.items())
        self._say(f"round {round_ + 1}/{self.rounds} done  validation: {values}  after {elapsed:.0f} s")

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)
