"""Local training of a group of clients on one resident base; the client's half of every engine."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedamole.evaluation.personal import EvaluationSettings
from fedamole.federation.autoencoder import train_autoencoders
from fedamole.federation.autoencoder_request import AutoencoderRequest
from fedamole.federation.client_data import ClientData
from fedamole.federation.client_factory import ClientFactory
from fedamole.federation.client_state import ClientState, ClientStates
from fedamole.federation.evaluator import Evaluator
from fedamole.federation.local import DivergedError, LocalTask, OnStep, embed
from fedamole.federation.lock_step import ClientWork, Outcome
from fedamole.federation.method import Evaluates, Method, Request, TrainingResult
from fedamole.federation.objective import objective_of
from fedamole.federation.probe import ProbeCounts
from fedamole.federation.randomness import exchange_seed
from fedamole.federation.record import non_finite, pack, unpack
from fedamole.federation.settings import TrainingSettings
from fedamole.federation.synthesis import synthesise
from fedamole.federation.synthesis_request import SynthesisRequest
from fedamole.model.bank import Bank
from fedamole.model.memory import peak_memory_mib, reset_peak_memory
from fedamole.model.params import indices_by_kind
from fedamole.runs.run_folder import RunFolder

log = logging.getLogger(__name__)

RUN: dict[type[Request], Callable[..., Sequence[Outcome]]] = {
    SynthesisRequest: synthesise,
    AutoencoderRequest: train_autoencoders,
}
"""What carries out requests of a group of clients that are no training; the objective of the run does trainings."""


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
        self.objective = objective_of(training)
        self.fit: Callable[..., Sequence[Outcome]] = self.objective.fit
        score_models = self.objective.score_models
        self.evaluator = Evaluator(bank, method, variants, evaluation, folder, self.states, self.factory, score_models)

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
        started, seconds_training, fit_index = time.perf_counter(), 0.0, 0
        reset_peak_memory(self.bank.base.device)
        works = [self._start(data, round_, payloads[data.info.name]) for data in group]
        while waiting := [work for work in works if work.request is not None]:
            begun = time.perf_counter()
            outcomes = self._train(waiting, round_, exchange, fit_index, on_step)
            seconds_training += time.perf_counter() - begun
            for work, outcome in zip(waiting, outcomes, strict=True):
                work.receive(outcome, self.training.budget)
            fit_index += 1
        shared = {
            "seconds": (time.perf_counter() - started) / len(group),
            "seconds_training": seconds_training / len(group),
            "group": len(group),
            "peak_memory_mib": peak_memory_mib(self.bank.base.device),
        }
        return {work.client.name: self._result(work, exchange, shared) for work in works}

    def _start(self, data: ClientData, round_: int, payload: bytes) -> ClientWork:
        """Restore a client's state, unpack its message and run its work until it needs training."""
        counts = ProbeCounts()
        client = self.factory.client(data, round_, counts)
        state, message = self.states.load(client), unpack(self.method.records.message, payload)
        generator = self.method.update(client, state.client_state, message)
        work = ClientWork(client, data, counts, generator, state.step_fraction, dict(state.trained_sizes))
        work.advance(None)
        return work

    def _train(
        self, works: Sequence[ClientWork], round_: int, exchange: int, fit_index: int, on_step: OnStep | None
    ) -> list[Outcome]:
        """Train what the clients wait for; requests of one kind together."""
        seed, rate, outcomes = exchange_seed(self.seed, exchange), self.training.rate(round_), dict[int, Outcome]()
        tasks = [
            LocalTask(work.client.name, work.request, self.objective.rows(work.data.train), rate, work.step_fraction)
            for work in works
            if work.request is not None
        ]
        for indices in indices_by_kind({i: task.fit for i, task in enumerate(tasks)}):
            group = [tasks[i] for i in indices]
            results = RUN.get(type(group[0].fit), self.fit)(
                self.bank, group, self.training, seed=seed, round_=round_, fit_index=fit_index, on_step=on_step
            )
            if self.method.needs_embeddings:
                results = self._embed([works[i] for i in indices], results)
            outcomes.update(zip(indices, results, strict=True))
        return [outcomes[i] for i in range(len(works))]

    def _embed(self, works: Sequence[ClientWork], results: Sequence[Outcome]) -> list[Outcome]:
        """Add the mean embeddings of the embedding splits to the results of the clients that did not diverge."""
        trained = {i: result for i, result in enumerate(results) if isinstance(result, TrainingResult)}
        outcomes = [*results]
        # `fit` leaves the adapters in the bank in another order.
        self.bank.load([result.adapter for result in trained.values()])
        rows = [works[i].data.embedding.pairs() for i in trained]
        means = embed(self.bank, rows, self.batch_tokens)
        for i, read, embeddings in zip(trained, rows, means, strict=True):
            works[i].counts.add(read)
            outcomes[i] = replace(trained[i], embeddings=embeddings)
        return outcomes

    def _result(self, work: ClientWork, exchange: int, shared: Mapping[str, Any]) -> UpdateResult:
        """Write the client's state and pack its reply; a client that diverged does neither."""
        client, outcome, counts = work.client, work.outcome, work.counts
        report: dict[str, Any] = {
            "steps": work.steps,
            "forward_tokens": counts.tokens,
            "backward_tokens": work.tokens,
            "trained_parameters": sum(work.trained_sizes.values()),
            **shared,
        }
        if counts.examples:
            report["probed"] = counts.examples
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
        loss = {"loss": trained.loss} if trained.steps else {}  # steps that only optimised synthetic examples have none
        return UpdateResult(pack(reply), {**loss, **report})
