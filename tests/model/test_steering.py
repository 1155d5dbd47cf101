"""Steering a LoRA: the encoder by hand, its symmetries, and the scaled LoRA."""

from collections.abc import Callable

import pytest
import torch

from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.params import Adapter, new_shared
from fedamole.model.steering import (
    SCALES,
    SteeredAdapter,
    condition,
    example_states,
    new_encoder,
    rank_scales,
    steered,
)

SHAPES = {"a": (3, 4), "b": (3, 2)}
HAND = {
    "steering/input": torch.tensor([[1.0, 0.0]]),
    "steering/attention": torch.tensor([[0.3], [0.7], [2.0]]),
    "steering/output": torch.tensor([[0.5]]),
    "steering/hidden": torch.tensor([[0.5]]),
    "steering/condition": torch.tensor([[1.0]]),
    SCALES: torch.tensor([[1.0], [-2.0]]),
}


def test_the_encoder_by_hand() -> None:
    """The difference (3, 1) is normalised to (1, -1). Input and value are 1 and 2: 1 + 0.5 * 2 = 2, tanh(1) = 0.7616.

    Two equal examples sum to 4: tanh(2) = 0.9640. The scales are 1 + z and 1 - 2 z.
    """
    example = torch.tensor([[[5.0, 1.0], [2.0, 0.0]]])
    assert float(condition(HAND, example, 1)) == pytest.approx(0.7616, abs=1e-4)
    assert float(condition(HAND, example.repeat(2, 1, 1), 1)) == pytest.approx(0.9640, abs=1e-4)
    assert rank_scales(HAND, example, 1, 2).tolist() == [pytest.approx([1.7616, -0.5232], abs=1e-3)]


@pytest.fixture
def encoder() -> dict[str, torch.Tensor]:
    return new_encoder(SHAPES, 6, 2, 8, torch.Generator().manual_seed(0))


def test_the_order_of_the_examples_does_not_matter(encoder: dict[str, torch.Tensor]) -> None:
    states = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(1))
    z = condition(encoder, states, 4)
    assert z.shape == (8,)
    torch.testing.assert_close(condition(encoder, states[[2, 0, 3, 1]], 4), z)
    assert (condition(encoder, states[:3], 4) - z).abs().max() > 1e-3
    assert (condition(encoder, states, 2) - z).abs().max() > 1e-5, "the examples attend to each other, by head"


def test_opposite_preferences_have_opposite_vectors(encoder: dict[str, torch.Tensor]) -> None:
    states = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(1))
    z = condition(encoder, states, 2)
    assert z.abs().max() > 1e-2
    torch.testing.assert_close(condition(encoder, states.flip(1), 2), -z)


def test_without_examples_the_lora_is_itself(encoder: dict[str, torch.Tensor]) -> None:
    scales = rank_scales(encoder, torch.empty(0, 2, 6), 2, 2)
    assert torch.equal(scales, torch.ones(2, 2))
    lora = new_shared(SHAPES, 2, torch.Generator().manual_seed(0))
    assert all(torch.equal(tensor, lora[name]) for name, tensor in steered(lora, scales).items())


def test_a_steered_lora_scales_its_ranks() -> None:
    """Module a: scales 2 and -1; module b: 0 and 1."""
    g = torch.Generator().manual_seed(0)
    lora = {name: torch.randn(t.shape, generator=g) for name, t in new_shared(SHAPES, 2, g).items()}
    result = steered(lora, torch.tensor([[2.0, -1.0], [0.0, 1.0]]))
    x = torch.randn(3, generator=g)
    expected = lora["a/shared/B"] @ (torch.tensor([2.0, -1.0]) * (lora["a/shared/A"] @ x))
    torch.testing.assert_close(result["a/shared/B"] @ result["a/shared/A"] @ x, expected)
    expected = lora["b/shared/B"][:, 1] * (lora["b/shared/A"] @ x)[1]
    torch.testing.assert_close(result["b/shared/B"] @ result["b/shared/A"] @ x, expected)


def test_the_encoder_counts_among_the_trained_parameters(encoder: dict[str, torch.Tensor]) -> None:
    adapter = SteeredAdapter(AdapterSpec(2), new_shared(SHAPES, 2, torch.Generator()), encoder=encoder)
    plain = Adapter(adapter.spec, adapter.tensors)
    assert adapter.parameters() - plain.parameters() == sum(tensor.numel() for tensor in encoder.values()) > 0


def test_examples_are_read_by_the_untuned_base(base: Callable[..., Base]) -> None:
    """The states follow both answers of a pair; after a single answer there is no second one."""
    bank = Bank(base("llama"))
    rows = [((3, 4), ((5, 6), (7,))), ((8,), ((9, 2, 1), (5,)))]
    states, tokens = example_states(bank, rows)
    assert states.shape == (2, 2, bank.base.width)
    assert tokens == 4 + 3 + 4 + 2 + 4, "and one for each sequence, which the pass over prompts adds"
    single = bank.last_hidden([[(8, 5)]])
    torch.testing.assert_close(states[1, 1], single[0], rtol=1e-4, atol=1e-4)
    lora = new_shared(bank.base.shapes, 2, torch.Generator().manual_seed(0))
    bank.load([Adapter(AdapterSpec(2, dropout=0.0), {name: t + 0.1 for name, t in lora.items()})])
    torch.testing.assert_close(example_states(bank, rows)[0], states)
    assert (bank.last_hidden([[(8, 5)]])[0] - single[0]).abs().max() > 1e-3
    answers, _ = example_states(bank, [((3, 4), (5, 6))])
    torch.testing.assert_close(answers[0, 0], states[0, 0], rtol=1e-4, atol=1e-4)
    assert not answers[0, 1].any()
