"""FLoRA and FedEx-LoRA: after any round a client's base plus adapter is exactly the weighted mean of the products."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.methods.by_hand import client, driven
from tests.training import lora_spec

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server, TrainingRequest
from fedamole.methods.fedex_lora import FedExLora
from fedamole.methods.flora import Flora, FreshLora, Stack
from fedamole.methods.shared.stacks import Changes, Merged
from fedamole.model.params import delta_key

SHAPES = {"m": (3, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
A, B = "m/shared/A", "m/shared/B"


def draw(seed: int, rank: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {A: torch.randn(rank, 3, generator=generator), B: torch.randn(2, rank, generator=generator)}


def product(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors[B] @ tensors[A]


@pytest.mark.parametrize(("weighting", "weights"), [("uniform", (0.5, 0.5)), ("examples", (0.25, 0.75))])
@pytest.mark.parametrize("kind", [Flora, FedExLora])
def test_two_rounds_are_exact(kind: Any, weighting: Any, weights: tuple[float, float]) -> None:
    """alpha / rank = 2. FLoRA adds up the means of all rounds; FedEx-LoRA's last round is the mean of its products, and
    its adapters go on from the averaged factors.
    """
    method = kind(rank=1, alpha=2.0, weighting=weighting)
    state, client_state = (
        method.init(SERVER),
        {info.name: method.init_client_state(client(SHAPES, info.name)) for info in INFOS},
    )
    total = torch.zeros(2, 3)
    for round_ in range(2):
        replies = {}
        for index, info in enumerate(INFOS):
            me = client(SHAPES, info.name, round_)
            work = method.update(me, client_state[info.name], method.message(state, info))
            trained = draw(10 * round_ + index)
            (request,), (client_state[info.name], replies[info.name], _) = driven(work, trained)
            if kind is Flora:
                assert not request.adapter.tensors[B].any(), "a fresh LoRA on top"
                torch.testing.assert_close(request.adapter.fixed[delta_key("m")], total)
        mean = torch.stack([w * product(draw(10 * round_ + index)) for index, w in enumerate(weights)]).sum(0)
        total = total + 2 * mean if kind is Flora else 2 * mean
        before = state
        state = method.aggregate(replace(SERVER, round=round_), state, replies)
        for info in INFOS:
            me, message = client(SHAPES, info.name, round_), method.message(state, info)
            model = method.personal(me, client_state[info.name], message, None)
            assert model is not None
            if kind is FedExLora and round_:  # the residual of round 0 stays in the base beneath
                old = method.personal(me, client_state[info.name], method.message(before, info), None)
                residual = old.fixed[delta_key("m")]
            else:
                residual = torch.zeros(2, 3)
            change = model.fixed[delta_key("m")] + 2 * product(dict(model.tensors))
            torch.testing.assert_close(change, total + residual)


def test_flora_takes_ranks_of_their_own() -> None:
    method = Flora(rank=2, alpha=8.0, ranks=(1, 3))
    state = method.init(SERVER)
    nothing = method.init_client_state(client(SHAPES))
    requests = [next(method.update(client(SHAPES, info.name), nothing, method.message(state, info))) for info in INFOS]
    assert [len(request.adapter.tensors[A]) for request in requests] == [1, 3]
    assert {lora_spec(request.adapter.spec).scaling for request in requests} == {4.0}
    assert method.ranks == (1, 3)


def test_every_client_draws_its_own_lora_each_round() -> None:
    method = Flora(rank=1)
    state, client_state = method.init(SERVER), method.init_client_state(client(SHAPES))
    message = method.message(state, INFOS[0])
    clients = [client(SHAPES, name, round_) for name in "ab" for round_ in (0, 1)]
    drawn = [method.adapter(client_, client_state, message).tensors[A] for client_ in clients]
    assert len({tuple(tensor.flatten().tolist()) for tensor in drawn}) == 4


# --- FLoRA by hand, and with clients missing --------------------------------------------------------------------

TWO = Server(BaseInfo({"m": (2, 2)}), INFOS, seed=0)
THREE = Server(BaseInfo({"m": (3, 2), "n": (2, 4)}), (*INFOS, ClientInfo("c", 20)), seed=0)


@pytest.mark.parametrize(
    ("weighting", "answered", "change"),
    [
        # a's product is [[1, 0], [2, 0]], b's [[0, 3], [0, 0]]; the scaling is 2.
        ("uniform", "ab", [[1.0, 3.0], [2.0, 0.0]]),
        ("examples", "ab", [[0.5, 4.5], [1.0, 0.0]]),  # a quarter and three quarters
        ("uniform", "b", [[0.0, 6.0], [0.0, 0.0]]),
        ("examples", "a", [[2.0, 0.0], [4.0, 0.0]]),
    ],
)
def test_the_change_by_hand(weighting: Any, answered: str, change: list[list[float]]) -> None:
    loras = {
        "b": {A: torch.tensor([[0.0, 3.0]]), B: torch.tensor([[1.0], [0.0]])},
        "a": {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[1.0], [2.0]])},
    }
    method = Flora(rank=1, alpha=2.0, weighting=weighting)
    replies = {name: FreshLora(tensors, 0) for name, tensors in loras.items() if name in answered}
    state = method.aggregate(TWO, method.init(TWO), replies)
    assert state.log.changes.factors["0"]["m"]["A"].shape == (len(answered), 2), "stacked, not averaged"
    for info in INFOS:
        me, client_state = client(TWO.shapes, info.name), Merged.nothing(TWO.shapes)
        model = method.personal(me, client_state, method.message(state, info), None)
        assert model is not None
        assert model.fixed[delta_key("m")].tolist() == change
        assert not model.tensors[B].any(), "the base with all changes, and nothing on top"
        assert not client_state.deltas[delta_key("m")].any(), "a look keeps nothing"


def test_a_fresh_lora_is_trained_on_what_was_merged_and_sent() -> None:
    """Of two changes one is merged already, into 5; the other is [1 2]^T [1 1]."""
    factors = {
        "0": {"m": {"A": torch.ones(1, 2), "B": torch.full((2, 1), 100.0)}},
        "1": {"m": {"A": torch.ones(1, 2), "B": torch.tensor([[1.0], [2.0]])}},
    }
    client_state = Merged({delta_key("m"): torch.full((2, 2), 5.0)}, 1)
    work = Flora(rank=3).update(client(TWO.shapes, round_=4), client_state, Stack(Changes(factors, 2), 3))
    (request,), (after, reply, _) = driven(work, {B: torch.ones(2, 3)})
    assert request.adapter.fixed[delta_key("m")].tolist() == [[6.0, 6.0], [7.0, 7.0]]
    assert request == TrainingRequest(request.adapter), "a whole round's steps, and nothing else"
    assert request.adapter.frozen == ()
    assert set(request.adapter.tensors) == {A, B}
    assert after.deltas[delta_key("m")].tolist() == [[6.0, 6.0], [7.0, 7.0]]
    assert after.count == reply.merged == 2
    assert torch.equal(reply.tensors[A], request.adapter.tensors[A])
    assert torch.equal(reply.tensors[B], torch.ones(2, 3))


COHORT = st.sets(st.sampled_from("abc"), min_size=1)


def of_ranks(server: Server, rank: int, seed: int) -> dict[str, torch.Tensor]:
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for module, (d_in, d_out) in server.shapes.items():
        tensors[f"{module}/shared/A"] = torch.randn(rank, d_in, generator=generator)
        tensors[f"{module}/shared/B"] = torch.randn(d_out, rank, generator=generator)
    return tensors


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(COHORT, st.sets(st.sampled_from("abc"))), max_size=6), st.sampled_from(["uniform", "examples"])
)
def test_every_clients_change_is_the_sum_of_the_weighted_means(
    rounds: list[tuple[set[str], set[str]]], weighting: Any
) -> None:
    """In each round a cohort trains; some of its answers are lost, though those clients have merged what they were
    sent. Merged and pending, every client has the dense sum of the weighted means of the scaled products.
    """
    method = Flora(rank=2, alpha=3.0, ranks=(1, 3, 2), weighting=weighting)
    state, client_state = method.init(THREE), {name: Merged.nothing(THREE.shapes) for name in "abc"}
    weights = THREE.weights(weighting)
    expected = {module: torch.zeros(d_out, d_in, dtype=torch.float64) for module, (d_in, d_out) in THREE.shapes.items()}
    for number, (cohort, lost) in enumerate(rounds):
        answers = {}
        for info in THREE.clients:
            if info.name in cohort:
                message = method.message(state, info)
                numbers = [int(number) for number in message.changes.factors]
                assert min(numbers, default=99) >= state.log.merged.get(info.name, 0), "known to be merged, not sent"
                trained = of_ranks(THREE, state.ranks[info.name], 10 * number + ord(info.name))
                work = method.update(client(THREE.shapes, info.name, number), client_state[info.name], message)
                _, (client_state[info.name], reply, _) = driven(work, trained)
                answers.update({} if info.name in lost else {info.name: reply})
        if answers:
            state = method.aggregate(THREE, state, answers)
            total = sum(weights[name] for name in answers)
            for module in expected:
                for name, reply in answers.items():
                    a, b = (reply.tensors[f"{module}/shared/{factor}"].double() for factor in "AB")
                    expected[module] += 1.5 * weights[name] / total * b @ a
        for info in THREE.clients:
            adapter = method.adapter(
                client(THREE.shapes, info.name), client_state[info.name], method.message(state, info)
            )
            for module, change in expected.items():
                result = adapter.fixed[delta_key(module)].double()
                torch.testing.assert_close(result, change, rtol=1e-5, atol=1e-4)


def test_what_everybody_has_merged_is_sent_and_kept_no_more() -> None:
    """All three answer each round, having merged all changes but the one of the round itself."""
    method = Flora(rank=1)
    state, client_state = method.init(THREE), {name: Merged.nothing(THREE.shapes) for name in "abc"}
    for number in range(3):
        replies = {}
        for info in THREE.clients:
            me, message = client(THREE.shapes, info.name, number), method.message(state, info)
            _, (client_state[info.name], replies[info.name], _) = driven(
                method.update(me, client_state[info.name], message), {}
            )
        state = method.aggregate(THREE, state, replies)
        assert set(state.log.changes.factors) == {str(number)}
        assert state.log.merged == dict.fromkeys("abc", number)


def test_ranks_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.ranks = \[4, 0\]: ranks must be at least 1"):
        Flora(ranks=(4, 0)).init(SERVER)
    with pytest.raises(ConfigError, match="rank = 0"):
        Flora(rank=0)
