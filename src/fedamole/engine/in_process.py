"""The default engine: all clients in this process, a group at a time, on one resident base."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TypeVar

from fedamole.errors import FedamoleError
from fedamole.federation.client_data import ClientData
from fedamole.federation.engine import Answered
from fedamole.federation.evaluator import Scores
from fedamole.federation.method import ClientInfo
from fedamole.federation.progress import ProgressListener
from fedamole.federation.worker import UpdateResult, Worker
from fedamole.model.memory import fits_in_memory, out_of_memory, release_memory

R = TypeVar("R")


class InProcess:
    """Runs all clients with one worker; clients differ in their data and in their part of the run folder."""

    deployed = False

    def __init__(self, worker: Worker, data: Mapping[str, ClientData], listener: ProgressListener, group: int) -> None:
        """Serve the clients in `data`, at most `group` at once; the adapters of a group are in memory together."""
        self.worker, self.data, self.listener, self.group = worker, data, listener, group

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        """All clients, sorted by name."""
        return tuple(self.data[name].info for name in sorted(self.data))

    def wait_for_clients(self) -> Collection[str]:
        """Return the names of all clients at once: all are available."""
        return self.data.keys()

    def update(self, round_: int, messages: Mapping[str, bytes], exchange: int = 0) -> dict[str, UpdateResult]:
        """Train the clients that have a message."""

        def work(group: Sequence[ClientData]) -> dict[str, UpdateResult]:
            self.listener.group_started(round_, [data.info.name for data in group])
            results = self.worker.update(group, round_, messages, exchange, self.listener.step)
            for name, result in results.items():
                self.listener.client_done(round_, name, result.report)
            return results

        return self._in_groups(messages, work)

    def evaluate(self, round_: int, variant: str, messages: Mapping[str, bytes | None]) -> dict[str, Scores]:
        """Score the current models of some clients on validation."""
        release_memory(self.worker.bank.base.device)  # frees the memory of the replies, which are aggregated by now
        return self._in_groups(messages, lambda group: self.worker.evaluator.evaluate(group, round_, variant, messages))

    def save_best(self, variant: str, round_: int, names: Collection[str]) -> None:
        """Save the current models of these clients as their best so far."""
        for name in sorted(names):
            self.worker.evaluator.save_best(self.data[name], variant)

    def restore(self, best: Mapping[str, Mapping[str, int]], answered: Answered, examples: Mapping[str, int]) -> None:
        """Restore nothing: models and private states are in the run folder."""

    def score_base(self, split: str, names: Collection[str]) -> dict[str, Scores]:
        """Score the untuned base on a split of these clients."""
        return self._in_groups(names, lambda group: self.worker.evaluator.score_base(group, split))

    def majority(self) -> dict[str, Scores]:
        """Score the most frequent training answer on every client's test split."""
        return {name: self.worker.evaluator.majority(self.data[name]) for name in sorted(self.data)}

    def test(self, variant: str, best: bool) -> dict[str, Scores]:
        """Score the models of the best round, or of the last round, on every client's test split."""
        score = self.worker.evaluator.test_best if best else self.worker.evaluator.test_last
        return self._in_groups(self.data, lambda group: score(group, variant))

    def _in_groups(
        self, names: Collection[str], work: Callable[[Sequence[ClientData]], Mapping[str, R]]
    ) -> dict[str, R]:
        """Run `work` on one group after the other; if memory runs out, halve the group and try again."""
        waiting, results = [self.data[name] for name in sorted(names)], dict[str, R]()

        def run(group: Sequence[ClientData]) -> None:
            results.update(work(group))

        while waiting:
            group = waiting[: self.group]
            try:
                fits = fits_in_memory(partial(run, group), len(group), self.worker.bank.base.device)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise FedamoleError(
                    f"out of memory with one client at a time ({group[0].info.name}): lower training.batch_size, "
                    "training.max_length or evaluation.batch_tokens, or set base.gradient_checkpointing = true"
                ) from error
            if fits:
                waiting = waiting[len(group) :]
            else:
                self.group = (len(group) + 1) // 2
        return results
