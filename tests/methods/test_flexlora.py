"""FlexLoRA: the mean of the products, decomposed, each client at its own rank."""

import pytest
import torch
from tests.methods.by_hand import client

from fedamole.errors import ConfigError
from fedamole.federation.method import ClientInfo, Server
from fedamole.federation.record import Nothing
from fedamole.methods.fedit import GlobalLora
from fedamole.methods.flexlora import FlexLora, cut

SHAPES = {"m": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SERVER = Server(SHAPES, INFOS, seed=0)
A, B = "m/shared/A", "m/shared/B"


def test_the_mean_of_the_products_is_decomposed() -> None:
    """Products diag(4, 0) and [[0, 0], [0, 2]]: their mean is diag(2, 1), and its best rank 1 is diag(2, 0)."""
    method = FlexLora(rank=1, ranks=(1, 2))
    state = method.init(SERVER)
    one = GlobalLora({A: torch.tensor([[2.0, 0.0]]), B: torch.tensor([[2.0], [0.0]])})
    other = GlobalLora({A: torch.tensor([[0.0, 1.0], [0.0, 0.0]]), B: torch.tensor([[0.0, 5.0], [2.0, 5.0]])})
    after = method.aggregate(SERVER, state, {"a": one, "b": other})
    torch.testing.assert_close(after.tensors[B] @ after.tensors[A], torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    small = method.message(after, INFOS[0]).tensors
    torch.testing.assert_close(small[B] @ small[A], torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(small[A].norm(), torch.tensor(1.0))  # A = V^T, the size is in B
    assert len(method.message(after, INFOS[1]).tensors[A]) == 2


def test_by_examples() -> None:
    """10 and 30 examples: a quarter of 4 and three quarters of 8."""
    method = FlexLora(rank=1, ranks=(1,), weighting="examples")
    parts = {
        name: GlobalLora({A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[size], [0.0]])})
        for name, size in (("a", 4.0), ("b", 8.0))
    }
    after = method.aggregate(SERVER, method.init(SERVER), parts)
    assert float((after.tensors[B] @ after.tensors[A])[0, 0]) == pytest.approx(7.0)


def test_ranks_go_round_and_the_scaling_is_one() -> None:
    method = FlexLora(rank=4, alpha=8.0)
    state = method.init(SERVER)
    assert state.ranks == {"a": 2, "b": 4, "c": 8}
    specs = [method.adapter(client(SHAPES), Nothing(), method.message(state, info)).spec for info in INFOS]
    assert [spec.rank for spec in specs] == [2, 4, 8]
    assert {spec.scaling for spec in specs} == {2.0}
    assert not state.tensors[B].any()
    with pytest.raises(ConfigError, match=r"method.ranks = \[0, 2\]: ranks must be at least 1"):
        FlexLora(ranks=(0, 2)).init(SERVER)


def test_cut_takes_the_first_ranks() -> None:
    whole = {A: torch.arange(6.0).view(3, 2), B: torch.arange(6.0).view(2, 3)}
    part = cut(whole, 2)
    assert part[A].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert part[B].tolist() == [[0.0, 1.0], [3.0, 4.0]]
