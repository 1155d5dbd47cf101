"""The client's side of every engine: one client's work on one resident base.

A worker keeps nothing in memory between two calls: what a client keeps lies on its own disk, so the number of
clients a machine can serve is not bounded by its memory.
"""

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedamole.data.examples import Example, Shard
from fedamole.data.tokens import TokenRow, tokenise
from fedamole.errors import DataError
from fedamole.evaluation.personal import EvaluationSettings, loss_of, majority_scores, scores_of
from fedamole.federation.checkpoint import latest_state, state_path
from fedamole.federation.local import DivergedError, OnStep, Row, embed, fit
from fedamole.federation.method import Client, ClientInfo, Evaluates, Method, Trained
from fedamole.federation.record import non_finite, pack, unpack
from fedamole.federation.run_folder import RunFolder, write_atomic
from fedamole.federation.settings import TrainingSettings
from fedamole.model.bank import Bank
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

    def update(self, data: ClientData, round_: int, payload: bytes, on_step: OnStep | None = None) -> Answer:
        """Run a round at one client. If its training diverges, the client stays as it was before the round."""
        started = time.perf_counter()
        method, client = self.method, self._client(data, round_, on_step)
        _reset_peak_memory(self.bank.base.device)
        message = unpack(method.records.message, payload)
        kept, _ = self._private(client)
        try:
            kept, reply, trained = method.update(client, kept, message)
            if (name := non_finite(reply)) is not None:
                raise DivergedError(f"client {client.name}, round {round_}: {name} of its reply is not finite")
        except DivergedError as error:
            self.bank.base.training(False)
            log.warning("%s; it is left out of this round and keeps its state", error)
            return Answer(None, {"failed": str(error), "seconds": time.perf_counter() - started})
        keeps_trained = "trained" in self.rows.values()
        packed = torch.frombuffer(bytearray(pack(kept)), dtype=torch.uint8)
        private = Private({"record": packed}, trained.adapter if keeps_trained else None)
        write_atomic(state_path(self.folder, client.name, round_), pack(private))
        report = {
            "loss": trained.loss, "steps": trained.steps, "seconds": time.perf_counter() - started,
            "peak_memory_mib": _peak_memory_mib(self.bank.base.device),
        }
        return Answer(pack(reply), report)

    def evaluate(self, data: ClientData, round_: int, row: str, payload: bytes | None) -> Scores:
        """Loss (and scores, where they choose the best round) of the client's present model on validation."""
        adapter = self._present(data, round_, row, payload)
        if self.rows[row] == "aggregated":
            write_atomic(self._candidate(data, row), pack(Private({}, adapter)))
        self.bank.load(adapter)
        return self._score(data.validation, with_scores=self.evaluation.select == "score")

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

    def test_best(self, data: ClientData, row: str) -> Scores:
        """Scores on the test split of the personal model that was kept; the bare base where there is none."""
        folder = self.folder.adapter(data.info.name, row)
        self.bank.load(load_adapter(folder, self.bank.base.identity) if folder.exists() else None)
        return self._score(data.test, with_scores=True)

    def test_last(self, data: ClientData, row: str) -> Scores:
        """Scores on the test split of the client's model after the last round."""
        self.bank.load(self._last(data, row))
        return self._score(data.test, with_scores=True)

    def bare(self, data: ClientData, split: str) -> Scores:
        """Scores of the untuned base: loss on validation, everything on test."""
        self.bank.load(None)
        with_scores = split == "test" or self.evaluation.select == "score"
        return self._score(data.test if split == "test" else data.validation, with_scores)

    def majority(self, data: ClientData) -> Scores:
        """Scores on the test split of always giving the most frequent training answer."""
        return majority_scores(data.train.examples, data.test.examples, self.evaluation)

    def _score(self, split: Split, with_scores: bool) -> Scores:
        scores = {"loss": loss_of(self.bank, split.rows, self.evaluation)}
        if with_scores:
            scores |= scores_of(self.bank, split.rows, split.examples, self.evaluation)
        return scores

    def _client(self, data: ClientData, round_: int, on_step: OnStep | None = None) -> Client:
        def train(adapter: Adapter) -> Trained:
            trained = fit(
                self.bank, adapter, data.train.pairs(), self.training,
                seed=self.seed, client=data.info.name, round_=round_, on_step=on_step,
            )
            if not self.method.embeds:
                return trained
            means = embed(self.bank, data.embedding.pairs(), self.evaluation.batch_tokens)
            return Trained(trained.adapter, trained.steps, trained.loss, means)

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


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory_mib(device: torch.device) -> float:
    """Peak memory: of the device in this update, or of the whole process since its start on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
