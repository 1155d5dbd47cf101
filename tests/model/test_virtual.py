"""Rows with virtual tokens from a client's table: the same as real tokens, by client, trained on and optimised."""

from collections.abc import Callable

import pytest
import torch

from fedamole.errors import BaseModelError
from fedamole.evaluation.likelihood import mean_losses, option_losses
from fedamole.federation.settings import TrainingSettings
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.batch import TokenPair, collate, token_losses
from fedamole.model.params import VECTORS, Adapter, new_shared
from fedamole.model.prompt import PromptSpec, new_prompt
from tests.training import alone

REAL: list[TokenPair] = [((5, 9, 40, 33), (20, 31, 0)), ((5, 66, 67), (19, 0))]
VIRTUAL_ROWS: list[TokenPair] = [((5, -1, -2, 33), (20, 31, 0)), ((-3, 66, -4), (19, 0))]
"""The same rows with virtual tokens in place of 9, 40, 5 and 67."""
REPLACED = (9, 40, 5, 67)


def lora(base: Base, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = new_shared(base.shapes, 2, generator)
    spec = AdapterSpec(2, 4.0, 0.0)
    return Adapter(spec, {key: t + 0.05 * torch.randn(t.shape, generator=generator) for key, t in tensors.items()})


def with_table(adapter: Adapter, table: torch.Tensor) -> Adapter:
    return Adapter(adapter.spec, adapter.tensors, {VECTORS: table})


def embeddings(base: Base, ids: tuple[int, ...]) -> torch.Tensor:
    """The base's own embeddings, as its embedding layer returns them before any change by its size."""
    with torch.no_grad():
        result: torch.Tensor = base.model.get_input_embeddings()(torch.tensor(ids))
    return result.float()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
def test_vectors_that_are_token_embeddings_give_the_losses_of_these_tokens(
    base: Callable[..., Base], architecture: str
) -> None:
    here = base(architecture)
    bank, table = Bank(here), embeddings(here, REPLACED)
    bank.load([lora(here)])
    expected = mean_losses(bank, [REAL], 4096), option_losses(bank, [[(REAL[0][0], ((7, 0), (8, 9, 0)))]], 4096)
    bank.load([with_table(lora(here), table)])
    assert mean_losses(bank, [VIRTUAL_ROWS], 4096) == pytest.approx(expected[0], rel=1e-5)
    (options,) = option_losses(bank, [[(VIRTUAL_ROWS[0][0], ((7, 0), (8, 9, 0)))]], 4096)
    assert options[0] == pytest.approx(expected[1][0][0], rel=1e-5)
    bank.load([with_table(lora(here), table.flip(0))])
    assert mean_losses(bank, [VIRTUAL_ROWS], 4096) != pytest.approx(expected[0], rel=1e-3)


@pytest.mark.parametrize("architecture", ["llama"])
def test_each_client_has_its_own_table(base: Callable[..., Base], architecture: str) -> None:
    """Two clients, tables of four and of two vectors: each row is what it is alone."""
    here = base(architecture)
    bank, short = Bank(here), embeddings(here, (70, 71))
    first, second = with_table(lora(here), embeddings(here, REPLACED)), with_table(lora(here, 1), short)
    rows: list[list[TokenPair]] = [VIRTUAL_ROWS, [((5, -2, -1), (19, 0))]]
    bank.load([first, second])
    together = mean_losses(bank, rows, 4096)
    separate = []
    for adapter, own in ((first, rows[0]), (second, rows[1])):
        bank.load([adapter])
        separate += mean_losses(bank, [own], 4096)
    assert together == pytest.approx(separate, rel=1e-5)
    bank.load([first, second])
    bank.select_clients(1, 2)
    with torch.no_grad(), bank.forward(collate([rows[1]], here.pad_id, True)) as logits:
        assert logits.shape[0] == 2
    bank.load([])
    assert bank.prompt_layer.tables is None


@pytest.mark.parametrize("architecture", ["llama"])
def test_a_lora_is_trained_on_virtual_rows_and_the_table_stays(base: Callable[..., Base], architecture: str) -> None:
    here = base(architecture)
    table = embeddings(here, REPLACED)
    before, adapter = table.clone(), with_table(lora(here), table)
    settings = TrainingSettings(local_steps=3, batch_size=2, learning_rate=0.01)
    bank = Bank(here)
    virtual, real = (alone(bank, it, rows, settings) for it, rows in ((adapter, VIRTUAL_ROWS), (lora(here), REAL)))
    assert torch.equal(table, before)
    assert virtual.adapter.fixed == {}, "the vectors belong to the rows, not to the model"
    for name, tensor in real.adapter.tensors.items():
        torch.testing.assert_close(virtual.adapter.tensors[name], tensor, rtol=1e-4, atol=1e-5)
    assert virtual.loss == pytest.approx(real.loss, rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama"])
def test_a_table_is_optimised_under_a_frozen_lora(base: Callable[..., Base], architecture: str) -> None:
    """The gradient is that of finite differences, and a step along it lowers the loss."""
    here = base(architecture)
    bank, table = Bank(here), embeddings(here, REPLACED).unsqueeze(0)
    bank.load([lora(here)])
    batch = collate([VIRTUAL_ROWS], here.pad_id, bank.packs)

    def loss(values: torch.Tensor) -> torch.Tensor:
        with bank.virtual_vectors(values), bank.forward(batch) as logits:
            return token_losses(logits, batch.labels).mean()

    table.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(table), table)
    direction = torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        slope = (loss(table + 1e-3 * direction) - loss(table - 1e-3 * direction)) / 2e-3
        assert float(slope) == pytest.approx(float((gradient * direction).sum()), rel=0.02)
        assert loss(table - 0.1 * gradient) < loss(table)
    assert bank.prompt_layer.tables is None


@pytest.mark.parametrize("architecture", ["llama"])
def test_tables_that_do_not_fit_are_refused(base: Callable[..., Base], architecture: str) -> None:
    here = base(architecture)
    with pytest.raises(BaseModelError, match="its virtual tokens must have"):
        Bank(here).load([with_table(lora(here), torch.zeros(4, here.width + 1))])
    spec = PromptSpec(2)
    prompt = Adapter(spec, new_prompt(spec, here.width, 0.3, torch.Generator()), {VECTORS: torch.zeros(4, here.width)})
    with pytest.raises(ValueError, match="soft prompt cannot read"):
        Bank(here).load([prompt])
