"""What goes wrong with one request fails this request alone, and the engine goes on."""

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
from fedamole.serving.decode_batch import Running
from fedamole.serving.engine import TRIES, Engine, Piece, Wanted, drawn
from fedamole.serving.scheduling import Limits

from ..model.conftest import mixture
from .test_engine import Told, by_instance, only, prompts_of, work_off

CLIENTS, STEP, LENGTH = 4, 3, 8
PROMPT = (5, 6, 7)
KINDS: dict[str, Callable[[Base], list[Adapter]]] = {
    "mixture": lambda base: [mixture(base, seed) for seed in range(CLIENTS)],
    "prompts": prompts_of,
    "by instance": by_instance,
}


@pytest.fixture
def engine(base: Callable[..., Base]) -> Callable[..., Engine]:
    def make(kind: str = "mixture", **limits: int) -> Engine:
        bank = Bank(base("llama"))
        return Engine(bank, KINDS[kind](bank.base), Limits(**limits))

    return make


def asked(client: int) -> Wanted:
    """Two draw and two take the most probable token."""
    return Wanted(client, (*PROMPT, 10 + client), LENGTH, temperature=client % 2 * 0.8, top_p=0.9, seed=client)


def alone(engine: Engine, *clients: int) -> list[str]:
    """Answers that clients get one after the other."""
    answers = [Told() for _ in clients]
    for client, told in zip(clients, answers, strict=True):
        engine.submit(asked(client), told)
        work_off(engine)
    return [told.text for told in answers]


def texts(told: list[Told], *clients: int) -> list[str]:
    return [told[client].text for client in clients]


class Watched:
    """An engine whose logits are kept, and spoiled for one client's row at one step."""

    def __init__(self, engine: Engine, victim: int, spoil: Callable[[torch.Tensor], object] | None) -> None:
        self.kept: list[dict[int, torch.Tensor]] = []
        self.told = [Told() for _ in range(CLIENTS)]
        step = engine._running.step

        def stepping(tokens: Any) -> torch.Tensor:
            logits = step(tokens)
            rows = {row.client: place for place, row in enumerate(engine._running.rows)}
            if len(self.kept) == STEP:
                if spoil is None:
                    requests[victim].leave()
                else:
                    spoil(logits[rows[victim]])
            self.kept.append({client: logits[place].clone() for client, place in rows.items() if client != victim})
            return logits

        engine._running.step = stepping  # type: ignore[method-assign]
        requests = [engine.submit(asked(client), told) for client, told in enumerate(self.told)]
        work_off(engine)


POISON: dict[str, Callable[[torch.Tensor], object]] = {
    "one is no number": lambda row: row[7].fill_(float("nan")),
    "one is infinite": lambda row: row[7].fill_(float("inf")),
    "nothing is possible": lambda row: row.fill_(-float("inf")),
    "all are no numbers": lambda row: row.fill_(float("nan")),
}


@pytest.mark.parametrize("victim", [1, 2], ids=["draws", "takes the likeliest"])
@pytest.mark.parametrize("poison", POISON)
def test_a_poisoned_row_fails_alone_and_its_neighbours_logits_stay_the_same_to_the_bit(
    engine: Callable[..., Engine], poison: str, victim: int
) -> None:
    """Compared with a row at the same place that leaves at the same step, and with each neighbour alone."""
    spoiled, left = Watched(engine(), victim, POISON[poison]), Watched(engine(), victim, None)
    others = [client for client in range(CLIENTS) if client != victim]
    assert spoiled.told[victim].finish == "error"
    assert [spoiled.told[client].finish for client in others] == ["length"] * 3
    assert len(spoiled.kept) == len(left.kept) == LENGTH - 1
    for one, other in zip(spoiled.kept, left.kept, strict=True):
        assert one.keys() == other.keys() == set(others)
        assert all(torch.equal(one[client], other[client]) for client in one)
    assert texts(spoiled.told, *others) == texts(left.told, *others) == alone(engine(), *others)


def test_numbers_that_are_not_finite_do_not_cross_to_the_rows_beside_them(base: Callable[..., Base]) -> None:
    """A model of NaN is read and stepped in one batch with others; their logits are those beside a sound model."""
    bank = Bank(base("llama"))
    sound = [mixture(bank.base, seed) for seed in range(3)]
    spoiled = {name: tensor * float("nan") for name, tensor in sound[1].tensors.items()}

    def logits(adapters: list[Adapter]) -> torch.Tensor:
        bank.load(adapters)
        running = Running[Any](bank)
        rows = Engine(bank, adapters)
        requests = [rows.submit(Wanted(client, (*PROMPT, client), 4), Told()) for client in range(3)]
        return torch.stack([running.join(requests), *(running.step([7, 8, 9]) for _ in range(3))])[:, [0, 2]]

    right = logits(sound)
    assert torch.equal(logits([sound[0], Adapter(sound[1].spec, spoiled), sound[2]]), right)
    assert right.isfinite().all()


@pytest.mark.parametrize("temperature", [3e-38, 1e-320])
def test_a_temperature_that_no_number_survives_harms_nobody_else(
    engine: Callable[..., Engine], temperature: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The server refuses it; should it get here all the same, it draws the likeliest token or fails alone."""
    here, told = engine(), [Told() for _ in range(CLIENTS)]
    for client, answer in enumerate(told):
        wanted = Wanted(client, PROMPT, 5, temperature=temperature) if client == 1 else asked(client)
        here.submit(wanted, answer)
    work_off(here)
    assert told[1].finish == ("length" if temperature == 3e-38 else "error")
    assert len(caplog.records) == (temperature != 3e-38)
    assert texts(told, 0, 2, 3) == alone(engine(), 0, 2, 3)


@pytest.mark.parametrize("temperature", [0.001, 3e-38])
def test_the_coldest_draw_takes_the_likeliest(temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    assert {drawn(torch.tensor([1e4, -1e4, 9.9e3]), temperature, 1.0, draw) for _ in range(20)} == {0}


def broken(*_: object) -> Any:
    raise ValueError("a secret of the prompt")


@pytest.mark.parametrize("where", ["decode", "draw", "tell"])
def test_an_error_over_one_request_is_one_line_and_its_own_failure(
    engine: Callable[..., Engine], where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, told = engine(), [Told() for _ in range(CLIENTS)]
    heard: Callable[[Piece], object] = told[1]
    if where == "tell":
        heard = broken
    requests = [here.submit(asked(client), heard if client == 1 else told[client]) for client in range(CLIENTS)]
    if where == "decode":
        monkeypatch.setattr(requests[1].text, "grow", broken)
    if where == "draw":
        requests[1].generator = "no generator"  # type: ignore[assignment]
    work_off(here)
    assert requests[1].gone
    assert where == "tell" or told[1].finish == "error"
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "secret" not in caplog.text
    assert "TypeError" in caplog.text if where == "draw" else "ValueError in test_faults.py:" in caplog.text
    assert texts(told, 0, 2, 3) == alone(engine(), 0, 2, 3)


def test_a_request_that_cannot_be_read_fails_alone_among_those_that_join_with_it(
    engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    here, told = engine(), [Told() for _ in range(CLIENTS)]
    for client, answer in enumerate(told):
        here.submit(Wanted(1, (10**6,), 5) if client == 1 else asked(client), answer)
    work_off(here)
    assert [answer.finish for answer in told] == ["length", "error", "length", "length"]
    assert len(caplog.records) == 1
    assert texts(told, 0, 2, 3) == alone(engine(), 0, 2, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_step_that_failed_all_go_on_where_they_were(
    engine: Callable[..., Engine], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, told = engine(kind), [Told() for _ in range(CLIENTS)]
    for client, answer in enumerate(told):
        here.submit(asked(client), answer)
    for _ in range(STEP):
        here.turn()
    monkeypatch.setattr(here._running, "step", broken)
    work_off(here)
    assert [answer.finish for answer in told] == ["length"] * CLIENTS
    assert texts(told, *range(CLIENTS)) == alone(engine(kind), *range(CLIENTS))


def test_steps_that_fail_for_ever_end_the_requests_and_not_the_engine(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, bad, good = engine(), Told(), Told()
    with monkeypatch.context() as patch:
        patch.setattr(Running, "step", broken)
        request = here.submit(Wanted(0, PROMPT, 50), bad)
        work_off(here)
    assert (bad.finish, len(request.made)) == ("error", TRIES)
    here.submit(asked(2), good)
    work_off(here)
    assert [good.text] == alone(engine(), 2)


def test_the_engines_thread_survives_an_error_of_its_own(
    engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    here, ends = engine(), [threading.Event(), threading.Event()]

    def ended(reason: str, end: threading.Event, piece: Piece) -> None:
        if piece.finish == reason:
            end.set()

    monkeypatch.setattr(here._turns, "next", broken)
    here.submit(asked(0), partial(ended, "error", ends[0]))
    here.start()
    assert ends[0].wait(10)
    here.submit(asked(0), partial(ended, "length", ends[1]))
    assert ends[1].wait(10)
    here.stop()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_was_set_aside_gets_the_same_answer(engine: Callable[..., Engine], kind: str) -> None:
    """Two places, one client's long requests in both; another's short one takes one of them at once."""
    here, long, short = engine(kind, rows=2), [Told() for _ in range(4)], Told()

    def ask(place: int, told: Told, engine: Engine) -> Any:
        return engine.submit(Wanted(1, (*PROMPT, place), 24, temperature=0.8, seed=place), told)

    requests = [ask(place, told, here) for place, told in enumerate(long)]
    for _ in range(5):
        here.turn()
    here.submit(Wanted(2, PROMPT, 3), short)
    turns = 0
    while short.finish is None:
        here.turn()
        turns += 1
        assert here.under_way <= 2
    assert turns == 2, "a turn reads it and advances it, and so does the next"
    assert not any(told.finish for told in long)
    assert 1 < len(requests[1].made) < 24, "it was set aside half way"
    work_off(here)
    lonely = engine(kind)
    for place, told in enumerate(long):
        again = Told()
        ask(place, again, lonely)
        work_off(lonely)
        assert told.text == again.text
    assert short.text == generate_answers(lonely.bank, only(2, PROMPT), 3, 10_000)[2][0]
