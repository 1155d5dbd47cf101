"""Packed rows against the same sequences apart, on every family of architectures, and where packing is impossible."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamole.federation.local import LocalTask, fit
from fedamole.federation.method import TrainingRequest, TrainingResult
from fedamole.federation.settings import TrainingSettings
from fedamole.model.bank import Bank
from fedamole.model.base import Base, BaseSettings, load_base
from fedamole.model.batch import TokenPair, collate, token_losses
from fedamole.model.forward_context import ForwardContext
from fedamole.model.packing import ATTENTION, packed_attention
from fedamole.model.segments import Segments
from tests.training import alone

from .conftest import ARCHITECTURES, mixture, write_model, write_tokenizer

ROWS: list[TokenPair] = [
    ((5, 9, 40, 33, 60, 12, 77, 8, 101, 14), (200, 31, 0)),
    ((5, 11), (90, 0)),
    ((5, 66, 67, 68, 69), (19, 20, 0)),
]
"""13, 4 and 8 tokens; the first is longer than Gemma 3's window of 8."""
EVEN: list[TokenPair] = [((5, i, 9, 8, 7, 6, 5, 4, 3), (i, 0)) for i in range(10, 14)]


@pytest.mark.parametrize("rows", [ROWS, EVEN, ROWS[:1]], ids=["ragged", "even", "single"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_logits_equal_separate_forwards(base: Callable[..., Base], kind: str, rows: list[TokenPair]) -> None:
    """The base's own attention on each sequence by itself, in float64; all but GPT-2 group their heads."""
    bank = Bank(base(kind))
    bank.base.model.double()
    config = bank.base.model.config
    assert kind == "gpt2" or config.num_key_value_heads < config.num_attention_heads
    with torch.no_grad():
        for adapters in ([], [mixture(bank.base)]):
            bank.load(adapters)
            expected = []
            for prompt, answer in rows:
                logits = bank.base.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
                expected.append(logits[len(prompt) - 1 : -1])
            with bank.forward(collate([rows], 1, packed=True)) as result:
                torch.testing.assert_close(result, torch.cat(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [ROWS, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_rows_equal_padded_ones(
    base: Callable[..., Base], kind: str, rows: list[TokenPair], checkpointing: bool
) -> None:
    """Two clients; losses, balance losses and gradients, in float64 (norms of Llama's family compute in float32)."""
    bank = Bank(base(kind, gradient_checkpointing=checkpointing))
    assert bank.packs
    bank.base.model.double()
    bank.load([mixture(bank.base, seed, dropout=0.2) for seed in (0, 1)])
    bank.base.training(True)
    results = []
    for packed in (True, False):
        balance: list[torch.Tensor] = []
        with bank.forward(
            collate([rows[:1], rows[1:]], 1, packed, seeds=[7, 8]), ForwardContext(balance_losses=balance)
        ) as logits:
            losses = token_losses(logits, torch.tensor([token for _, answer in rows for token in answer]))
            total = losses.mean() + torch.stack(balance).sum()
            first = torch.stack(balance[: len(bank.layers)])
            results.append([losses, first, *torch.autograd.grad(total, bank.parameters())])
    for mine, theirs in zip(*results, strict=True):
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
        with torch.no_grad(), bank.forward(collate([ROWS[:1]], 1, packed=True)) as result:
            logits.append(result)
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)


def attend(lengths: tuple[int, ...] | None, **options: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    rows = 6 if lengths is None else sum(lengths)
    q, k, v = (torch.randn(1, heads, rows, 4, dtype=torch.float64, generator=draw) for heads in (4, 2, 2))
    mask, sequences = options.pop("attention_mask", None), None if lengths is None else Segments(lengths)
    out, weights = packed_attention(torch.nn.Module(), q, k, v, mask, sequences=sequences, **options)
    assert weights is None
    return out


@pytest.mark.parametrize("lengths", [(6,), (3, 3), (4, 1, 2)])
@pytest.mark.parametrize("window", [None, 2, 3])
def test_attention_by_the_formula(lengths: tuple[int, ...], window: int | None) -> None:
    """softmax(0.3 q k) v over the tokens up to one's own, of one's own sequence, at most `window` of them."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(lengths), 4, dtype=torch.float64, generator=draw)[0] for heads in (4, 2, 2))
    result = attend(lengths, scaling=0.3, sliding_window=window)
    assert result.shape == (1, sum(lengths), 4, 4)
    start = 0
    for length in lengths:
        for position in range(start, start + length):
            first = start if window is None else max(start, position - window + 1)
            for head in range(4):
                scores = 0.3 * k[head // 2, first : position + 1] @ q[head, position]
                expected = scores.softmax(0) @ v[head // 2, first : position + 1]
                torch.testing.assert_close(result[0, position, head], expected)
        start += length


def test_what_this_attention_cannot_do_is_refused() -> None:
    """A cap on the scores, a sink, a mask of the model's own, or no word of where sequences end."""
    for options in ({"softcap": 50.0}, {"s_aux": torch.zeros(4)}, {"attention_mask": torch.zeros(1, 1, 6, 6)}):
        with pytest.raises(NotImplementedError, match="Module cannot be packed"):
            attend((3, 3), **options)
    with pytest.raises(NotImplementedError, match="cannot be packed"):
        attend(None)
    assert attend((3, 3), softcap=None, s_aux=None).isfinite().all()


@pytest.fixture(params=["gemma2", "mamba", "lfm2", "eager"])
def unpackable(request: Any, tmp_path: Path) -> Bank:
    """Gemma 2 caps its attention scores; Mamba mixes tokens without attention, LFM 2 with attention and convolutions,
    which the probe notices by its logits; of other attention functions than torch's nothing is known.
    """
    write_tokenizer(tmp_path)
    kind, targets = request.param, {"mamba": ("in_proj",), "lfm2": ("q_proj",)}.get(request.param, ())
    if kind in ("gemma2", "eager"):
        write_model(tmp_path, "llama" if kind == "eager" else kind)
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        shape = (
            {"state_size": 4}
            if kind == "mamba"
            else {
                "intermediate_size": 48,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "layer_types": ["conv", "full_attention"],
                "initializer_range": 0.15,
            }
        )
        common = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": 0, "pad_token_id": 1}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **shape)).save_pretrained(tmp_path)
    base = load_base(BaseSettings(str(tmp_path), targets=targets), torch.device("cpu"), Path("/"))
    if kind == "eager":
        base.model.set_attn_implementation("eager")
    assert kind != "lfm2" or base.model.config._attn_implementation == "sdpa", "not refused by its attention"
    return Bank(base)


def test_where_packing_is_impossible_a_group_still_equals_each_alone(unpackable: Bank) -> None:
    """Two clients of ragged rows in float64: padded to another length beside the other than alone."""
    bank = unpackable
    bank.base.model.double()
    settings = TrainingSettings(local_steps=3, batch_size=2)
    drawn = [mixture(bank.base, seed, dropout=0.1) for seed in (0, 1)]
    doubles = [
        replace(rows_of_client, tensors={name: t.double() for name, t in rows_of_client.tensors.items()})
        for rows_of_client in drawn
    ]
    parts = ROWS[1:], ROWS[:2]
    tasks = [
        LocalTask(name, TrainingRequest(own), rows, 1e-2) for name, own, rows in zip("ab", doubles, parts, strict=True)
    ]
    for task, mine in zip(tasks, fit(bank, tasks, settings, seed=0, round_=0), strict=True):
        (theirs,) = fit(bank, [task], settings, seed=0, round_=0)
        assert isinstance(mine, TrainingResult)
        assert isinstance(theirs, TrainingResult)
        assert mine.loss == pytest.approx(theirs.loss, abs=1e-9)
        for name, tensor in mine.adapter.tensors.items():
            torch.testing.assert_close(tensor, theirs.adapter.tensors[name], rtol=0, atol=1e-9)


def test_where_packing_is_impossible_rows_are_padded(unpackable: Bank) -> None:
    """A batch of ragged rows trains as it does with the rows' gradients added up one by one."""
    bank, adapter = unpackable, mixture(unpackable.base)
    assert not bank.packs
    bank.load([adapter])
    apart = []
    for row in ROWS:
        with bank.forward(collate([[row]], 1)) as logits:
            losses = token_losses(logits, torch.tensor(row[1]))
            apart.append(torch.autograd.grad(losses.sum(), bank.parameters()))
    batch = collate([ROWS], 1)
    with bank.forward(batch) as logits:
        together = torch.autograd.grad(token_losses(logits, batch.labels).sum(), bank.parameters())
    for index, mine in enumerate(together):
        torch.testing.assert_close(mine, sum(parts[index] for parts in apart), rtol=1e-3, atol=1e-4)
    settings = TrainingSettings(local_steps=8, batch_size=3, learning_rate=1e-2)
    done = alone(bank, adapter, ROWS, settings)
    assert done.loss == pytest.approx(alone(bank, adapter, ROWS, settings).loss)
    assert any(not torch.equal(tensor, adapter.tensors[name]) for name, tensor in done.adapter.tensors.items())
