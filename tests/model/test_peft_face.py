"""What PEFT offers on a personal adapter, beyond loading it: training on, merging, dropout, a second home."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.params import expert_ids
from fedamole.model.pretrained import load_adapter, save_adapter

from .conftest import mixture

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])


def personal(base: Callable[..., Base], folder: Path, trainable: bool = False, **spec: Any) -> Any:
    from peft import PeftModel

    own = base("gpt2")
    save_adapter(mixture(own, **spec), folder, own.name, own.identity)
    return PeftModel.from_pretrained(own.model, folder, is_trainable=trainable)


def test_merging_is_refused_in_every_way(base: Callable[..., Base], tmp_path: Path) -> None:
    model = personal(base, tmp_path)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged, because its weights depend on the token"):
            merge()


def test_unloading_gives_the_bare_base_back(base: Callable[..., Base], tmp_path: Path) -> None:
    expected = base("gpt2").model(input_ids=IDS).logits
    model = personal(base, tmp_path)
    assert not torch.allclose(model(input_ids=IDS).logits, expected)
    assert torch.equal(model.unload()(input_ids=IDS).logits, expected)


def test_training_on_changes_the_adapter_alone_and_saves_for_the_bank(
    base: Callable[..., Base], tmp_path: Path
) -> None:
    """One step of Adam moves every tensor of the adapter and none of the base; the bank reads what PEFT saved."""
    model = personal(base, tmp_path / "before", trainable=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimiser = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimiser.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".amole_down." in name or ".amole_up." in name}
    assert len(moved) == 4
    model.save_pretrained(tmp_path / "after")
    bank, adapter = Bank(base("gpt2")), load_adapter(tmp_path / "after")
    assert expert_ids(adapter.tensors) == expert_ids(load_adapter(tmp_path / "before").tensors)
    bank.load([adapter])
    torch.testing.assert_close(bank.base.model(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_dropout_acts_in_training_alone(base: Callable[..., Base], tmp_path: Path) -> None:
    model = personal(base, tmp_path, dropout=0.5)
    once, again = (model.eval()(input_ids=IDS).logits for _ in range(2))
    assert torch.equal(once, again)
    once, again = (model.train()(input_ids=IDS).logits for _ in range(2))
    assert not torch.allclose(once, again)


def test_peft_may_be_imported_before_this_package() -> None:
    check = "import peft, fedamole; from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as M; assert 'AMOLE' in M"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
