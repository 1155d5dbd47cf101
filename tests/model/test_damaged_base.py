"""Bases whose files are damaged or incomplete: each is refused in one sentence, none is used half."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedamole.errors import BaseModelError
from fedamole.model.base import Base, BaseSettings, load_base

from .conftest import write_model, write_tokenizer


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The folder of a base that a test may damage."""
    write_tokenizer(tmp_path)
    write_model(tmp_path)
    return tmp_path


def load(model: str | Path) -> Base:
    return load_base(BaseSettings(str(model)), torch.device("cpu"), Path("/"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda _: b"{damaged"], ids=["cut", "overwritten"])
def test_a_damaged_file(own: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    load(own)
    (own / name).write_bytes(damage((own / name).read_bytes()))
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load(own)


def test_a_missing_weight_is_not_drawn_at_random(own: Path) -> None:
    weights = load_file(own / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, own / "model.safetensors")
    with pytest.raises(BaseModelError, match=f"no weights for '{name}'"):
        load(own)


def test_a_tied_output_head_is_not_a_missing_weight(own: Path) -> None:
    """GPT-2 and Gemma store no output head: it is their embedding."""
    write_model(own, "gemma")
    assert "lm_head.weight" not in load_file(own / "model.safetensors")
    assert load(own).shapes


def test_a_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BaseModelError, match="'someone/nothing' cannot be loaded"):
        load("someone/nothing")


def test_no_usual_targets(own: Path) -> None:
    """Phi-3 has one linear for q, k and v, and PEFT lists no targets for it: the message names what there is."""
    write_model(own, "phi3")
    with pytest.raises(BaseModelError, match=r"'phi3'; name some in base.targets, of .*qkv_proj"):
        load(own)
    settings = BaseSettings(str(own), targets=("qkv_proj",))
    assert len(load_base(settings, torch.device("cpu"), Path("/")).shapes) == 2


def test_one_changed_number_is_another_base(own: Path) -> None:
    before = load(own).identity
    weights = load_file(own / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, own / "model.safetensors", {"format": "pt"})
    after = load(own).identity
    assert after.weights != before.weights
    assert (after.tokenizer, after.targets) == (before.tokenizer, before.targets)
