"""A personal model without this package: the same logits in plain PEFT and transformers, or a clear refusal."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedamole.errors import BaseModelError
from fedamole.model.bank import Bank
from fedamole.model.base import Base, BaseSettings, load_base
from fedamole.model.batch import TokenPair, collate
from fedamole.model.moments import collect_moments
from fedamole.model.params import Adapter, expert_ids, expert_keys
from fedamole.model.pretrained import load_adapter, save_adapter
from fedamole.personal.export import Texts, as_lora, merge, refuse_unmergeable
from fedamole.personal.export_settings import ExportSettings
from fedamole.personal.saved_models import find_model, load_base_for
from tests.model.conftest import mixture
from tests.training import lora_spec

CLIENT = "mood"
IDS = (5, 40, 33, 90, 101, 7, 60)
OUTSIDE = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

base, lora, merged, out, ids = sys.argv[1:]
ids = torch.tensor([json.loads(ids)])
with torch.no_grad():
    whole = AutoModelForCausalLM.from_pretrained(merged)
    found = {"merged": whole(ids).logits[0]}
    AutoTokenizer.from_pretrained(merged)
    found["lora"] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora)(ids).logits[0]
assert not [name for name in sys.modules if name.startswith("fedamole")]
save_file({name: logits.contiguous() for name, logits in found.items()}, out)
"""


@pytest.fixture(scope="session")
def trained(runs: Any) -> Path:
    """A run long enough for its experts to differ."""
    folder: Path = runs("fedamole", "federation.rounds=1", "training.local_steps=30")
    return folder


def logits(bank: Bank, adapter: Adapter) -> Tensor:
    bank.load([adapter])
    batch = collate([[(IDS[:1], IDS[1:])]], bank.base.pad_id, bank.packs)
    with torch.no_grad(), bank.forward(batch) as result:
        return result.clone()


def written(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "export.json").read_text())
    return result


def test_it_needs_nothing_of_this_package(trained: Path, tiny: Path, tmp_path: Path, fedamole: Any) -> None:
    for kind in ("lora", "merged"):
        options = ["--to", kind, "--out", kind, "--tolerance", "0.2", "--json"]
        result = fedamole("export", trained, "--client", CLIENT, *options)
        assert result.code == 0, result.err
        report = json.loads(result.out)
        assert report == {**written(tmp_path / kind), "written": kind}
        assert report["losses"]["export"] < report["losses"]["base"]
        assert 0 < max(report["unexplained"].values()) < 0.5
    assert written(tmp_path / "merged")["losses"] == pytest.approx(written(tmp_path / "lora")["losses"], abs=1e-4)
    out = tmp_path / "logits.safetensors"
    arguments = [tiny / "base", tmp_path / "lora", tmp_path / "merged", out]
    subprocess.run([sys.executable, "-c", OUTSIDE, *map(str, arguments), json.dumps(IDS)], check=True, cwd=tmp_path)
    actual = load_file(out)
    model = find_model(trained, CLIENT)
    base = load_base_for(model, "cpu")
    ours = logits(Bank(base), load_adapter(tmp_path / "lora", base.identity))
    but_last = slice(0, len(IDS) - 1)
    assert torch.allclose(actual["lora"][but_last], ours, atol=1e-4)
    assert torch.allclose(actual["merged"][but_last], ours, atol=1e-4)
    assert not torch.allclose(logits(Bank(load_base_for(model, "cpu")), load_adapter(model.folder)), ours, atol=1e-4)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert not list(tmp_path.glob(".*"))


def alone(personal: Adapter) -> Adapter:
    """The mixture with the first expert of each module, and no other."""
    kept = dict(personal.tensors)
    for module, ids in expert_ids(personal.tensors).items():
        for other in ids[1:]:
            for key in expert_keys(module, other):
                del kept[key]
    return Adapter(replace(lora_spec(personal.spec), top_k=1), kept)


def equal(personal: Adapter) -> Adapter:
    """The mixture with the first expert's numbers in each place: whatever is chosen does the same."""
    tensors = dict(personal.tensors)
    for module, ids in expert_ids(personal.tensors).items():
        for other in ids[1:]:
            for key, first in zip(expert_keys(module, other), expert_keys(module, ids[0]), strict=True):
                tensors[key] = tensors[first]
    return replace(personal, tensors=tensors)


@pytest.mark.parametrize("change", [alone, equal])
@pytest.mark.parametrize("packs", [True, False])
def test_what_is_linear_is_found_exactly(change: Any, packs: bool, trained: Path) -> None:
    """One expert, or all alike, is one linear map of rank 2 + 2: with as much, the LoRA is the model itself."""
    model = find_model(trained, CLIENT)
    bank = Bank(load_base_for(model, "cpu"))
    bank.packs = packs
    personal = change(load_adapter(model.folder))
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(2, 300, (size,), generator=generator).tolist() for size in (20, 5, 40, 11) * 3]
    rows: list[TokenPair] = [(tuple(ids), IDS) for ids in drawn]
    lora, about = as_lora(bank, personal, Texts(rows, rows, 200), ExportSettings(rank=4, ridge=1e-9))
    assert max(about["unexplained"].values()) < 1e-6
    assert torch.allclose(logits(bank, lora), logits(bank, personal), atol=1e-4)
    bank.load([personal])
    seen = collect_moments(bank, sorted(bank.base.shapes), rows, 200, outputs=True)
    assert {sums.tokens for sums in seen.values()} == {about["tokens"]}, "padding does not count"
    assert about["tokens"] == sum(len(prompt) + len(answer) for prompt, answer in rows)


def test_a_lora_is_exported_unchanged(runs: Any, tmp_path: Path, fedamole: Any) -> None:
    run = runs("fedit")
    result = fedamole("export", run, "--client", CLIENT, "--out", "lora", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["exact"]
    assert report["losses"]["export"] == report["losses"]["personal"]
    name = "adapter_model.safetensors"
    assert (tmp_path / "lora" / name).read_bytes() == (find_model(run, CLIENT).folder / name).read_bytes()


@pytest.mark.parametrize("method", ["feddpa", "fedalt"])
def test_other_mixtures_are_watched_alike(method: str, runs: Any) -> None:
    """Weights by instance take a first look at each prompt, which does not count; a learned mixer does not."""
    model = find_model(runs(method, "federation.rounds=1"), CLIENT)
    bank, personal = Bank(load_base_for(model, "cpu")), load_adapter(model.folder)
    rows: list[TokenPair] = [((5, 9, 60, 33, 21), IDS), ((7, 8), IDS)]
    texts = Texts(rows, rows, 200)
    bank.load([personal])
    seen = collect_moments(bank, sorted(bank.base.shapes), rows, 200, outputs=True)
    assert {sums.tokens for sums in seen.values()} == {5 + 2 + 2 * len(IDS)}
    lora, about = as_lora(bank, personal, texts, ExportSettings(ridge=1e-9))
    assert about["rank"] == 4, "two experts of rank 2"
    assert max(about["unexplained"].values()) < 0.5
    assert lora.modules() == personal.modules()


def test_a_prompt_is_no_lora(runs: Any, tmp_path: Path, fedamole: Any) -> None:
    result = fedamole("export", runs("fedprompt"), "--client", CLIENT, "--out", "lora")
    assert result.code == 2
    assert "soft prompt" in result.line
    assert not list(tmp_path.iterdir())


def test_too_much_lost_is_refused(trained: Path, tmp_path: Path, fedamole: Any) -> None:
    arguments = ["export", trained, "--client", CLIENT, "--rank", "1", "--tolerance", "0"]
    refused = fedamole(*arguments, "--out", "new/folder/lora", "--json")
    assert refused.code == 1
    assert "--force" in refused.line
    report = json.loads(refused.out)
    assert report["written"] is None
    assert report["losses"]["export"] > report["losses"]["personal"]
    assert not list(tmp_path.iterdir())
    table = fedamole(*arguments, "--out", "lora")
    assert table.code == 1
    assert f"{report['losses']['export']:.4f}" in table.out
    forced = fedamole(*arguments, "--out", "lora", "--json", "--force")
    assert forced.code == 0, forced.err
    assert json.loads(forced.out) == {**report, "written": "lora"}
    assert {**written(tmp_path / "lora"), "written": None} == report


def test_nothing_is_overwritten(trained: Path, tmp_path: Path, fedamole: Any) -> None:
    (tmp_path / "mine").mkdir()
    result = fedamole("export", trained, "--client", CLIENT, "--out", "mine")
    assert result.code == 5
    assert "overwritten" in result.line
    assert not list((tmp_path / "mine").iterdir())


def test_a_copied_adapter_needs_text(trained: Path, tiny: Path, tmp_path: Path, fedamole: Any) -> None:
    shutil.copytree(find_model(trained, CLIENT).folder, tmp_path / "copy")
    result = fedamole("export", "copy", "--out", "lora")
    assert result.code == 2
    assert "--calibration" in result.line
    result = fedamole("export", "copy", "--out", "lora", "--calibration", tiny / "mood.jsonl", "--json", "--force")
    assert result.code == 0, result.err
    assert (tmp_path / "lora" / "adapter_config.json").exists()


def test_calibration_takes_the_place_of_the_training_split(
    trained: Path, tiny: Path, tmp_path: Path, fedamole: Any
) -> None:
    arguments = ["export", trained, "--client", CLIENT, "--json", "--force"]
    own = json.loads(fedamole(*arguments, "--out", "own").out)
    other = json.loads(fedamole(*arguments, "--out", "other", "--calibration", tiny / "plain.jsonl").out)
    assert own["losses"]["personal"] == other["losses"]["personal"], "both are judged on the client's validation split"
    assert own["unexplained"] != other["unexplained"]
    few = json.loads(fedamole(*arguments, "--out", "few", "--tokens", "100").out)
    assert few["tokens"] <= 100 < own["tokens"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--to", "gguf"],
        ["--rank", "0"],
        ["--rank", "65537"],
        ["--ridge", "0"],
        ["--tolerance", "-1"],
        ["--tokens", "0"],
    ],
)
def test_settings_that_mean_nothing(arguments: Sequence[str], trained: Path, tmp_path: Path, fedamole: Any) -> None:
    result = fedamole("export", trained, "--client", CLIENT, "--out", "lora", *arguments)
    assert result.code == 2
    assert arguments[0] in result.line


def test_tied_and_quantised_weights_take_no_lora(trained: Path) -> None:
    base = load_base_for(find_model(trained, CLIENT), "cpu")
    names = sorted(base.shapes)
    refuse_unmergeable(base, names)
    first, second = (base.model.get_submodule(name) for name in names if name.endswith("q_proj"))
    first.weight = second.weight
    with pytest.raises(BaseModelError, match=r"shares its weights with model\.layers"):
        refuse_unmergeable(base, names)
    refuse_unmergeable(base, [name for name in names if name.endswith("v_proj")])
    base.model.is_quantized = True
    with pytest.raises(BaseModelError, match="quantised"):
        refuse_unmergeable(base, names)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma"])
def test_other_architectures_merge_alike(architecture: str, base: Any, tmp_path: Path) -> None:
    """Linears that are stored transposed, and a tied head that is no target: merged does what the LoRA does."""
    fresh: Base = base(architecture)
    bank, personal = Bank(fresh), mixture(fresh)
    rows: list[TokenPair] = [((3, 9, 14, 60, 30, 21, 77), IDS)] * 3
    lora, _ = as_lora(bank, personal, Texts(rows, rows, 64), ExportSettings(rank=6))
    save_adapter(lora, tmp_path / "lora", fresh.name, fresh.identity)
    merge(tmp_path / "lora", fresh, tmp_path / "merged")
    merged = Bank(load_base(BaseSettings(str(tmp_path / "merged")), fresh.device, tmp_path))
    batch = collate([[(IDS[:1], IDS[1:])]], fresh.pad_id, merged.packs)
    with torch.no_grad(), merged.forward(batch) as result:
        assert torch.allclose(result, logits(bank, lora), atol=1e-3)
    assert not torch.allclose(logits(bank, lora), logits(bank, replace(lora, tensors=zeros(lora))), atol=1e-3)


def zeros(lora: Adapter) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in lora.tensors.items()}
