"""The worker of a private run (`[privacy]`): it noises trainings, keeps the ledgers, and stops at a client's budget."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from typing_extensions import override

from fedamole.federation.client_data import ClientData
from fedamole.federation.local import DivergedError, LocalTask, OnStep
from fedamole.federation.lock_step import ClientWork, Outcome
from fedamole.federation.method import TrainingResult
from fedamole.federation.privacy.accounting import epsilon_of
from fedamole.federation.privacy.budget import Budget
from fedamole.federation.privacy.ledger import Answer, Ledger
from fedamole.federation.privacy.mechanism import Mechanism
from fedamole.federation.privacy.training import PrivateGroup
from fedamole.federation.record import bytes_as_tensor, tensor_as_bytes
from fedamole.federation.worker import UpdateResult, Worker
from fedamole.files import write_atomic
from fedamole.runs.checkpoint import state_path

log = logging.getLogger(__name__)


class PrivateWorker(Worker):
    """A worker whose answers are differentially private for every training example of each client."""

    def __init__(self, budget: Budget, *arguments: Any, **options: Any) -> None:
        """Work as `Worker` does, within a budget."""
        super().__init__(*arguments, **options)
        self.budget, self.plain_fit, self.fit = budget, self.fit, self._fit
        self.mechanism: Callable[[int], Mechanism] = budget.mechanism
        """Returns the mechanism of a training for a number of examples."""
        self.requests: dict[str, str] = {}
        """SHA-256 of the request that each client of the group answers."""
        self.noised: dict[str, int] = {}
        """Private steps that each client of the group has taken for its answer."""

    @override
    def update(
        self,
        group: Sequence[ClientData],
        round_: int,
        payloads: Mapping[str, bytes],
        exchange: int = 0,
        on_step: OnStep | None = None,
    ) -> dict[str, UpdateResult]:
        """Answer requests as `Worker.update` does.

        A request that was answered before gets the same answer. A client whose budget does not allow this round does
        not train.
        """
        self.requests = {
            name: hashlib.sha256(f"{round_}/{exchange}/".encode() + payload).hexdigest()
            for name, payload in payloads.items()
        }
        self.noised = {}
        results = dict[str, UpdateResult]()
        for data in group:
            result = self._known(data, round_, exchange)
            if result is not None:
                results[data.info.name] = result
        waiting = [data for data in group if data.info.name not in results]
        return results | (super().update(waiting, round_, payloads, exchange, on_step) if waiting else {})

    def _known(self, data: ClientData, round_: int, exchange: int) -> UpdateResult | None:
        """Return the answer that a client gave to this request before, or its refusal; None if it must train."""
        name = data.info.name
        ledger = Ledger(self.folder, name)
        answer = ledger.answer_to(round_, exchange, self.requests[name])
        if answer is not None:
            if (state := tensor_as_bytes(answer.state)) is not None:
                write_atomic(state_path(self.folder, name, round_, exchange), state)
            return UpdateResult(tensor_as_bytes(answer.payload), json.loads(answer.report))
        epsilon, delta = self.budget.settings.epsilon, self.budget.settings.delta
        spent = [entry.noised for entry in ledger.entries]
        planned = self.budget.round_of(len(data.train.rows))
        if epsilon_of([*spent, planned], delta) <= epsilon:
            return None
        used = epsilon_of(spent, delta)
        reason = (
            f"privacy budget spent: client {name} has used epsilon {used:.3f} of {epsilon:g}, and round {round_} would "
            "exceed it"
        )
        log.warning("%s; it is left out of this round", reason)
        return UpdateResult(None, {"failed": reason, "epsilon": used})

    def _fit(self, bank: Any, tasks: Sequence[LocalTask], *arguments: Any, **options: Any) -> Sequence[Outcome]:
        """Train privately, or plainly if the result stays local; then a client that diverged keeps its adapter.

        Whether a training without noise diverged depends on the examples, so it must not decide whether the client
        answers.
        """
        if tasks[0].fit.stays_local or not self.budget.trains:
            results = self.plain_fit(bank, tasks, *arguments, **options)
            return [
                task.fit.unchanged() if isinstance(result, DivergedError) else result
                for task, result in zip(tasks, results, strict=True)
            ]
        for task in tasks:
            self.noised[task.client] = self.noised.get(task.client, 0) + task.steps(self.training)
            if self.noised[task.client] > self.budget.steps(len(task.rows)):
                raise RuntimeError(
                    f"{type(self.method).__name__} takes more private steps than released_share declares"
                )
        private = [replace(task, mechanism=self.mechanism(len(task.rows))) for task in tasks]
        return self.plain_fit(bank, private, *arguments, group_class=PrivateGroup, **options)

    @override
    def _embed(self, works: Sequence[ClientWork], results: Sequence[Outcome]) -> list[Outcome]:
        """Leave the embeddings empty: there is no noise for them."""
        return [*results]

    @override
    def _result(self, work: ClientWork, exchange: int, shared: Mapping[str, Any]) -> UpdateResult:
        """Write state, answer and ledger; the answer counts as sent when this returns."""
        self._check_empty(work.outcome)
        client = work.client
        result = super()._result(work, exchange, shared)
        ledger, noised = Ledger(self.folder, client.name), self.budget.round_of(len(work.data.train.rows))
        noised = replace(noised, steps=self.noised.get(client.name, 0))
        epsilon = epsilon_of([*(entry.noised for entry in ledger.entries), noised], self.budget.settings.delta)
        report = {**result.report, "epsilon": epsilon}
        payload, state = dict[str, Tensor](), dict[str, Tensor]()
        if result.payload is not None:
            payload = bytes_as_tensor(result.payload)
            state = bytes_as_tensor(state_path(self.folder, client.name, client.round, exchange).read_bytes())
        answer = Answer(self.requests[client.name], payload, state, json.dumps(report))
        ledger.record(client.round, exchange, answer, noised)
        return UpdateResult(result.payload, report)

    def _check_empty(self, outcome: tuple[Any, Any, TrainingResult] | DivergedError | None) -> None:
        """Raise RuntimeError if a field of a reply that must be empty is not."""
        if not isinstance(outcome, tuple):
            return
        for field, kind in self.method.released().items():
            if kind == "empty" and getattr(outcome[1], field):
                raise RuntimeError(f"{type(self.method).__name__}: {field} of a private reply must be empty")
