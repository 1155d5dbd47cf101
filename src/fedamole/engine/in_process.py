"""The default engine: all clients in this process, in groups, on one resident base."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from fedamole.errors import FedamoleError
from fedamole.federation.method import ClientInfo
from fedamole.federation.progress import ProgressListener
from fedamole.federation.worker import ClientData, Scores, UpdateResult, Worker
from fedamole.model.memory import out_of_memory, release_memory

log = logging.getLogger(__name__)

R = TypeVar("R")


class InProcess:
    """Every client's worker is the same object: what tells clients apart is their data and their folder."""

    deployed = False

    def __init__(self, worker: Worker, data: Mapping[str, ClientData], listener: ProgressListener, group: int) -> None:
        """Serve the clients named in `data`, `group` of them at once; only their adapters are in memory together."""
        self.worker, self.data, self.listener, self.group = worker, data, listener, group

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        """All clients, in the order of their names."""
        return tuple(self.data[name].info for name in sorted(self.data))

    def wait_for_clients(self) -> Collection[str]:
        """Everybody."""
        return self.data.keys()

    def update(self, round_: int, messages: Mapping[str, bytes]) -> dict[str, UpdateResult]:
        """Train a cohort, each on its own message."""

        def work(group: Sequence[ClientData]) -> dict[str, UpdateResult]:
            self.listener.group_started(round_, [data.info.name for data in group])
            answers = self.worker.update(group, round_, messages, self.listener.step)
            for name, answer in answers.items():
                self.listener.client_done(round_, name, answer.report)
            return answers

        return self._in_groups(messages, work)

    def evaluate(self, round_: int, row: str, messages: Mapping[str, bytes | None]) -> dict[str, Scores]:
        """Score the present models of some clients on validation."""
        release_memory(self.worker.bank.base.device)  # what the round's replies, merged by now, leave behind
        return self._in_groups(messages, lambda group: self.worker.evaluate(group, round_, row, messages))

    def save_best(self, row: str, round_: int, names: Collection[str]) -> None:
        """Let these clients save their present model as their best so far, that of a round."""
        for name in sorted(names):
            self.worker.save_best(self.data[name], row)

    def restore(
        self, best: Mapping[str, Mapping[str, int]], answered: Mapping[str, int], examples: Mapping[str, int]
    ) -> None:
        """Nothing: models and private states lie in the run's folder."""

    def score_base(self, split: str, names: Collection[str]) -> dict[str, Scores]:
        """Scores of the untuned base on these clients' split."""
        return self._in_groups(names, lambda group: self.worker.score_base(group, split))

    def majority(self) -> dict[str, Scores]:
        """Scores of a constant answer on every client's test split."""
        return {name: self.worker.majority(self.data[name]) for name in sorted(self.data)}

    def test(self, row: str, best: bool) -> dict[str, Scores]:
        """Scores on every client's test split of the best round's models, or of the last round's."""
        score = self.worker.test_best if best else self.worker.test_last
        return self._in_groups(self.data, lambda group: score(group, row))

    def _in_groups(
        self, names: Collection[str], work: Callable[[Sequence[ClientData]], Mapping[str, R]]
    ) -> dict[str, R]:
        """Work on clients a group at a time; where memory runs out, halve the group and do it again."""
        waiting, results = [self.data[name] for name in sorted(names)], dict[str, R]()
        while waiting:
            group = waiting[: self.group]
            try:
                results.update(work(group))
                waiting = waiting[len(group) :]
                continue
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(group) == 1:
                    raise FedamoleError(
                        f"out of memory with one client at a time ({group[0].info.name}): lower training.batch_size, "
                        "training.max_length or evaluation.batch_tokens, or set base.gradient_checkpointing = true"
                    ) from error
            # Outside the handler, where the error no longer holds on to what was in memory.
            release_memory(self.worker.bank.base.device)
            self.group = (len(group) + 1) // 2
            log.warning("out of memory with %d clients at once, going on with %d", len(group), self.group)
        return results
