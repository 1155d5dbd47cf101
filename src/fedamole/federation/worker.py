"""The client's side of every engine: the work of a group of clients on one resident base; one is a group of one.

A worker keeps nothing in memory between two calls: what a client keeps lies on its own disk, so the number of
clients a machine can serve is not bounded by its memory.
"""

import logging
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedamole.data.examples import Example, Shard
from fedamole.data.tokens import Tokenised, TokenRow, tokenise, warn_of_text
from fedamole.errors import DataError, RunError
from fedamole.evaluation.likelihood import mean_losses
from fedamole.evaluation.personal import EvaluationSettings, losses_of, majority_scores, scores_of
from fedamole.federation.local import DivergedError, LocalTask, OnStep, embed, fit
from fedamole.federation.looks import Looks, drawn
from fedamole.federation.method import Client, ClientInfo, Evaluates, Method, TrainingRequest, TrainingResult
from fedamole.federation.record import PayloadError, bytes_as_tensor, non_finite, pack, tensor_as_bytes, unpack
from fedamole.federation.settings import TrainingSettings
from fedamole.files import write_atomic
from fedamole.model.adapter_files import check_fits
from fedamole.model.bank import Bank
from fedamole.model.batch import TokenPair
from fedamole.model.memory import peak_memory_mib, reset_peak_memory
from fedamole.model.params import Adapter
from fedamole.model.pretrained import load_adapter, save_adapter
from fedamole.received.files import inside
from fedamole.runs.checkpoint import latest_state, state_path
from fedamole.runs.run_folder import RunFolder

log = logging.getLogger(__name__)

Scores = dict[str, float]
Work = Generator[TrainingRequest, TrainingResult, tuple[Any, Any, TrainingResult]]
"""A client's `update` under way."""


@dataclass(frozen=True)
class Split:
    """Token rows and the examples they stand for, in pairs."""

    rows: tuple[TokenRow, ...]
    examples: tuple[Example, ...]

    def pairs(self) -> list[TokenPair]:
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
    """Tokenise a shard; a warning counts prompts cut, examples dropped, and text that tokens do not keep."""
    splits, found = dict[str, Split](), list[Tokenised]()
    for name in ("train", "embedding", "validation", "test"):
        examples = getattr(shard, name)
        try:
            tokens = tokenise(examples, tokenizer, max_length)
        except DataError as error:
            raise DataError(f"client {shard.client}, {name} data: {error}") from error
        splits[name] = Split(tokens.rows, tuple(examples[place] for place in tokens.places))
        found.append(tokens)
        if not tokens.rows:
            raise DataError(
                f"client {shard.client}: no {name} example fits into training.max_length = {max_length}; raise it"
            )
    warn_of_text(f"client {shard.client}", found)
    cut, dropped = sum(tokens.cut for tokens in found), sum(tokens.dropped for tokens in found)
    if cut or dropped:
        log.warning(
            "client %s: %d prompts cut to fit training.max_length = %d (from the context first, never the answer), "
            "%d examples left out because their answer alone is too long",
            shard.client,
            cut,
            max_length,
            dropped,
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
class UpdateResult:
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
        self.looks: dict[str, Looks] = {}
        """By client, in this round: `Client.losses`, `Client.last_hidden`, and embedding splits (`Method.embeds`)."""

    def update(
        self, group: Sequence[ClientData], round_: int, payloads: Mapping[str, bytes], on_step: OnStep | None = None
    ) -> dict[str, UpdateResult]:
        """Run a round at a group of clients, training them in lock-step.

        A client whose training diverges stays as it was before the round. Nothing is written before all are done, so a
        group that ran out of memory can be tried again.
        """
        started = time.perf_counter()
        reset_peak_memory(self.bank.base.device)
        self.looks = {}
        clients = [self._client(data, round_) for data in group]
        works = [
            self.method.update(
                client, self._private(client)[0], unpack(self.method.records.message, payloads[client.name])
            )
            for client in clients
        ]
        sizes = [dict[str, int]() for _ in group]
        results, steps, tokens, trained = self._in_turns(group, works, round_, on_step, sizes)
        report = {
            "seconds": (time.perf_counter() - started) / len(group),
            "seconds_training": trained / len(group),
            "group": len(group),
            "peak_memory_mib": peak_memory_mib(self.bank.base.device),
        }
        answers = {}
        for place, client in enumerate(clients):
            looks = self.looks.get(client.name, Looks())
            work = {"steps": steps[place], "forward_tokens": looks.tokens, "backward_tokens": tokens[place]}
            work["trained_parameters"] = sum(sizes[place].values())
            probed = {"probed": looks.examples} if looks.examples else {}
            answers[client.name] = self._answer(client, results[place], {**work, **report, **probed})
        return answers

    def _in_turns(
        self,
        group: Sequence[ClientData],
        works: Sequence[Work],
        round_: int,
        on_step: OnStep | None,
        sizes: Sequence[dict[str, int]],
    ) -> tuple[dict[int, tuple[Any, Any, TrainingResult] | DivergedError], list[int], list[int], float]:
        """Let each client's work go on until it asks for training, train those together, and so on to the end.

        Returns what each client's work came to, the steps each took and the tokens they read, and the seconds of
        training. Adds to each client's `sizes` how many numbers each tensor that it trains has.
        """
        results, asked = dict[int, tuple[Any, Any, TrainingResult] | DivergedError](), dict[int, TrainingRequest]()
        steps, tokens, shares, seconds, turn = [0] * len(group), [0] * len(group), [0.0] * len(group), 0.0, 0

        def go_on(place: int, outcome: TrainingResult | None) -> None:
            try:
                asked[place] = next(works[place]) if outcome is None else works[place].send(outcome)
            except StopIteration as end:
                results[place] = end.value

        for place in range(len(group)):
            go_on(place, None)
        while asked:
            begun, fits = time.perf_counter(), dict(asked)
            outcomes = self._fit(group, fits, shares, round_, turn, on_step)
            seconds, turn = seconds + time.perf_counter() - begun, turn + 1
            asked.clear()
            for place in sorted(fits):
                outcome = outcomes[place]
                sizes[place].update(fits[place].adapter.trained_sizes())
                shares[place] += fits[place].share_in(self.training.budget)
                if isinstance(outcome, DivergedError):
                    results[place] = outcome
                else:
                    steps[place] += outcome.steps
                    tokens[place] += outcome.tokens
                    go_on(place, outcome)
        return results, steps, tokens, seconds

    def _answer(
        self, client: Client, result: tuple[Any, Any, TrainingResult] | DivergedError, report: dict[str, Any]
    ) -> UpdateResult:
        """Keep what the client keeps and pack what it sends, or say why it sends nothing."""
        if not isinstance(result, DivergedError):
            name = non_finite(result[1])
            if name is not None:
                result = DivergedError(f"client {client.name}, round {client.round}: {name} of its reply is not finite")
        if isinstance(result, DivergedError):
            log.warning("%s; it is left out of this round and keeps its state", result)
            return UpdateResult(None, {**report, "failed": str(result)})
        kept, reply, trained = result
        keeps_trained = "pre_aggregation" in self.rows.values()
        private = Private(bytes_as_tensor(pack(kept)), trained.adapter if keeps_trained else None)
        write_atomic(state_path(self.folder, client.name, client.round), pack(private))
        return UpdateResult(pack(reply), {"loss": trained.loss, **report})

    def _fit(
        self,
        group: Sequence[ClientData],
        fits: Mapping[int, TrainingRequest],
        shares: Sequence[float],
        round_: int,
        turn: int,
        on_step: OnStep | None,
    ) -> dict[int, TrainingResult | DivergedError]:
        """Train some of a group, those of one kind together; read the embedding splits where the method wants it.

        `shares` are those of the round's steps that each client of the group has taken already.
        """
        training, outcomes = self.training, dict[int, TrainingResult | DivergedError]()
        rate = training.learning_rate * training.lr_decay**round_
        kinds = {place: (*one.adapter.kind(), one.tail, one.tail_weight) for place, one in fits.items()}
        for places in _by_kind(kinds):
            tasks = [
                LocalTask(group[place].info.name, fits[place], group[place].train.pairs(), rate, shares[place])
                for place in places
            ]
            found = fit(self.bank, tasks, training, seed=self.seed, round_=round_, turn=turn, on_step=on_step)
            outcomes.update(zip(places, found, strict=True))
            if self.method.embeds:
                trained = {
                    place: one for place, one in zip(places, found, strict=True) if isinstance(one, TrainingResult)
                }
                outcomes.update(self._embedded(group, trained))
        return outcomes

    def _embedded(
        self, group: Sequence[ClientData], outcomes: Mapping[int, TrainingResult]
    ) -> dict[int, TrainingResult]:
        """The outcomes of some places of a group with what their adapters make of their embedding splits."""
        if not outcomes:
            return {}
        # Loaded anew, as `fit` leaves the adapters in an order of its own.
        self.bank.load([outcome.adapter for outcome in outcomes.values()])
        rows = [group[place].embedding.pairs() for place in outcomes]
        for place, read in zip(outcomes, rows, strict=True):
            self.looks.setdefault(group[place].info.name, Looks()).add(read)
        means = embed(self.bank, rows, self.evaluation.batch_tokens)
        return {
            place: replace(outcome, embeddings=mean)
            for (place, outcome), mean in zip(outcomes.items(), means, strict=True)
        }

    def evaluate(
        self, group: Sequence[ClientData], round_: int, row: str, payloads: Mapping[str, bytes | None]
    ) -> dict[str, Scores]:
        """Loss (and scores, where they choose the best round) of the clients' present models on validation.

        `probed` and `forward_tokens` are added for clients that had to look at examples to put their model together.
        """
        adapters, self.looks = [], dict[str, Looks]()
        for data in group:
            adapters.append(self._present(data, round_, row, payloads[data.info.name]))
            if self.rows[row] == "post_aggregation":
                write_atomic(self._candidate(data, row), pack(Private({}, adapters[-1])))
        scores = self._scores(group, adapters, "validation", with_scores=self.evaluation.select == "score")
        for name, looks in self.looks.items():
            scores[name] |= {"probed": looks.examples, "forward_tokens": looks.tokens}
        return scores

    def save_best(self, data: ClientData, row: str) -> None:
        """Save the client's present model as its personal model of the best round so far."""
        adapter, target = self._last(data, row), self.folder.adapter(data.info.name, row)
        fresh = target.with_name(f".{target.name}.writing")
        self.folder.remove_adapter(fresh)
        if adapter is not None:
            save_adapter(adapter, fresh, self.bank.base.name, self.bank.base.identity)
        self.folder.remove_adapter(target)
        if adapter is not None:
            fresh.rename(target)

    def test_best(self, group: Sequence[ClientData], row: str) -> dict[str, Scores]:
        """Scores on the test splits of the personal models that were kept; the bare base where there is none."""
        folders = [self.folder.adapter(data.info.name, row) for data in group]
        base = self.bank.base
        adapters = [load_adapter(folder, base.identity) if folder.exists() else None for folder in folders]
        for adapter, folder in zip(adapters, folders, strict=True):
            if adapter is not None:
                check_fits(adapter, base.shapes, base.width, folder)
        return self._scores(group, adapters, "test", with_scores=True)

    def test_last(self, group: Sequence[ClientData], row: str) -> dict[str, Scores]:
        """Scores on the test splits of the clients' models after the last round."""
        return self._scores(group, [self._last(data, row) for data in group], "test", with_scores=True)

    def score_base(self, group: Sequence[ClientData], split: str) -> dict[str, Scores]:
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
        kinds = {place: None if one is None else one.kind() for place, one in enumerate(adapters)}
        for places in _by_kind(kinds):
            self.bank.load([adapter for place in places if (adapter := adapters[place]) is not None])
            splits: list[Split] = [getattr(group[place], split) for place in places]
            rows = [part.rows for part in splits]
            found = [{"loss": loss} for loss in losses_of(self.bank, rows, self.evaluation)]
            if with_scores:
                more = scores_of(self.bank, rows, [part.examples for part in splits], self.evaluation)
                found = [{**one, **other} for one, other in zip(found, more, strict=True)]
            scores.update(zip((group[place].info.name for place in places), found, strict=True))
        return scores

    def _client(self, data: ClientData, round_: int) -> Client:
        bank, me = self.bank, data.info.name

        def losses(adapters: Sequence[Adapter], most: int) -> list[float]:
            rows = drawn(data.embedding.pairs(), most, self.seed, "losses", me)
            found = [0.0] * len(adapters)
            for places in _by_kind({place: adapter.kind() for place, adapter in enumerate(adapters)}):
                bank.load([adapters[place] for place in places])
                self.looks.setdefault(me, Looks()).add(bank.prefixed([rows])[0], len(places))
                values = mean_losses(bank, [rows] * len(places), self.evaluation.batch_tokens)
                for place, value in zip(places, values, strict=True):
                    found[place] = value
            return found

        def last_hidden(adapter: Adapter, most: int) -> Tensor:
            prompts = [row[0] for row in drawn(data.embedding.pairs(), most, self.seed, "hidden", me)]
            self.looks.setdefault(me, Looks()).add([(prompt, (0,)) for prompt in prompts])
            bank.load([adapter])
            return bank.last_hidden([prompts]).cpu()

        base = bank.base
        return Client(data.info, base.shapes, self.seed, round_, losses, last_hidden, base.width, base.embedding_std)

    def _private(self, client: Client) -> tuple[Any, Adapter | None]:
        path = latest_state(self.folder, client.name)
        if path is None:
            return self.method.init_client_state(client), None
        try:
            private = self._stored(path)
            return unpack(self.method.records.keep, tensor_as_bytes(private.kept) or b""), private.trained
        except PayloadError as error:
            raise RunError(
                f"{path} is damaged ({error}): put it back from a copy, or remove the folder it is in; then "
                f"{client.name} begins anew without what it kept"
            ) from error

    def _stored(self, path: Path) -> Private:
        """A private state of this run; a model in it that does not fit the base is an error."""
        private = unpack(Private, inside(self.folder.path, path).read_bytes())
        if private.trained is not None:
            check_fits(private.trained, self.bank.base.shapes, self.bank.base.width, path)
        return private

    def _present(self, data: ClientData, round_: int, row: str, payload: bytes | None) -> Adapter | None:
        client = self._client(data, round_)
        kept, trained = self._private(client)
        if self.rows[row] != self.method.evaluates:
            return trained
        message = None if payload is None else unpack(self.method.records.message, payload)
        return self.method.personal(client, kept, message, trained)

    def _last(self, data: ClientData, row: str) -> Adapter | None:
        if self.rows[row] == "post_aggregation":
            path = self._candidate(data, row)
            return self._stored(path).trained if path.exists() else None
        return self._present(data, 0, row, None)

    def _candidate(self, data: ClientData, row: str) -> Path:
        return self.folder.client(data.info.name) / f"candidate-{row}.safetensors"


def _by_kind(kinds: Mapping[int, object]) -> list[list[int]]:
    """Places of what can share a bank, kind by kind; the kind None is the bare base."""
    places: dict[object, list[int]] = {}
    for place, kind in kinds.items():
        places.setdefault(kind, []).append(place)
    return list(places.values())
