"""Experts weighted by instance, loaded by PEFT: the bank's logits, in one call and in `generate`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import fedamole  # noqa: F401 - makes the adapter type known to PEFT
from fedamole.evaluation.generation import generate_answers
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.forward_context import ForwardContext
from fedamole.model.mixer import InstanceWeights
from fedamole.model.params import REFERENCES, Adapter, expert_keys
from fedamole.model.pretrained import load_adapter, save_adapter

PROMPTS = [(3, 14, 15, 92), (6, 53), (58, 9, 79, 3, 23)]


def pair(base: Base) -> Adapter:
    """Two experts with weights that show, and what the prompts look like under the first of them."""
    draw = torch.Generator().manual_seed(5)
    tensors = {
        key: torch.randn(8, d_in, generator=draw) * 0.2 if key.endswith("A") else torch.randn(d_out, 8, generator=draw)
        for module, (d_in, d_out) in base.shapes.items()
        for expert in (0, 1)
        for key in expert_keys(module, expert)
    }
    spec, bank = AdapterSpec(router=InstanceWeights(0.9)), Bank(base)
    bank.load([Adapter(spec, tensors)])
    return Adapter(spec, tensors, {REFERENCES: bank.last_hidden([PROMPTS])})


@pytest.fixture
def saved(base: Callable[..., Base], tmp_path: Path) -> tuple[Adapter, Path]:
    own = base()
    adapter = pair(own)
    save_adapter(adapter, tmp_path / "adapter", own.name, own.identity)
    return adapter, tmp_path / "adapter"


def test_saving_and_loading_changes_nothing(saved: tuple[Adapter, Path]) -> None:
    adapter, folder = saved
    again = load_adapter(folder)
    assert again.spec == adapter.spec
    for expected, result in ((adapter.tensors, again.tensors), (adapter.fixed, again.fixed)):
        assert expected.keys() == result.keys()
        assert all(torch.equal(tensor, result[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_peft_gives_the_banks_logits(
    prompt: tuple[int, ...], saved: tuple[Adapter, Path], base: Callable[..., Base]
) -> None:
    adapter, folder = saved
    bank = Bank(base())
    bank.load([adapter])
    gates = bank.instance_weights([[prompt]])
    assert gates is not None
    assert 0.01 < float(gates[0, 0]) < 0.99
    ids = torch.tensor([prompt])
    with torch.no_grad(), bank.enter(ForwardContext(expert_weights=gates)):
        expected = bank.base.model(ids).logits
    model = PeftModel.from_pretrained(base().model, str(folder))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits, base().model(ids).logits, rtol=0, atol=1e-4)


def test_answers_are_weighed_by_their_prompt(saved: tuple[Adapter, Path], base: Callable[..., Base]) -> None:
    """Greedy answers of several prompts, padded on the left, with the cache: the bank's, one by one."""
    adapter, folder = saved
    bank = Bank(base())
    bank.load([adapter])
    expected = generate_answers(bank, [PROMPTS], 8, 4096)[0]
    assert len(set(expected)) > 1
    other = base()
    model = PeftModel.from_pretrained(other.model, str(folder))
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        ids = torch.tensor([[other.pad_id] * 2 + list(prompt)])
        mask = torch.tensor([[0, 0] + [1] * len(prompt)])
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        assert other.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == answer
