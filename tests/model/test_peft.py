"""A personal adapter is a PEFT adapter: saved here, loaded in a fresh process, the same logits."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.params import Adapter, new_shared
from fedamole.model.pretrained import load_adapter, save_adapter

from .conftest import mixture

Two = tuple[Any, dict[str, torch.Tensor]]
IDS = [[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]

FRESH = """
import sys, torch
if sys.argv[4] == "with":
    import fedamole
from peft import PeftModel
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[2])
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.tensor(IDS)).logits.contiguous()}, sys.argv[3])
assert ("fedamole" in sys.modules) == (sys.argv[4] == "with")
""".replace("IDS", repr(IDS))


def lora(base: Base, seed: int = 0) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    tensors = new_shared(base.shapes, 4, g)
    drawn = {name: torch.randn(t.shape, generator=g) * 0.1 for name, t in tensors.items() if name.endswith("/B")}
    return Adapter(AdapterSpec(rank=4, alpha=8.0), {**tensors, **drawn})


@pytest.mark.parametrize(
    ("kind", "architecture", "package"),
    [(mixture, "llama", "with"), (mixture, "gpt2", "with"), (lora, "llama", "without"), (lora, "gpt2", "without")],
)
def test_a_fresh_process_gives_the_same_logits(
    base: Callable[..., Base], tmp_path: Path, kind: Callable[[Base], Adapter], architecture: str, package: str
) -> None:
    bank = Bank(base(architecture))
    adapter = kind(bank.base)
    bank.load([adapter])
    with torch.no_grad():
        expected = bank.base.model(input_ids=torch.tensor(IDS)).logits
    save_adapter(adapter, tmp_path / "a", bank.base.name, bank.base.identity)
    command = [sys.executable, "-c", FRESH, bank.base.name, str(tmp_path / "a"), str(tmp_path / "out"), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(load_file(tmp_path / "out")["logits"], expected, rtol=1e-6, atol=1e-6)
    back = load_adapter(tmp_path / "a", bank.base.identity)
    assert set(back.tensors) == set(adapter.tensors)
    assert all(torch.equal(back.tensors[name], adapter.tensors[name]) for name in adapter.tensors)


def test_importing_the_package_imports_neither_torch_nor_peft() -> None:
    check = "import sys, fedamole; assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.fixture
def two(base: Callable[..., Base], tmp_path: Path) -> Two:
    """A PeftModel with two clients' adapters, and the logits that each should give."""
    from peft import PeftModel

    bank, logits = Bank(base()), {}
    for seed, name in enumerate(("first", "second")):
        adapter = mixture(bank.base, seed)
        save_adapter(adapter, tmp_path / name, bank.base.name, bank.base.identity)
        bank.load([adapter])
        logits[name] = bank.base.model(input_ids=torch.tensor(IDS)).logits.detach()
    bank.load([])
    logits["none"] = bank.base.model(input_ids=torch.tensor(IDS)).logits.detach()
    model = PeftModel.from_pretrained(base().model, tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", adapter_name="second")
    return model, logits


def test_switching_disabling_and_deleting(two: Two) -> None:
    model, expected = two
    ids = torch.tensor(IDS)
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        torch.testing.assert_close(model(input_ids=ids).logits, expected[name])
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, expected["none"])
    model.delete_adapter("second")
    torch.testing.assert_close(model(input_ids=ids).logits, expected["first"])
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (2, 9)


def test_merging_is_refused(two: Two) -> None:
    with pytest.raises(ValueError, match="depend on the token"):
        two[0].merge_adapter()


def test_get_peft_model_trains_saves_and_loads(base: Callable[..., Base], tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model

    import fedamole  # noqa: F401
    from fedamole.model.peft_tuner import AmoleConfig

    pattern = {name: [1, 4, 7][: 2 + index % 2] for index, name in enumerate(sorted(base().shapes))}
    model = get_peft_model(base().model, AmoleConfig(r=4, alpha=8.0, expert_pattern=pattern))
    ids = torch.tensor(IDS)
    torch.testing.assert_close(model(input_ids=ids).logits, base().model(input_ids=ids).logits)
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trainable) == 2 * len(pattern)
    assert all("amole_" in name for name in trainable)
    optimiser = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    model.eval()
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.{name}.amole_{part}" for name in pattern for part in ("down", "up")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of tensors that are missing or left over
        loaded = PeftModel.from_pretrained(base().model, tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_file_without_all_tensors_is_noticed(base: Callable[..., Base], tmp_path: Path) -> None:
    from peft import PeftModel

    loaded = base()
    save_adapter(mixture(loaded), tmp_path, loaded.name, loaded.identity)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="missing"):
        PeftModel.from_pretrained(loaded.model, tmp_path)


@pytest.mark.parametrize("module", ["fedamole.model.peft_tuner", "fedamole.personal.saved_models", "peft"])
def test_the_adapter_type_is_registered_whatever_is_imported_first(module: str) -> None:
    check = f"import fedamole, {module}, peft.mapping as m, sys; sys.exit('AMOLE' not in m.PEFT_TYPE_TO_TUNER_MAPPING)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
