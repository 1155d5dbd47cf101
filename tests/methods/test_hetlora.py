"""HetLoRA: pruning by the tail's norm, and an average weighted by the norms of the products."""

import pytest
import torch
from tests.methods.by_hand import client, driven

from fedamole.errors import ConfigError
from fedamole.federation.method import ClientInfo, Server
from fedamole.federation.record import Nothing
from fedamole.methods.fedit import GlobalLora
from fedamole.methods.flexlora import RankedLora
from fedamole.methods.hetlora import HetLora, tail_norm

SHAPES = {"m": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30))
SERVER = Server(SHAPES, INFOS, seed=0)
A, B = "m/shared/A", "m/shared/B"


def lora(*sizes: float) -> GlobalLora:
    """A LoRA whose ranks have these sizes: each a row (s, 0) of A and a column (s, 0) of B."""
    a = torch.tensor([[size, 0.0] for size in sizes])
    return GlobalLora({A: a, B: a.T.contiguous()})


def test_the_average_is_weighted_by_the_norms_and_padded_with_zeros() -> None:
    """Products of norm 3 and 1: weights 3/4 and 1/4. The second rank is 3/4 of the first client's alone."""
    first = GlobalLora({A: torch.tensor([[1.0, 0.0], [0.0, 2.0]]), B: torch.tensor([[3.0, 0.0], [0.0, 0.0]])})
    second = GlobalLora({A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[1.0], [0.0]])})
    state = RankedLora({A: torch.full((2, 2), 9.0), B: torch.full((2, 2), 9.0)}, {"a": 2, "b": 1})
    after = HetLora().aggregate(SERVER, state, {"b": second, "a": first})
    assert after.tensors[A].tolist() == [[1.0, 0.0], [0.0, 1.5]]
    assert after.tensors[B].tolist() == [[2.5, 0.0], [0.0, 0.0]]
    assert after.ranks == {"a": 2, "b": 1}


def test_without_any_product_clients_count_alike() -> None:
    parts = {name: GlobalLora({A: torch.full((1, 2), size), B: torch.zeros(2, 1)})
             for name, size in (("a", 1.0), ("b", 3.0))}
    state = RankedLora({A: torch.zeros(1, 2), B: torch.zeros(2, 1)}, {"a": 1, "b": 1})
    assert HetLora().aggregate(SERVER, state, parts).tensors[A].tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize(("tail", "rank"), [(0.9, 2), (1.0, 3), (1.1, 3)])
def test_a_tail_that_became_smaller_is_dropped(tail: float, rank: int) -> None:
    """Rank 3, gamma 0.99: the tail is the last rank. Of size 1 before, it goes when it ends below 1."""
    message, after = lora(2.0, 1.5, 1.0), lora(2.0, 1.5, tail)
    assert tail_norm(message.tensors, SHAPES, 2) == pytest.approx(1.0)
    method = HetLora(rank=3, tail_weight=0.25)
    (asked,), (_, reply, trained) = driven(method.update(client(SHAPES), Nothing(), message), after.tensors)
    assert (asked.tail, asked.tail_weight) == (2, 0.25)
    assert len(reply.tensors[A]) == reply.tensors[B].shape[1] == rank
    assert trained.adapter.spec.rank == rank
    assert trained.adapter.spec.scaling == method.spec().scaling
    assert method.aggregate(SERVER, RankedLora(message.tensors, {"a": 3, "b": 3}), {"a": reply}).ranks["a"] == rank


def test_one_rank_is_never_pruned() -> None:
    (asked,), (_, reply, _) = driven(HetLora(rank=1).update(client(SHAPES), Nothing(), lora(2.0)), lora(0.1).tensors)
    assert asked.tail_weight == 0.0
    assert len(reply.tensors[A]) == 1


@pytest.mark.parametrize("wrong", [{"tail_weight": -1.0}, {"pruned_to": 1.0}, {"pruned_to": 0.0}])
def test_values_that_cannot_prune_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"method.tail_weight = .* method.pruned_to = "):
        HetLora(**wrong)
