"""The default engine: all clients in this process, one after the other, on one resident base."""

from collections.abc import Mapping

from fedamole.federation.loop import Watcher
from fedamole.federation.method import ClientInfo
from fedamole.federation.worker import Answer, ClientData, Scores, Worker


class InProcess:
    """Every client's worker is the same object: what tells clients apart is their data and their folder."""

    def __init__(self, worker: Worker, data: Mapping[str, ClientData], watcher: Watcher) -> None:
        """Serve the clients named in `data`."""
        self.worker, self.data, self.watcher = worker, data, watcher

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        """All clients, in the order of their names."""
        return tuple(self.data[name].info for name in sorted(self.data))

    def update(self, round_: int, messages: Mapping[str, bytes]) -> dict[str, Answer]:
        """Train a cohort, each on its own message."""
        answers = {}
        for name in sorted(messages):
            self.watcher.client_started(round_, name)
            answers[name] = self.worker.update(self.data[name], round_, messages[name], self.watcher.step)
            self.watcher.client_done(round_, name, answers[name].report)
        return answers

    def evaluate(self, round_: int, row: str, messages: Mapping[str, bytes | None]) -> dict[str, Scores]:
        """Score the present models of some clients on validation."""
        return {
            name: self.worker.evaluate(self.data[name], round_, row, messages[name]) for name in sorted(messages)
        }

    def keep(self, row: str) -> None:
        """Let every client save its present model as its best so far."""
        for name in sorted(self.data):
            self.worker.keep(self.data[name], row)

    def bare(self, split: str) -> dict[str, Scores]:
        """Scores of the untuned base on every client's split."""
        return {name: self.worker.bare(self.data[name], split) for name in sorted(self.data)}

    def majority(self) -> dict[str, Scores]:
        """Scores of a constant answer on every client's test split."""
        return {name: self.worker.majority(self.data[name]) for name in sorted(self.data)}

    def test(self, row: str, best: bool) -> dict[str, Scores]:
        """Scores on every client's test split of the best round's models, or of the last round's."""
        score = self.worker.test_best if best else self.worker.test_last
        return {name: score(self.data[name], row) for name in sorted(self.data)}
