"""An error in one request fails this request only, and the engine continues."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from fedamole.evaluation.generation import generate_answers
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.params import Adapter
from fedamole.serving.decode_batch import DecodeBatch
from fedamole.serving.engine import MAX_FAILED_STEPS, InferenceEngine
from fedamole.serving.requests import Chunk, GenerationRequest
from fedamole.serving.sampling import sample_token
from fedamole.serving.scheduling import Limits

from ..model.conftest import mixture
from .test_engine import Received, by_instance, only, prompts_of, run_steps

CLIENTS, STEP, LENGTH = 4, 3, 8
PROMPT = (5, 6, 7)
KINDS: dict[str, Callable[[Base], list[Adapter]]] = {
    "mixture": lambda base: [mixture(base, seed) for seed in range(CLIENTS)],
    "prompts": prompts_of,
    "by instance": by_instance,
}


@pytest.fixture
def engine(base: Callable[..., Base]) -> Callable[..., InferenceEngine]:
    def make(kind: str = "mixture", **limits: int) -> InferenceEngine:
        bank = Bank(base("llama"))
        return InferenceEngine(bank, KINDS[kind](bank.base), Limits(**limits))

    return make


def request_of(client: int) -> GenerationRequest:
    """Two clients sample, and two use greedy decoding."""
    return GenerationRequest(
        client, (*PROMPT, 10 + client), LENGTH, temperature=client % 2 * 0.8, top_p=0.9, seed=client
    )


def alone(engine: InferenceEngine, *clients: int) -> list[str]:
    """Answers of clients whose requests run one after the other."""
    answers = [Received() for _ in clients]
    for client, received in zip(clients, answers, strict=True):
        engine.submit(request_of(client), received)
        run_steps(engine)
    return [received.text for received in answers]


def texts(received: list[Received], *clients: int) -> list[str]:
    return [received[client].text for client in clients]


class RecordedRun:
    """Runs an engine, records its logits, and corrupts the row of one client at one step."""

    def __init__(self, engine: InferenceEngine, victim: int, corrupt: Callable[[torch.Tensor], object] | None) -> None:
        self.logits: list[dict[int, torch.Tensor]] = []
        self.received = [Received() for _ in range(CLIENTS)]
        step = engine._batch.step

        def stepping(tokens: Any) -> torch.Tensor:
            logits = step(tokens)
            rows = {row.client: index for index, row in enumerate(engine._batch.rows)}
            if len(self.logits) == STEP:
                if corrupt is None:
                    requests[victim].cancel()
                else:
                    corrupt(logits[rows[victim]])
            self.logits.append({client: logits[index].clone() for client, index in rows.items() if client != victim})
            return logits

        engine._batch.step = stepping  # type: ignore[method-assign]
        requests = [engine.submit(request_of(client), received) for client, received in enumerate(self.received)]
        run_steps(engine)


POISON: dict[str, Callable[[torch.Tensor], object]] = {
    "one NaN": lambda row: row[7].fill_(float("nan")),
    "one infinity": lambda row: row[7].fill_(float("inf")),
    "all -infinity": lambda row: row.fill_(-float("inf")),
    "all NaN": lambda row: row.fill_(float("nan")),
}


@pytest.mark.parametrize("victim", [1, 2], ids=["samples", "greedy"])
@pytest.mark.parametrize("poison", POISON)
def test_a_poisoned_row_fails_alone_and_its_neighbours_logits_stay_the_same_to_the_bit(
    engine: Callable[..., InferenceEngine], poison: str, victim: int
) -> None:
    """Compared with a run in which the row is cancelled at the same step, and with each client alone."""
    corrupted, cancelled = RecordedRun(engine(), victim, POISON[poison]), RecordedRun(engine(), victim, None)
    others = [client for client in range(CLIENTS) if client != victim]
    assert corrupted.received[victim].finish == "error"
    assert [corrupted.received[client].finish for client in others] == ["length"] * 3
    assert len(corrupted.logits) == len(cancelled.logits) == LENGTH - 1
    for item, other in zip(corrupted.logits, cancelled.logits, strict=True):
        assert item.keys() == other.keys() == set(others)
        assert all(torch.equal(item[client], other[client]) for client in item)
    assert texts(corrupted.received, *others) == texts(cancelled.received, *others) == alone(engine(), *others)


def test_numbers_that_are_not_finite_do_not_cross_to_the_rows_beside_them(base: Callable[..., Base]) -> None:
    """A model of NaN is in one batch with others, whose logits are the same as beside a valid model."""
    bank = Bank(base("llama"))
    sound = [mixture(bank.base, seed) for seed in range(3)]
    corrupted = {name: tensor * float("nan") for name, tensor in sound[1].tensors.items()}

    def logits(adapters: list[Adapter]) -> torch.Tensor:
        bank.load(adapters)
        running = DecodeBatch[Any](bank)
        rows = InferenceEngine(bank, adapters)
        requests = [rows.submit(GenerationRequest(client, (*PROMPT, client), 4), Received()) for client in range(3)]
        return torch.stack([running.join(requests), *(running.step([7, 8, 9]) for _ in range(3))])[:, [0, 2]]

    right = logits(sound)
    assert torch.equal(logits([sound[0], Adapter(sound[1].spec, corrupted), sound[2]]), right)
    assert right.isfinite().all()


@pytest.mark.parametrize("temperature", [3e-38, 1e-320])
def test_an_extremely_low_temperature_does_not_affect_other_requests(
    engine: Callable[..., InferenceEngine], temperature: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The server refuses such values; the engine uses the most probable token, or fails this request only."""
    tested, received = engine(), [Received() for _ in range(CLIENTS)]
    for client, answer in enumerate(received):
        generation = (
            GenerationRequest(client, PROMPT, 5, temperature=temperature) if client == 1 else request_of(client)
        )
        tested.submit(generation, answer)
    run_steps(tested)
    assert received[1].finish == ("length" if temperature == 3e-38 else "error")
    assert len(caplog.records) == (temperature != 3e-38)
    assert texts(received, 0, 2, 3) == alone(engine(), 0, 2, 3)


@pytest.mark.parametrize("temperature", [0.001, 3e-38])
def test_the_coldest_draw_takes_the_likeliest(temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    assert {sample_token(torch.tensor([1e4, -1e4, 9.9e3]), temperature, 1.0, draw) for _ in range(20)} == {0}


def broken(*_: object) -> Any:
    raise ValueError("a secret of the prompt")


@pytest.mark.parametrize("where", ["decode", "sample", "on_chunk"])
def test_an_error_over_one_request_is_one_line_and_its_own_failure(
    engine: Callable[..., InferenceEngine],
    where: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tested, received = engine(), [Received() for _ in range(CLIENTS)]
    on_chunk: Callable[[Chunk], object] = received[1]
    if where == "on_chunk":
        on_chunk = broken
    requests = [
        tested.submit(request_of(client), on_chunk if client == 1 else received[client]) for client in range(CLIENTS)
    ]
    if where == "decode":
        monkeypatch.setattr(requests[1].text, "update", broken)
    if where == "sample":
        requests[1].generator = "no generator"  # type: ignore[assignment]
    run_steps(tested)
    assert requests[1].closed
    assert where == "on_chunk" or received[1].finish == "error"
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "secret" not in caplog.text
    assert "TypeError" in caplog.text if where == "sample" else "ValueError in test_faults.py:" in caplog.text
    assert texts(received, 0, 2, 3) == alone(engine(), 0, 2, 3)


def test_a_request_that_cannot_be_read_fails_alone_among_those_that_join_with_it(
    engine: Callable[..., InferenceEngine], caplog: pytest.LogCaptureFixture
) -> None:
    tested, received = engine(), [Received() for _ in range(CLIENTS)]
    for client, answer in enumerate(received):
        tested.submit(GenerationRequest(1, (10**6,), 5) if client == 1 else request_of(client), answer)
    run_steps(tested)
    assert [answer.finish for answer in received] == ["length", "error", "length", "length"]
    assert len(caplog.records) == 1
    assert texts(received, 0, 2, 3) == alone(engine(), 0, 2, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_step_that_failed_all_go_on_where_they_were(
    engine: Callable[..., InferenceEngine], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested, received = engine(kind), [Received() for _ in range(CLIENTS)]
    for client, answer in enumerate(received):
        tested.submit(request_of(client), answer)
    for _ in range(STEP):
        tested.step()
    monkeypatch.setattr(tested._batch, "step", broken)
    run_steps(tested)
    assert [answer.finish for answer in received] == ["length"] * CLIENTS
    assert texts(received, *range(CLIENTS)) == alone(engine(kind), *range(CLIENTS))


def test_steps_that_fail_for_ever_end_the_requests_and_not_the_engine(
    engine: Callable[..., InferenceEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    tested, bad, good = engine(), Received(), Received()
    with monkeypatch.context() as patch:
        patch.setattr(DecodeBatch, "step", broken)
        request = tested.submit(GenerationRequest(0, PROMPT, 50), bad)
        run_steps(tested)
    assert (bad.finish, len(request.generated)) == ("error", MAX_FAILED_STEPS)
    tested.submit(request_of(2), good)
    run_steps(tested)
    assert [good.text] == alone(engine(), 2)


def test_the_engines_thread_survives_an_error_of_its_own(
    engine: Callable[..., InferenceEngine], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    tested, ends = engine(), [threading.Event(), threading.Event()]

    def read_to_end(reason: str, end: threading.Event, chunk: Chunk) -> None:
        if chunk.finish == reason:
            end.set()

    monkeypatch.setattr(tested._queue, "schedule", broken)
    tested.submit(request_of(0), partial(read_to_end, "error", ends[0]))
    tested.start()
    assert ends[0].wait(10)
    tested.submit(request_of(0), partial(read_to_end, "length", ends[1]))
    assert ends[1].wait(10)
    tested.stop()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_was_set_aside_gets_the_same_answer(engine: Callable[..., InferenceEngine], kind: str) -> None:
    """Two places, one client's long requests in both; another's short one takes one of them at once."""
    tested, long, short = engine(kind, max_rows=2), [Received() for _ in range(4)], Received()

    def submit(seed: int, received: Received, engine: InferenceEngine) -> Any:
        return engine.submit(GenerationRequest(1, (*PROMPT, seed), 24, temperature=0.8, seed=seed), received)

    requests = [submit(seed, received, tested) for seed, received in enumerate(long)]
    for _ in range(5):
        tested.step()
    tested.submit(GenerationRequest(2, PROMPT, 3), short)
    turns = 0
    while short.finish is None:
        tested.step()
        turns += 1
        assert tested.running <= 2
    assert turns == 2, "a turn reads it and advances it, and so does the next"
    assert not any(received.finish for received in long)
    assert 1 < len(requests[1].generated) < 24, "it was set aside half way"
    run_steps(tested)
    single = engine(kind)
    for seed, received in enumerate(long):
        again = Received()
        submit(seed, again, single)
        run_steps(single)
        assert received.text == again.text
    assert short.text == generate_answers(single.bank, only(2, PROMPT), 3, 10_000)[2][0]
