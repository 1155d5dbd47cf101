"""The client's side of every engine: the work of a group of clients on one resident base; one is a group of one.

A worker keeps nothing in memory between two calls: what a client keeps lies on its own disk, so the number of
clients a machine can serve is not bounded by its memory.
"""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedamole.data.examples import Example, Shard
from fedamole.data.tokens import TokenRow, tokenise
from fedamole.errors import DataError
from fedamole.evaluation.personal import EvaluationSettings, losses_of, majority_scores, scores_of
from fedamole.federation.checkpoint import latest_state, state_path
from fedamole.federation.local import DivergedError, LocalTask, OnStep, embed, fit
from fedamole.federation.method import Client, ClientInfo, Evaluates, Method, Trained
from fedamole.federation.record import non_finite, pack, unpack
from fedamole.federation.run_folder import RunFolder, write_atomic
from fedamole.federation.settings import TrainingSettings
from fedamole.model.bank import Bank
from fedamole.model.batch import Row
from fedamole.model.memory import peak_memory_mib, reset_peak_memory
from fedamole.model.params import Adapter
from fedamole.model.pretrained import load_adapter, save_adapter

log = logging.getLogger(__name__)

Scores = dict[str, float]


@dataclass(frozen=True)
class Split:
    """Token rows and the examples they stand for, in pairs."""

    rows: tuple[TokenRow, ...]
    examples: tuple[Example, ...]

    def pairs(self) -> list[Row]:
        """(prompt, answer) ids."""
        return [(row.prompt, row.answer) for row in self.rows]


@dataclass(frozen=True)
class ClientData:
    """One client's splits, ready for the base."""

    info: ClientInfo
    train: Split
    embedding: Split
    validation: Split
    test: Split


def client_data(shard: Shard, tokenizer: Any, max_length: int) -> ClientData:
    """Tokenise a shard; how many prompts were cut, and examples dropped, is a warning."""
    splits, cut, dropped = {}, 0, 0
    for name in ("train", "embedding", "validation", "test"):
        examples = getattr(shard, name)
        tokens = tokenise(examples, tokenizer, max_length)
        splits[name] = Split(tokens.rows, tuple(examples[place] for place in tokens.places))
        cut, dropped = cut + tokens.cut, dropped + tokens.dropped
        if not tokens.rows:
            raise DataError(
                f"client {shard.client}: no {name} example fits into training.max_length = {max_length}; raise it"
            )
    if cut or dropped:
        log.warning(
            "client %s: %d prompts cut to fit training.max_length = %d (from the context first, never the answer), "
            "%d examples left out because their answer alone is too long",
            shard.client, cut, max_length, dropped,
        )
    return ClientData(ClientInfo(shard.client, len(splits["train"].rows)), **splits)


@dataclass(frozen=True)
class Private:
    """What a client keeps between rounds."""

    kept: Mapping[str, Tensor]
    """The method's own record, packed, as the bytes of one tensor."""
    trained: Adapter | None
    """Its adapter after its last local training, where that is a model to be scored."""


@dataclass(frozen=True)
class Answer:
    """What comes back from a client's update; without a payload the client is left out of the aggregate."""

    payload: bytes | None
    report: dict[str, Any]
    """Loss, steps, seconds, peak memory, or the reason of a failure."""


class Worker:
    """Does what the server asks of a client."""

    def __init__(
        self,
        bank: Bank,
        method: Method[Any, Any, Any, Any],
        rows: Mapping[str, Evaluates],
        training: TrainingSettings,
        evaluation: EvaluationSettings,
        folder: RunFolder,
        seed: int,
    ) -> None:
        """Put a worker beside a resident base; `rows` names the models to score and when each comes to be."""
        self.bank, self.method, self.rows, self.folder, self.seed = bank, method, rows, folder, seed
        self.training, self.evaluation = training, evaluation

    @property
    def in_lockstep(self) -> bool:
        """Whether a group may hold several clients: a method with an `update` of its own works one at a time."""
        return type(self.method).update is Method.update

    def update(
        self, group: Sequence[ClientData], round_: int, payloads: Mapping[str, bytes], on_step: OnStep | None = None
    ) -> dict[str, Answer]:
        """Run a round at a group of clients, training them in lock-step.

        A client whose training diverges stays as it was before the round. Nothing is written before all are done, so a
        group that ran out of memory can be tried again.
        """
        if not self.in_lockstep:
            (data,) = group
            return {data.info.name: self._update_alone(data, round_, payloads, on_step)}
        started, method = time.perf_counter(), self.method
        reset_peak_memory(self.bank.base.device)
        clients = [self._client(data, round_) for data in group]
        messages = [unpack(method.records.message, payloads[client.name]) for client in clients]
        kept = [self._private(client)[0] for client in clients]
        triples = list(zip(clients, kept, messages, strict=True))
        adapters = [method.adapter(*triple) for triple in triples]
        training = time.perf_counter()
        outcomes = self._fit(group, adapters, round_, on_step)
        trained = time.perf_counter() - training
        results = [
            outcome if isinstance(outcome, DivergedError) else (*method.reply(*triple, outcome), outcome)
            for triple, outcome in zip(triples, outcomes, strict=True)
        ]
        report = {
            "seconds": (time.perf_counter() - started) / len(group), "seconds_training": trained / len(group),
            "group": len(group), "peak_memory_mib": peak_memory_mib(self.bank.base.device),
        }
        return {
            client.name: self._answer(client, result, report) for client, result in zip(clients, results, strict=True)
        }

    def _update_alone(
        self, data: ClientData, round_: int, payloads: Mapping[str, bytes], on_step: OnStep | None
    ) -> Answer:
        started, client = time.perf_counter(), self._client(data, round_, on_step)
        reset_peak_memory(self.bank.base.device)
        message = unpack(self.method.records.message, payloads[client.name])
        result: tuple[Any, Any, Trained] | DivergedError
        try:
            result = self.method.update(client, self._private(client)[0], message)
        except DivergedError as error:
            result = error
        seconds, peak = time.perf_counter() - started, peak_memory_mib(self.bank.base.device)
        return self._answer(client, result, {"seconds": seconds, "group": 1, "peak_memory_mib": peak})

    def _answer(
        self, client: Client, result: tuple[Any, Any, Trained] | DivergedError, report: dict[str, Any]
    ) -> Answer:
        """Keep what the client keeps and pack what it sends, or say why it sends nothing."""
        if not isinstance(result, DivergedError):
            name = non_finite(result[1])
            if name is not None:
                result = DivergedError(f"client {client.name}, round {client.round}: {name} of its reply is not finite")
        if isinstance(result, DivergedError):
            log.warning("%s; it is left out of this round and keeps its state", result)
            return Answer(None, {**report, "failed": str(result)})
        kept, reply, trained = result
        keeps_trained = "trained" in self.rows.values()
        packed = torch.frombuffer(bytearray(pack(kept)), dtype=torch.uint8)
        private = Private({"record": packed}, trained.adapter if keeps_trained else None)
        write_atomic(state_path(self.folder, client.name, client.round), pack(private))
        return Answer(pack(reply), {"loss": trained.loss, "steps": trained.steps, **report})

    def _fit(
        self, group: Sequence[ClientData], adapters: Sequence[Adapter], round_: int, on_step: OnStep | None = None
    ) -> list[Trained | DivergedError]:
        """Train adapters, those of one kind together, and read the embedding splits where the method wants it."""
        training, outcomes = self.training, dict[int, Trained | DivergedError]()
        rate = training.learning_rate * training.lr_decay**round_
        for places in _by_kind(adapters):
            part = [group[place] for place in places]
            tasks = [
                LocalTask(data.info.name, adapters[place], data.train.pairs(), rate)
                for data, place in zip(part, places, strict=True)
            ]
            found = fit(self.bank, tasks, training, seed=self.seed, round_=round_, on_step=on_step)
            outcomes.update(zip(places, found, strict=True))
            if self.method.embeds:
                trained = {place: one for place, one in zip(places, found, strict=True) if isinstance(one, Trained)}
                outcomes.update(self._embedded(group, trained))
        return [outcomes[place] for place in range(len(group))]

    def _embedded(self, group: Sequence[ClientData], outcomes: Mapping[int, Trained]) -> dict[int, Trained]:
        """The outcomes of some places of a group with what their adapters make of their embedding splits."""
        if not outcomes:
            return {}
        # Loaded anew, as `fit` leaves the adapters in an order of its own.
        self.bank.load([outcome.adapter for outcome in outcomes.values()])
        rows = [group[place].embedding.pairs() for place in outcomes]
        means = embed(self.bank, rows, self.evaluation.batch_tokens)
        return {
            place: replace(outcome, embeddings=mean)
            for (place, outcome), mean in zip(outcomes.items(), means, strict=True)
        }

    def evaluate(
        self, group: Sequence[ClientData], round_: int, row: str, payloads: Mapping[str, bytes | None]
    ) -> dict[str, Scores]:
        """Loss (and scores, where they choose the best round) of the clients' present models on validation."""
        adapters = []
        for data in group:
            adapters.append(self._present(data, round_, row, payloads[data.info.name]))
            if self.rows[row] == "aggregated":
                write_atomic(self._candidate(data, row), pack(Private({}, adapters[-1])))
        return self._scores(group, adapters, "validation", with_scores=self.evaluation.select == "score")

    def keep(self, data: ClientData, row: str) -> None:
        """Save the client's present model as its personal model of the best round so far."""
        adapter, target = self._last(data, row), self.folder.adapter(data.info.name, row)
        fresh = target.with_name(f".{target.name}.writing")
        shutil.rmtree(fresh, ignore_errors=True)
        if adapter is not None:
            save_adapter(adapter, fresh, self.bank.base.name, self.bank.base.identity)
        shutil.rmtree(target, ignore_errors=True)
        if adapter is not None:
            fresh.rename(target)

    def test_best(self, group: Sequence[ClientData], row: str) -> dict[str, Scores]:
        """Scores on the test splits of the personal models that were kept; the bare base where there is none."""
        folders = [self.folder.adapter(data.info.name, row) for data in group]
        identity = self.bank.base.identity
        adapters = [load_adapter(folder, identity) if folder.exists() else None for folder in folders]
        return self._scores(group, adapters, "test", with_scores=True)

    def test_last(self, group: Sequence[ClientData], row: str) -> dict[str, Scores]:
        """Scores on the test splits of the clients' models after the last round."""
        return self._scores(group, [self._last(data, row) for data in group], "test", with_scores=True)

    def bare(self, group: Sequence[ClientData], split: str) -> dict[str, Scores]:
        """Scores of the untuned base: loss on validation, everything on test."""
        with_scores = split == "test" or self.evaluation.select == "score"
        return self._scores(group, [None] * len(group), split, with_scores)

    def majority(self, data: ClientData) -> Scores:
        """Scores on the test split of always giving the most frequent training answer."""
        return majority_scores(data.train.examples, data.test.examples, self.evaluation)

    def _scores(
        self, group: Sequence[ClientData], adapters: Sequence[Adapter | None], split: str, with_scores: bool
    ) -> dict[str, Scores]:
        """Score each client's model on its own split, models of one kind together."""
        scores: dict[str, Scores] = {}
        for places in _by_kind(adapters):
            self.bank.load([adapter for place in places if (adapter := adapters[place]) is not None])
            splits: list[Split] = [getattr(group[place], split) for place in places]
            rows = [part.rows for part in splits]
            found = [{"loss": loss} for loss in losses_of(self.bank, rows, self.evaluation)]
            if with_scores:
                more = scores_of(self.bank, rows, [part.examples for part in splits], self.evaluation)
                found = [{**one, **other} for one, other in zip(found, more, strict=True)]
            scores.update(zip((group[place].info.name for place in places), found, strict=True))
        return scores

    def _client(self, data: ClientData, round_: int, on_step: OnStep | None = None) -> Client:
        def train(adapter: Adapter) -> Trained:
            (outcome,) = self._fit([data], [adapter], round_, on_step)
            if isinstance(outcome, DivergedError):
                raise outcome
            return outcome

        return Client(data.info, self.bank.base.shapes, self.seed, round_, train)

    def _private(self, client: Client) -> tuple[Any, Adapter | None]:
        path = latest_state(self.folder, client.name)
        if path is None:
            return self.method.first_keep(client), None
        private = unpack(Private, path.read_bytes())
        return unpack(self.method.records.keep, private.kept["record"].numpy().tobytes()), private.trained

    def _present(self, data: ClientData, round_: int, row: str, payload: bytes | None) -> Adapter | None:
        client = self._client(data, round_)
        kept, trained = self._private(client)
        if self.rows[row] != self.method.evaluates:
            return trained
        message = None if payload is None else unpack(self.method.records.message, payload)
        return self.method.personal(client, kept, message, trained)

    def _last(self, data: ClientData, row: str) -> Adapter | None:
        if self.rows[row] == "aggregated":
            return unpack(Private, self._candidate(data, row).read_bytes()).trained
        return self._present(data, 0, row, None)

    def _candidate(self, data: ClientData, row: str) -> Path:
        return self.folder.client(data.info.name) / f"candidate-{row}.safetensors"


def _by_kind(adapters: Sequence[Adapter | None]) -> list[list[int]]:
    """Places of the adapters that can share a bank, kind by kind; None is the bare base."""
    kinds: dict[object, list[int]] = {}
    for place, adapter in enumerate(adapters):
        kinds.setdefault(None if adapter is None else adapter.kind(), []).append(place)
    return list(kinds.values())


