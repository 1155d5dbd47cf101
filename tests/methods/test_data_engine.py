"""The data engine: what a client reviews, has written, keeps and sends, by hand and on real text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.bundled_rounds import BundledRounds
from tests.methods.by_hand import full
from typing_extensions import override

from fedamole.deployment.security.policy import PolicyError, PolicySettings, refuse_small_update, row_checks
from fedamole.errors import ConfigError
from fedamole.evaluation.generation import Sampler
from fedamole.evaluation.likelihood import mean_losses
from fedamole.federation.client_data import Split
from fedamole.federation.data_engine import DataEngine, Measure, Review, WriteRequest
from fedamole.federation.method import BaseInfo, Client, ClientInfo, TrainingRequest, TrainingResult
from fedamole.federation.probe import DryProbe, ProbeCounts
from fedamole.federation.record import pack, unpack
from fedamole.federation.written_rows import ModelWriter, TextWriter
from fedamole.methods.data_engine import DataEngineMethod, GeneratedRows
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.batch import TokenPair
from fedamole.model.params import Adapter
from fedamole.synthesis.written import ANSWER

SHAPES = {"m": (2, 2)}
A, B = "m/shared/A", "m/shared/B"
REVIEW = Review({"a": 0.5, "b": 0.25, "c": 0.0}, {"a": (3, 1), "b": (2, 0), "c": (5, 4)})


@dataclass
class Recorded(DataEngine):
    """A data engine with a given review, which writes one row of each category that has a share."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    @override
    def review(self, adapter: Adapter, measure: Measure, max_examples: int) -> Review:
        self.calls.append((adapter.tensors, measure, max_examples))
        return REVIEW

    @override
    def write(self, request: WriteRequest) -> list[TokenPair]:
        assert request.review is REVIEW
        shares, known = dict(request.shares), tuple(request.known)
        self.calls.append((request.adapter, shares, known, request.max_new_tokens, request.temperature))
        return [((10 + ord(name), len(known)), (shares[name],)) for name in shares if shares[name]]


def both(value: float) -> dict[str, torch.Tensor]:
    return {A: full(value, 1, 2), B: full(-value, 2, 1)}


def updated(
    method: DataEngineMethod, round_: int, kept: Sequence[TokenPair] = (), examples: int = 10
) -> tuple[Recorded, TrainingRequest, GeneratedRows, SharedTensors]:
    """A client that is sent 2 and trains it to 3: its engine, its request, what it keeps and sends."""
    engine, base = Recorded(), BaseInfo(SHAPES, 2)
    client = Client(ClientInfo("x", examples), base, 0, round_, DryProbe(SHAPES, 2), data_engine=lambda: engine)
    work = method.update(client, GeneratedRows.of(kept), SharedTensors(both(2.0)))
    request = next(work)
    assert isinstance(request, TrainingRequest)
    with pytest.raises(StopIteration) as end:
        work.send(TrainingResult(replace(request.adapter, tensors=both(3.0)), 4, 0.5))
    client_state, reply, _ = end.value.value
    return engine, request, client_state, reply


A_ROW, B_ROW = ((107, 0), (20,)), ((108, 0), (10,))


def test_the_worst_category_gets_most_rows_and_they_are_trained_on() -> None:
    """Errors 0.5, 0.25, 0 and 30 rows: 20, 10, 0."""
    engine, request, client_state, reply = updated(DataEngineMethod(rank=1, generate_every=1, probe_examples=9), 0)
    (tensors, measure, most), (adapter, shares, known, tokens, temperature) = engine.calls
    assert torch.equal(tensors[A], full(2.0, 1, 2)), "the LoRA that it was sent"
    assert (measure, most) == ("error", 9)
    assert torch.equal(adapter.tensors[A], full(2.0, 1, 2))
    assert (shares, known, tokens, temperature) == ({"a": 20, "b": 10, "c": 0}, (), 128, 0.7)
    assert request.extra is not None
    assert request.extra.rows == client_state.rows() == (A_ROW, B_ROW)
    assert request.own_rows
    assert request.step_fraction == 1
    assert set(reply.tensors) == {A, B}
    assert torch.equal(reply.tensors[A], full(3.0, 1, 2))


def test_rows_are_written_every_few_rounds_and_kept_between() -> None:
    method = DataEngineMethod(rank=1, generate_every=3)
    for round_ in (0, 1, 3, 4):
        engine, request, client_state, _ = updated(method, round_)
        assert not engine.calls
        assert request.extra is None
        assert client_state.rows() == ()
        _, request, client_state, _ = updated(method, round_, [A_ROW])
        assert request.extra is not None
        assert request.extra.rows == client_state.rows() == (A_ROW,)
    for round_ in (2, 5):
        engine, _, client_state, _ = updated(method, round_, [A_ROW])
        assert engine.calls[1][2] == (A_ROW,)
        assert client_state.rows() == (A_ROW, ((107, 1), (20,)), ((108, 1), (10,)))


def test_the_newest_rows_are_kept_up_to_a_multiple_of_the_training_rows() -> None:
    old = [((1,), (2,)), ((3, 4, 5), (6, 7))]
    for ratio, examples, count in ((0.3, 10, 3), (2.0, 1, 2), (0.1, 9, 0)):
        method = DataEngineMethod(rank=1, generate_every=1, max_ratio=ratio)
        _, request, client_state, _ = updated(method, 0, old, examples)
        expected = (*old, ((107, 2), (20,)), ((108, 2), (10,)))[4 - count :]
        assert client_state.rows() == expected
        assert (request.extra is None) == (count == 0)


def test_the_base_may_write_and_shares_may_be_even_or_by_loss() -> None:
    engine, *_ = updated(DataEngineMethod(rank=1, generate_every=1, writer="base", allotment="even"), 0)
    assert engine.calls[0][1] == "error"
    assert engine.calls[1][:2] == (None, {"a": 10, "b": 10, "c": 10})
    engine, *_ = updated(DataEngineMethod(rank=1, generate_every=1, allotment="loss"), 0)
    assert engine.calls[0][1] == "loss"


def test_rows_survive_as_token_ids() -> None:
    for rows in ((), (((1, 2, 3), (4,)),), (((1,), (2, 3)), ((70_000,), (5,)))):
        assert unpack(GeneratedRows, pack(GeneratedRows.of(rows))).rows() == rows


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("generate_every", 0),
        ("new_rows", 0),
        ("probe_examples", 0),
        ("max_row_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("max_ratio", 0.0),
        ("max_ratio", float("nan")),
    ],
)
def test_wrong_values_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.{key} = {value}: must be "):
        DataEngineMethod(**{key: value})  # type: ignore[arg-type]


def test_a_policy_counts_own_rows_alone(runs: Any) -> None:
    """5 steps of batches of 8 read 40 rows, of which 20 are the client's own if there are as many generated ones."""
    for ratio, own in ((1.0, 20), (3.0, 10)):
        config = runs.load(
            "data_engine", "training.local_steps=5", "training.batch_size=8", f"method.max_ratio={ratio}"
        )
        rows = {"train": 1000, "embedding": 30, "validation": 30, "test": 30}
        by_setting = {check.setting: check for check in row_checks(config, rows, PolicySettings())}
        check = by_setting["different training rows that a round reads"]
        assert (check.requested, check.passes) == (str(own), own >= 20)
        refused = pytest.raises(PolicyError, match="at most 10 different") if own < 20 else nullcontext()
        with refused:
            refuse_small_update(config, 5, 1000, PolicySettings())


# --- on the bundled base --------------------------------------------------------------------------------------

NAME, WEAK = "hospital_north", "high"


class RowsOfCategories(TextWriter):
    """A deterministic generator: rows of the client's own task that were taken out of its training rows, in turn."""

    def __init__(self, rows: Mapping[str, Sequence[str]]) -> None:
        self.rows, self.given = rows, Counter[str]()

    @override
    def write(
        self, adapter: Adapter | None, texts: Sequence[str], max_new_tokens: int, sampler: Sampler | None
    ) -> tuple[list[str], int]:
        written = []
        for text in texts:
            category = text.partition("category ")[2].partition(".")[0]
            written.append(self.rows[category][self.given[category] % len(self.rows[category])])
            self.given[category] += 1
        return written, 0


def taken(split: Split, indices: Sequence[int]) -> Split:
    return Split(tuple(split.rows[i] for i in indices), tuple(split.examples[i] for i in indices))


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> tuple[BundledRounds, dict[str, list[str]]]:
    """A client with two letters of high urgency and more of the others, and the rows that it does not have.

    Its errors are computed on its embedding and validation rows, and models are scored on its test rows.
    """
    bundled = BundledRounds(tmp_path_factory.mktemp("rounds"), (NAME,))
    data, own, others = bundled.prepared.clients[NAME], list[int](), dict[str, list[str]]()
    for label in ("low", "medium", "high"):
        of_label = [i for i, example in enumerate(data.train.examples) if example.answer == label]
        count = 2 if label == WEAK else 12
        own += of_label[:count]
        rest = taken(data.train, of_label[count:]).examples
        others[label] = [f"{example.prompt.strip()}{ANSWER}{label}\n" for example in rest]
    held = (data.embedding, data.validation)
    embedding = Split(*(sum((getattr(split, name) for split in held), ()) for name in ("rows", "examples")))
    train = taken(data.train, sorted(own))
    bundled.data[NAME] = replace(data, info=ClientInfo(NAME, len(own)), train=train, embedding=embedding)
    return bundled, others


def grown(bundled: tuple[BundledRounds, dict[str, list[str]]], allotment: str, seed: int) -> tuple[float, Counter[str]]:
    """The loss of the weak category on test after four rounds with rows after the third, and the rows given."""
    rounds, others = bundled
    rounds.writer = writer = RowsOfCategories(others)
    settings = ["method.generate_every=3", "method.new_rows=9", "training.local_steps=25"]
    state, _ = rounds.train("data_engine", *settings, f"method.allotment={allotment}", f"run.seed={seed}", rounds=4)
    rounds.bank.load([Adapter(rounds.config("data_engine", 1).method.spec(), state.tensors)])
    test = rounds.prepared.clients[NAME].test
    rows = [(row.prompt, row.answer) for row, it in zip(test.rows, test.examples, strict=True) if it.answer == WEAK]
    return mean_losses(rounds.bank, [rows], 4096)[0], writer.given


def test_the_weakest_category_gets_most_rows_and_its_loss_falls_more_than_with_even_shares(bundled: Any) -> None:
    (by_error, given), (even, evenly) = (grown(bundled, allotment, 0) for allotment in ("error", "even"))
    print(f"loss of the weak category: {by_error:.3f} by error {given}, {even:.3f} evenly {evenly}")
    assert given[WEAK] > given["low"] + given["medium"]
    assert evenly == {"low": 3, "medium": 3, "high": 3}
    assert by_error < 0.75 * even


@pytest.mark.long
def test_the_loss_falls_more_over_three_seeds(bundled: Any) -> None:
    by_error, even = (
        sum(grown(bundled, allotment, seed)[0] for seed in range(3)) / 3 for allotment in ("error", "even")
    )
    print(f"mean loss of the weak category over three seeds: {by_error:.3f} by error, {even:.3f} evenly")
    assert by_error < 0.75 * even


@pytest.mark.long
def test_a_real_model_writes_after_the_requests(tmp_path: Path) -> None:
    """The path with a real model runs. The bundled base writes texts, but is too small to write rows that are kept."""
    bundled = BundledRounds(tmp_path, (NAME,))
    model, written, tokens = ModelWriter(bundled.bank, 4096), list[str](), list[int]()

    class Recording(TextWriter):
        @override
        def write(
            self, adapter: Adapter | None, texts: Sequence[str], max_new_tokens: int, sampler: Sampler | None
        ) -> tuple[list[str], int]:
            continued, read = model.write(adapter, texts, max_new_tokens, sampler)
            written.extend(continued)
            tokens.append(read)
            return continued, read

    bundled.writer = Recording()
    settings = ("method.generate_every=1", "method.new_rows=6", "method.allotment=loss", "training.local_steps=60")
    _, engine = bundled.train("data_engine", *settings, rounds=3)
    client = engine.worker.factory.client(bundled.prepared.clients[NAME], 3, ProbeCounts())
    rows = engine.worker.states.load(client).client_state.rows()
    print(f"{len(rows)} of {len(written)} rows are kept; the first text is {written[0]!r}, the last {written[-1]!r}")
    assert len(tokens) == 3
    assert 6 <= len(written) <= 18
    assert all(written)
    assert all(read > 100 for read in tokens)
    labels = {row.answer for row in bundled.prepared.clients[NAME].train.rows}
    assert all(answer in labels for _, answer in rows)


# --- what is sent ---------------------------------------------------------------------------------------------


def test_no_generated_row_is_in_a_message_and_the_traffic_is_that_of_fedit(bundled: Any) -> None:
    rounds, others = bundled
    rounds.writer = RowsOfCategories(others)
    sent: list[SharedTensors] = []
    settings = ("method.generate_every=1", "method.new_rows=9", "training.local_steps=2")

    def record(replies: dict[str, Any]) -> dict[str, Any]:
        sent.append(replies[NAME])
        return replies

    _, engine = rounds.train("data_engine", *settings, rounds=2, changed=record, after_round=sent.append)
    client = engine.worker.factory.client(rounds.data[NAME], 2, ProbeCounts())
    rows = engine.worker.states.load(client).client_state.rows()
    assert len(rows) > 5, "there are rows that could be sent"
    fedit = pack(rounds.train("fedit", "training.local_steps=2", rounds=1)[0])
    for record_ in sent:
        payload = pack(record_)
        assert len(payload) == len(fedit)
        assert {name: it.shape for name, it in record_.tensors.items()} == {
            name: it.shape for name, it in unpack(SharedTensors, fedit).tensors.items()
        }
        assert all(it.is_floating_point() for it in record_.tensors.values())
        for prompt, _ in rows:
            assert torch.tensor(prompt, dtype=torch.long).numpy().tobytes() not in payload
