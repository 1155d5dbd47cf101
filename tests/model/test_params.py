"""Names of tensors, and the stacks that the layer reads."""

import math

import torch

from fedamole.model.params import (
    Adapter,
    expert_ids,
    expert_keys,
    new_pool,
    new_shared,
    router_key,
    shared_keys,
    stack,
    unstack,
)
from fedamole.model.amole import AdapterSpec

SHAPES = {"layer.q": (6, 4), "layer.v": (6, 2)}


def pool(experts: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    return new_pool(SHAPES, 2, experts, torch.Generator().manual_seed(seed))


def test_names():
    assert expert_keys("layer.q", 7) == ("layer.q/expert-07/A", "layer.q/expert-07/B")
    assert expert_keys("layer.q", 123)[0] == "layer.q/expert-123/A"
    assert router_key("layer.q") == "layer.q/router/W"
    assert shared_keys("layer.q") == ("layer.q/shared/A", "layer.q/shared/B")


def test_expert_ids_are_numbers_in_order_by_module():
    names = [*expert_keys("b", 100), *expert_keys("b", 20), *shared_keys("b"), *shared_keys("a")]
    assert expert_ids(names) == {"a": [], "b": [20, 100]}


def test_stack_puts_router_first_and_shared_last():
    tensors = pool()
    down, up = stack(tensors, "layer.q", [2, 0])
    assert down.shape == (4 * 2, 6)
    assert up.shape == (3 * 2, 4)
    assert torch.equal(down[:2], tensors["layer.q/router/W"])
    assert torch.equal(down[2:4], tensors["layer.q/expert-02/A"])
    assert torch.equal(down[-2:], tensors["layer.q/shared/A"])
    assert torch.equal(up[-2:], tensors["layer.q/shared/B"].T)


def test_a_plain_lora_stacks_without_a_router():
    down, up = stack(new_shared(SHAPES, 2, torch.Generator()), "layer.v", [])
    assert down.shape == (2, 6)
    assert up.shape == (2, 2)


def test_unstack_inverts_stack_with_copies():
    tensors = pool()
    down, up = stack(tensors, "layer.q", [0, 2])
    back = unstack(down, up, "layer.q", [0, 2], rank=2)
    assert set(back) == {name for name in tensors if name.startswith("layer.q/") and "expert-01" not in name}
    assert all(torch.equal(back[name], tensors[name]) for name in back)
    down.zero_()
    assert back["layer.q/router/W"].any()


def test_fresh_experts_each_have_their_own_draw_and_do_nothing_yet():
    tensors = pool()
    names = [name for name in tensors if name.endswith(("/A", "/W"))]
    assert all(tensors[name].abs().max() <= 1 / math.sqrt(6) for name in names)
    assert len({tuple(tensors[name].flatten().tolist()) for name in names}) == len(names)
    assert not any(tensors[name].any() for name in tensors if name.endswith("/B"))
    assert all(torch.equal(value, pool()[name]) for name, value in tensors.items())
    assert not torch.equal(pool(seed=1)["layer.q/router/W"], tensors["layer.q/router/W"])


def test_adapter_counts_its_numbers():
    """One module of 6 x 4 at rank 2 with 1 expert: W 12, two A of 12, two B of 8: 52."""
    tensors = {name: value for name, value in pool(1).items() if name.startswith("layer.q/")}
    adapter = Adapter(AdapterSpec(rank=2), tensors)
    assert adapter.parameters() == 52
    assert adapter.modules() == ["layer.q"]
