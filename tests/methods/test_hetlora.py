"""HetLoRA: pruning by the tail's norm, and an average weighted by the norms of the products."""

from typing import Any

import pytest
import torch
from tests.methods.by_hand import client, driven
from tests.training import lora_spec

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server, TrainingRequest
from fedamole.federation.penalties import TailNorm
from fedamole.federation.record import Nothing
from fedamole.methods.flexlora import RankedLora
from fedamole.methods.hetlora import HetLora, tail_norm
from fedamole.methods.shared.averaging import SharedTensors

SHAPES = {"m": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
A, B = "m/shared/A", "m/shared/B"


def lora(*sizes: float) -> SharedTensors:
    """A LoRA whose ranks have these sizes: each a row (s, 0) of A and a column (s, 0) of B."""
    a = torch.tensor([[size, 0.0] for size in sizes])
    return SharedTensors({A: a, B: a.T.contiguous()})


def test_the_average_is_weighted_by_the_norms_and_padded_with_zeros() -> None:
    """Products of norm 3 and 1: weights 3/4 and 1/4. The second rank is 3/4 of the first client's alone."""
    first = SharedTensors({A: torch.tensor([[1.0, 0.0], [0.0, 2.0]]), B: torch.tensor([[3.0, 0.0], [0.0, 0.0]])})
    second = SharedTensors({A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[1.0], [0.0]])})
    state = RankedLora({A: torch.full((2, 2), 9.0), B: torch.full((2, 2), 9.0)}, {"a": 2, "b": 1})
    after = HetLora().aggregate(SERVER, state, {"b": second, "a": first})
    assert after.tensors[A].tolist() == [[1.0, 0.0], [0.0, 1.5]]
    assert after.tensors[B].tolist() == [[2.5, 0.0], [0.0, 0.0]]
    assert after.ranks == {"a": 2, "b": 1}


def test_without_any_product_clients_count_alike() -> None:
    parts = {
        name: SharedTensors({A: torch.full((1, 2), size), B: torch.zeros(2, 1)})
        for name, size in (("a", 1.0), ("b", 3.0))
    }
    state = RankedLora({A: torch.zeros(1, 2), B: torch.zeros(2, 1)}, {"a": 1, "b": 1})
    assert HetLora().aggregate(SERVER, state, parts).tensors[A].tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize(("tail", "rank"), [(0.9, 2), (1.0, 3), (1.1, 3)])
def test_a_tail_that_became_smaller_is_dropped(tail: float, rank: int) -> None:
    """Rank 3, gamma 0.99: the tail is the last rank. Of size 1 before, it goes when it ends below 1."""
    message, after = lora(2.0, 1.5, 1.0), lora(2.0, 1.5, tail)
    assert tail_norm(message.tensors, SHAPES, 2) == pytest.approx(1.0)
    method = HetLora(rank=3, tail_weight=0.25)
    (request,), (_, reply, trained) = driven(method.update(client(SHAPES), Nothing(), message), after.tensors)
    assert request.penalty == TailNorm(2, 0.25)
    assert len(reply.tensors[A]) == reply.tensors[B].shape[1] == rank
    assert trained.adapter.spec.rank == rank
    assert trained.adapter.spec.scaling == method.spec().scaling
    assert method.aggregate(SERVER, RankedLora(message.tensors, {"a": 3, "b": 3}), {"a": reply}).ranks["a"] == rank


def test_one_rank_is_never_pruned() -> None:
    (request,), (_, reply, _) = driven(HetLora(rank=1).update(client(SHAPES), Nothing(), lora(2.0)), lora(0.1).tensors)
    assert request.penalty is None
    assert len(reply.tensors[A]) == 1


@pytest.mark.parametrize("wrong", [{"tail_weight": -1.0}, {"pruned_to": 1.0}, {"pruned_to": 0.0}])
def test_values_that_cannot_prune_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"method.tail_weight = .* method.pruned_to = "):
        HetLora(**dict[str, Any](wrong))


@pytest.mark.parametrize(
    ("rank", "pruned_to", "tail"),
    [(2, 0.99, 1), (4, 0.99, 3), (4, 0.5, 2), (5, 0.5, 2), (8, 0.7, 5), (2, 0.1, 1), (200, 0.99, 198)],
)
def test_the_tail_is_that_of_the_clients_own_rank(rank: int, pruned_to: float, tail: int) -> None:
    """gamma r_k, rounded down, but at least one rank is kept; the method's own rank is 16."""
    method, message = HetLora(rank=16, pruned_to=pruned_to), lora(*[1.0] * rank)
    (request,), (_, reply, _) = driven(method.update(client(SHAPES), Nothing(), message), lora(*[0.5] * rank).tensors)
    assert request == TrainingRequest(request.adapter, penalty=TailNorm(tail, 0.001))
    assert request.adapter.frozen == ()
    assert reply.tensors[A].tolist() == [[0.5, 0.0]] * tail, "the trained ranks before the tail"
    assert reply.tensors[B].tolist() == [[0.5] * tail, [0.0] * tail]


def two(first: float, second: float) -> SharedTensors:
    """Two modules of rank 2 whose last ranks have these norms: |A[1:]| = 5 times |B[:, 1:]| = a fifth of it."""
    tensors = {}
    for module, size in (("m", first), ("n", second)):
        tensors[f"{module}/shared/A"] = torch.tensor([[9.0, 9.0], [3.0, 4.0]])
        tensors[f"{module}/shared/B"] = torch.tensor([[9.0, 0.0], [9.0, size / 5]])
    return SharedTensors(tensors)


@pytest.mark.parametrize(("after", "rank"), [((12.0, 2.0), 1), ((2.0, 19.0), 2), ((7.9, 8.0), 1), ((8.1, 8.0), 2)])
def test_all_modules_are_pruned_together(after: tuple[float, float], rank: int) -> None:
    """The tail's norms were 10 and 6, 16 together, and it counts what they are together."""
    shapes, message = {"m": (2, 2), "n": (2, 2)}, two(10.0, 6.0)
    assert tail_norm(message.tensors, shapes, 1) == pytest.approx(16.0)
    _, (_, reply, _) = driven(HetLora(rank=2).update(client(shapes), Nothing(), message), two(*after).tensors)
    assert {len(reply.tensors[f"{module}/shared/A"]) for module in shapes} == {rank}


def test_the_weight_is_the_norm_of_all_products_together() -> None:
    """a: two ranks that cancel in part, [[3, 0], [4, 0]] and 12 in the other module: 13. b: 39, three times that."""
    server = Server(BaseInfo({"m": (2, 2), "n": (1, 1)}), INFOS, seed=0)
    first = {A: torch.tensor([[1.0, 0.0], [1.0, 0.0]]), B: torch.tensor([[5.0, -2.0], [4.0, 0.0]])}
    first |= {"n/shared/A": torch.tensor([[12.0], [0.0]]), "n/shared/B": torch.tensor([[1.0, 0.0]])}
    second = {A: torch.tensor([[5.0, 0.0]]), B: torch.tensor([[0.0], [0.0]])}
    second |= {"n/shared/A": torch.tensor([[39.0]]), "n/shared/B": torch.tensor([[1.0]])}
    before = {name: torch.full_like(tensor, 50.0) for name, tensor in first.items()}
    state = RankedLora(before, {"a": 2, "b": 2, "c": 4})
    after = HetLora().aggregate(server, state, {"a": SharedTensors(first), "b": SharedTensors(second)})
    assert after.tensors[A].tolist() == [[4.0, 0.0], [0.25, 0.0]]
    assert after.tensors[B].tolist() == [[1.25, -0.5], [1.0, 0.0]]
    assert after.tensors["n/shared/A"].tolist() == [[32.25], [0.0]]
    assert after.ranks == {"a": 2, "b": 1, "c": 4}, "b has pruned, c is absent"


def test_each_client_is_sent_its_ranks_and_scored_on_them() -> None:
    method, state = HetLora(rank=4, alpha=8.0), RankedLora(lora(3.0, 2.0, 1.0).tensors, {"a": 1, "b": 3})
    assert HetLora(rank=4).init(SERVER).ranks == {"a": 2, "b": 4}
    assert HetLora(ranks=(3,)).init(SERVER).ranks == {"a": 3, "b": 3}
    for info, rank in zip(INFOS, (1, 3), strict=True):
        model = method.personal(client(SHAPES), Nothing(), method.message(state, info), None)
        assert model is not None
        assert model.tensors[A][:, 0].tolist() == [3.0, 2.0, 1.0][:rank]
        assert (lora_spec(model.spec).rank, lora_spec(model.spec).scaling) == (rank, 2.0)
