"""Packed rows against the same sequences apart, on every family of architectures, and where packing is impossible."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamole.federation.settings import TrainingSettings
from fedamole.model.bank import Bank
from fedamole.model.base import Base, BaseSettings, load_base
from fedamole.model.batch import Row, collate, token_losses
from fedamole.model.packing import ATTENTION
from tests.training import alone

from .conftest import ARCHITECTURES, mixture, write_model, write_tokenizer

ROWS: list[Row] = [
    ((5, 9, 40, 33, 60, 12, 77, 8, 101, 14), (200, 31, 0)), ((5, 11), (90, 0)), ((5, 66, 67, 68, 69), (19, 20, 0)),
]
"""13, 4 and 8 tokens; the first is longer than Gemma 3's window of 8."""
EVEN: list[Row] = [((5, place, 9, 8, 7, 6, 5, 4, 3), (place, 0)) for place in range(10, 14)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [ROWS, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_rows_equal_padded_ones(
    base: Callable[..., Base], kind: str, rows: list[Row], checkpointing: bool
) -> None:
    """Two clients; losses, balance losses and gradients, in float64 (norms of Llama's family compute in float32)."""
    bank = Bank(base(kind, gradient_checkpointing=checkpointing))
    assert bank.packs
    bank.base.model.double()
    bank.load([mixture(bank.base, seed, dropout=0.2) for seed in (0, 1)])
    bank.base.training(True)
    found = []
    for packed in (True, False):
        balance: list[torch.Tensor] = []
        with bank.reading(collate([rows[:1], rows[1:]], 1, packed, seeds=[7, 8]), balance=balance) as logits:
            losses = token_losses(logits, torch.tensor([token for _, answer in rows for token in answer]))
            total = losses.mean() + torch.stack(balance).sum()
            first = torch.stack(balance[: len(bank.layers)])
            found.append([losses, first, *torch.autograd.grad(total, bank.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert bank.base.model.config._attn_implementation != ATTENTION, "put back afterwards"


def test_a_sequence_longer_than_the_window_sees_the_window_alone(base: Callable[..., Base]) -> None:
    """Without the window the packed logits would be others: the probe's sequences are too short to notice."""
    bank = Bank(base("gemma3_text"))
    logits = []
    for window in (8, 100):
        for module in bank.base.model.modules():
            if getattr(module, "sliding_window", None):
                module.sliding_window = window
        with torch.no_grad(), bank.reading(collate([ROWS[:1]], 1, packed=True)) as found:
            logits.append(found)
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)


@pytest.fixture(params=["gemma2", "mamba"])
def unpackable(request: Any, tmp_path: Path) -> Bank:
    """Gemma 2 caps its attention scores; Mamba mixes tokens without attention."""
    vocabulary = write_tokenizer(tmp_path)
    if request.param == "gemma2":
        write_model(tmp_path, "gemma2", max(vocabulary, 320))
        return Bank(load_base(BaseSettings(str(tmp_path)), torch.device("cpu"), Path("/")))
    from transformers import MambaConfig, MambaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=320, hidden_size=32, state_size=4, num_hidden_layers=2, eos_token_id=0)
        MambaForCausalLM(config).save_pretrained(tmp_path)
    settings = BaseSettings(str(tmp_path), targets=("in_proj",))
    return Bank(load_base(settings, torch.device("cpu"), Path("/")))


def test_where_packing_is_impossible_rows_are_padded(unpackable: Bank) -> None:
    """A batch of ragged rows trains as it does with the rows' gradients added up one by one."""
    bank, adapter = unpackable, mixture(unpackable.base)
    assert not bank.packs
    bank.load([adapter])
    apart = []
    for row in ROWS:
        with bank.reading(collate([[row]], 1)) as logits:
            losses = token_losses(logits, torch.tensor(row[1]))
            apart.append(torch.autograd.grad(losses.sum(), bank.parameters()))
    batch = collate([ROWS], 1)
    with bank.reading(batch) as logits:
        together = torch.autograd.grad(token_losses(logits, batch.labels).sum(), bank.parameters())
    for place, mine in enumerate(together):
        torch.testing.assert_close(mine, sum(parts[place] for parts in apart), rtol=1e-3, atol=1e-4)
    settings = TrainingSettings(local_steps=8, batch_size=3, learning_rate=1e-2)
    done = alone(bank, adapter, ROWS, settings)
    assert done.loss == pytest.approx(alone(bank, adapter, ROWS, settings).loss)
    assert any(not torch.equal(tensor, adapter.tensors[name]) for name, tensor in done.adapter.tensors.items())
