"""Named tensors: key names, stacking and its inverse, fresh draws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedamole.model.amole import AdapterSpec
from fedamole.model.params import Adapter, expert_ids, expert_keys, new_pool, new_shared, router_key, stack, unstack

SHAPES = {"b.q": (6, 4), "a.v": (9, 3)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_names() -> None:
    """A name is the module, who owns the tensor, and which of the owner's tensors it is."""
    assert router_key("layers.0.q") == "layers.0.q/router/W"
    assert expert_keys("q", 7) == ("q/expert-07/A", "q/expert-07/B")
    assert expert_keys("q", 123) == ("q/expert-123/A", "q/expert-123/B")
    pool = new_pool({"q": (2, 2)}, 1, 1, generator())
    assert sorted(pool) == ["q/expert-00/A", "q/expert-00/B", "q/router/W", "q/shared/A", "q/shared/B"]


def test_expert_ids_are_sorted_as_numbers() -> None:
    """As text, expert-100 would come before expert-99; a module without domain experts is there, with none."""
    names = [key for i in (100, 99, 3, 1234) for key in expert_keys("q", i)]
    assert expert_ids([*names, "p/shared/A", "p/shared/B"]) == {"p": [], "q": [3, 99, 100, 1234]}


def test_stack_is_router_experts_shared() -> None:
    """Rank 1, d_in = 2, d_out = 3: rows of `down` are W_t, A_5, A_101, A_s; rows of `up` are B^T without W_t's."""
    tensors = {
        "q/router/W": torch.tensor([[1.0, 2.0]]),
        "q/expert-05/A": torch.tensor([[3.0, 4.0]]),
        "q/expert-05/B": torch.tensor([[1.0], [2.0], [3.0]]),
        "q/expert-101/A": torch.tensor([[5.0, 6.0]]),
        "q/expert-101/B": torch.tensor([[4.0], [5.0], [6.0]]),
        "q/shared/A": torch.tensor([[7.0, 8.0]]),
        "q/shared/B": torch.tensor([[7.0], [8.0], [9.0]]),
    }
    down, up = stack(tensors, "q", [5, 101])
    assert down.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert up.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 300), unique=True, max_size=6), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7))
def test_stack_and_unstack_invert_each_other(ids: list[int], rank: int, d_in: int, d_out: int) -> None:
    ids = sorted(ids)
    n = len(ids)
    down = torch.randn((n + 2 if n else 1) * rank, d_in)
    up = torch.randn((n + 1) * rank, d_out)
    tensors = unstack(down, up, "m.x", ids, rank)
    assert expert_ids(tensors) == {"m.x": ids}
    again = stack(tensors, "m.x", ids)
    assert torch.equal(again[0], down)
    assert torch.equal(again[1], up)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    expected = {rank * d_in, rank * d_out}
    assert {tensor.numel() for tensor in tensors.values()} <= expected


def test_unstacked_tensors_share_no_memory() -> None:
    down, up = torch.zeros(4, 3), torch.zeros(3, 2)
    tensors = unstack(down, up, "q", [0, 1], 1)
    for tensor in tensors.values():
        tensor += 1
    assert not down.any()
    assert not up.any()
    assert all(bool((tensor == 1).all()) for tensor in tensors.values())


def test_fresh_pool_draws() -> None:
    """B is zero; A and W_t lie within 1/sqrt(d_in) (Kaiming-uniform with a = sqrt 5, as in LoRA), close to it, and
    no two are the same."""
    pool = new_pool({"b.q": (400, 5), "a.v": (100, 5)}, rank=8, experts=3, generator=generator())
    draws = []
    for name, tensor in pool.items():
        if name.endswith("/B"):
            assert not tensor.any()
            assert tensor.shape == (5, 8)
            continue
        d_in = 400 if name.startswith("b.q") else 100
        assert tensor.shape == (8, d_in)
        assert 0.98 / math.sqrt(d_in) < tensor.abs().max() <= 1 / math.sqrt(d_in)
        assert tensor.mean().abs() < 0.1 / math.sqrt(d_in)
        draws.append(tensor.flatten()[:50])
    assert len(draws) == 2 * (1 + 1 + 3)
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


def test_same_generator_same_pool_whatever_the_order_of_the_modules() -> None:
    pool = new_pool(SHAPES, 2, 3, generator(4))
    two = new_pool(dict(reversed(SHAPES.items())), 2, 3, generator(4))
    assert pool.keys() == two.keys()
    assert all(torch.equal(pool[name], two[name]) for name in pool)
    other = new_pool(SHAPES, 2, 3, generator(5))
    assert not torch.equal(pool["a.v/shared/A"], other["a.v/shared/A"])


def test_a_larger_pool_keeps_what_a_smaller_one_draws_first() -> None:
    """Shared experts never depend on the pool's size; nor, for a single module, do the experts (an id names a draw)."""
    few, many = new_pool(SHAPES, 2, 2, generator()), new_pool(SHAPES, 2, 5, generator())
    shared = new_shared(SHAPES, 2, generator())
    assert all(torch.equal(shared[name], few[name]) and torch.equal(shared[name], many[name]) for name in shared)
    few, many = new_pool({"q": (4, 3)}, 2, 2, generator()), new_pool({"q": (4, 3)}, 2, 5, generator())
    assert all(torch.equal(few[name], many[name]) for name in few)
    assert len(many) == len(few) + 3 * 2


def test_no_draw_comes_from_or_moves_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    new_pool(SHAPES, 2, 3, generator())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("experts", [0, 2])
def test_adapter_counts_and_modules(experts: int) -> None:
    """Rank 2 on linears of 6 x 4 and 9 x 3: an expert has 2 (6 + 4 + 9 + 3) = 44 numbers, W_t 2 (6 + 9) = 30."""
    pool = new_pool(SHAPES, 2, experts, generator()) if experts else new_shared(SHAPES, 2, generator())
    adapter = Adapter(AdapterSpec(), pool)
    assert adapter.modules() == ["a.v", "b.q"]
    assert adapter.parameters() == 44 * (experts + 1) + (30 if experts else 0)
