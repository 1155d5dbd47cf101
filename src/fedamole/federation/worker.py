"""Local training of a group of clients on one resident base; the client's half of every engine."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedamole.evaluation.personal import EvaluationSettings
from fedamole.federation.client_data import ClientData
from fedamole.federation.client_factory import ClientFactory
from fedamole.federation.client_state import ClientState, ClientStates
from fedamole.federation.evaluator import Evaluator
from fedamole.federation.local import DivergedError, LocalTask, OnStep, embed, fit
from fedamole.federation.lock_step import ClientWork, LockStep
from fedamole.federation.method import Client, Evaluates, Method, TrainingRequest, TrainingResult
from fedamole.federation.probe import ProbeCounts
from fedamole.federation.randomness import exchange_seed
from fedamole.federation.record import non_finite, pack, unpack
from fedamole.federation.settings import TrainingSettings
from fedamole.model.bank import Bank
from fedamole.model.memory import peak_memory_mib, reset_peak_memory
from fedamole.model.params import indices_by_kind
from fedamole.runs.run_folder import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UpdateResult:
    """What comes back from a client's update."""

    payload: bytes | None
    """The packed reply of the method; None if the client failed, and is left out of the aggregate."""
    report: dict[str, Any]
    """Loss, steps, tokens, seconds and memory for metrics.jsonl; `failed` gives the reason of a failure."""


class Worker:
    """Runs the client's half of a method for groups of clients; `evaluator` scores their models."""

    def __init__(
        self,
        bank: Bank,
        method: Method[Any, Any, Any, Any],
        variants: Mapping[str, Evaluates],
        training: TrainingSettings,
        evaluation: EvaluationSettings,
        folder: RunFolder,
        seed: int,
    ) -> None:
        """Train clients of a run with `seed` on `bank`; their private states are in `folder`."""
        self.bank, self.method, self.variants, self.training = bank, method, variants, training
        self.folder, self.seed, self.batch_tokens = folder, seed, evaluation.batch_tokens
        self.states = ClientStates(folder, method, bank.base)
        self.factory = ClientFactory(bank, evaluation.batch_tokens, seed)
        self.evaluator = Evaluator(bank, method, variants, evaluation, folder, self.states, self.factory)

    def update(
        self,
        group: Sequence[ClientData],
        round_: int,
        payloads: Mapping[str, bytes],
        exchange: int = 0,
        on_step: OnStep | None = None,
    ) -> dict[str, UpdateResult]:
        """Run one exchange of a round: unpack each client's message, train in lock-step, pack the replies.

        A client whose training diverges keeps the state that it had before. States are written after the whole group
        has finished, so a group that ran out of memory can be tried again.
        """
        started = time.perf_counter()
        reset_peak_memory(self.bank.base.device)
        seed, probe_counts = exchange_seed(self.seed, exchange), [ProbeCounts() for _ in group]
        clients = [self.factory.client(data, round_, counts) for data, counts in zip(group, probe_counts, strict=True)]
        works = [self._work(client, payloads[client.name]) for client in clients]

        def train(requests: Mapping[int, TrainingRequest], fit_index: int) -> dict[int, TrainingResult | DivergedError]:
            tasks = {i: self._task(group[i], round_, request, works[i]) for i, request in requests.items()}
            results: dict[int, TrainingResult | DivergedError] = {}
            for indices in indices_by_kind({i: task.fit.adapter for i, task in tasks.items()}):
                together = [tasks[i] for i in indices]
                outcomes = fit(
                    self.bank, together, self.training, seed=seed, round_=round_, fit_index=fit_index, on_step=on_step
                )
                results.update(zip(indices, outcomes, strict=True))
                if self.method.needs_embeddings:
                    trained = {i: result for i in indices if isinstance(result := results[i], TrainingResult)}
                    results.update(self._embed(group, probe_counts, trained))
            return results

        lock_step = LockStep(works, self.training.budget, train)
        lock_step.run()
        shared = {
            "seconds": (time.perf_counter() - started) / len(group),
            "seconds_training": lock_step.seconds_training / len(group),
            "group": len(group),
            "peak_memory_mib": peak_memory_mib(self.bank.base.device),
        }
        results = {}
        for client, work, counts in zip(clients, works, probe_counts, strict=True):
            report = {
                "steps": work.steps,
                "forward_tokens": counts.tokens,
                "backward_tokens": work.tokens,
                "trained_parameters": sum(work.trained_sizes.values()),
                **shared,
            }
            if counts.examples:
                report["probed"] = counts.examples
            results[client.name] = self._result(client, exchange, work, report)
        return results

    def _work(self, client: Client, payload: bytes) -> ClientWork:
        state = self.states.load(client)
        message = unpack(self.method.records.message, payload)
        work = self.method.update(client, state.client_state, message)
        return ClientWork(work, state.step_fraction, dict(state.trained_sizes))

    def _task(self, data: ClientData, round_: int, request: TrainingRequest, work: ClientWork) -> LocalTask:
        learning_rate = self.training.learning_rate * self.training.lr_decay**round_
        return LocalTask(data.info.name, request, data.train.pairs(), learning_rate, work.step_fraction)

    def _embed(
        self, group: Sequence[ClientData], counts: Sequence[ProbeCounts], results: Mapping[int, TrainingResult]
    ) -> dict[int, TrainingResult]:
        """Add the mean embeddings of the embedding splits to the results of some clients of a group."""
        if not results:
            return {}
        # `fit` leaves the adapters in the bank in another order.
        self.bank.load([result.adapter for result in results.values()])
        rows = [group[i].embedding.pairs() for i in results]
        for i, read in zip(results, rows, strict=True):
            counts[i].add(read)
        means = embed(self.bank, rows, self.batch_tokens)
        return {i: replace(result, embeddings=mean) for (i, result), mean in zip(results.items(), means, strict=True)}

    def _result(self, client: Client, exchange: int, work: ClientWork, report: dict[str, Any]) -> UpdateResult:
        """Write the client's state and pack its reply; a client that diverged does neither."""
        outcome = work.outcome
        if isinstance(outcome, tuple) and (name := non_finite(outcome[1])) is not None:
            outcome = DivergedError(f"client {client.name}, round {client.round}: {name} of its reply is not finite")
        if isinstance(outcome, DivergedError):
            log.warning("%s; it is left out of this round and keeps its state", outcome)
            return UpdateResult(None, {**report, "failed": str(outcome)})
        assert outcome is not None
        client_state, reply, trained = outcome
        adapter = trained.adapter if "pre_aggregation" in self.variants.values() else None
        state = ClientState(client_state, adapter, work.step_fraction, work.trained_sizes)
        self.states.save(client, exchange, state)
        loss = {"loss": trained.loss} if work.steps else {}
        return UpdateResult(pack(reply), {**loss, **report})
