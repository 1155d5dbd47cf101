"""FLoRA and FedEx-LoRA: after any round a client's base plus adapter is exactly the weighted mean of the products."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.by_hand import client, driven

from fedamole.federation.method import ClientInfo, Server
from fedamole.methods.fedex_lora import FedExLora
from fedamole.methods.flora import Flora
from fedamole.model.params import delta_key

SHAPES = {"m": (3, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30))
SERVER = Server(SHAPES, INFOS, seed=0)
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
    state, kept = method.init(SERVER), {info.name: method.first_keep(client(SHAPES, info.name)) for info in INFOS}
    total = torch.zeros(2, 3)
    for round_ in range(2):
        replies = {}
        for place, info in enumerate(INFOS):
            me = client(SHAPES, info.name, round_)
            work = method.update(me, kept[info.name], method.message(state, info))
            trained = draw(10 * round_ + place)
            (asked,), (kept[info.name], replies[info.name], _) = driven(work, trained)
            if kind is Flora:
                assert not asked.adapter.tensors[B].any(), "a fresh LoRA on top"
                torch.testing.assert_close(asked.adapter.fixed[delta_key("m")], total)
        mean = sum(w * product(draw(10 * round_ + place)) for place, w in enumerate(weights))
        total = total + 2 * mean if kind is Flora else 2 * mean
        before = state
        state = method.aggregate(replace(SERVER, round=round_), state, replies)
        for info in INFOS:
            me, message = client(SHAPES, info.name, round_), method.message(state, info)
            model = method.personal(me, kept[info.name], message, None)
            assert model is not None
            if kind is FedExLora and round_:  # the residual of round 0 stays in the base beneath
                old = method.personal(me, kept[info.name], method.message(before, info), None)
                residual = old.fixed[delta_key("m")]
            else:
                residual = torch.zeros(2, 3)
            whole = model.fixed[delta_key("m")] + 2 * product(dict(model.tensors))
            torch.testing.assert_close(whole, total + residual)


def test_flora_takes_ranks_of_their_own() -> None:
    method = Flora(rank=2, alpha=8.0, ranks=(1, 3))
    state = method.init(SERVER)
    nothing = method.first_keep(client(SHAPES))
    asked = [next(method.update(client(SHAPES, info.name), nothing, method.message(state, info))) for info in INFOS]
    assert [len(one.adapter.tensors[A]) for one in asked] == [1, 3]
    assert {one.adapter.spec.scaling for one in asked} == {4.0}
    assert method.ranks == (1, 3)


def test_every_client_draws_its_own_lora_each_round() -> None:
    method = Flora(rank=1)
    state, kept = method.init(SERVER), method.first_keep(client(SHAPES))
    message = method.message(state, INFOS[0])
    clients = [client(SHAPES, name, round_) for name in "ab" for round_ in (0, 1)]
    drawn = [method.adapter(one, kept, message).tensors[A] for one in clients]
    assert len({tuple(tensor.flatten().tolist()) for tensor in drawn}) == 4
