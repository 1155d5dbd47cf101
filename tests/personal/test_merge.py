"""`fedamole merge`: the folder that it writes, the losses that it reports, and the mistakes that it refuses."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedamole.errors import ConfigError
from fedamole.merging.adapters import adapter_of, factors_of
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.batch import collate
from fedamole.model.params import Adapter
from fedamole.model.pretrained import IDENTITY, load_adapter
from fedamole.model.prompt import PromptSpec
from fedamole.personal.merge_settings import RECIPES
from fedamole.personal.saved_models import find_model, load_base_for
from tests.training import lora_spec

OPTIONS = ("federation.rounds=1", "training.local_steps=6")
IDS = (5, 40, 33, 90, 101, 7, 60)


@pytest.fixture(scope="session")
def trained(runs: Any) -> Path:
    """Four clients with a LoRA of their own."""
    folder: Path = runs("local_only", *OPTIONS)
    return folder


def folder_of(run: Path, client: str) -> Path:
    return run / "clients" / client / "adapter"


def test_a_run_becomes_one_adapter_that_peft_loads(trained: Path, tiny: Path, tmp_path: Path, fedamole: Any) -> None:
    result = fedamole("merge", trained, "--recipe", "regmean", "--out", "merged", "--json", "--rank", 3)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report == {**json.loads((tmp_path / "merged" / "merge.json").read_text()), "written": "merged"}
    assert sorted(report["losses"]) == report["models"] == ["chat", "entail", "mood", "plain"]
    logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    before = {line["client"]: line["loss"] for line in logged if line["split"] == "validation" and line["round"] == 0}
    assert {name: row["before"] for name, row in report["losses"].items()} == pytest.approx(before, abs=1e-4)
    assert all(row["after"] < row["base"] for row in report["losses"].values()), report["losses"]

    base = load_base_for(find_model(trained, "mood"), "cpu")
    ours = Bank(base)
    ours.load([load_adapter(tmp_path / "merged", base.identity)])
    with torch.no_grad(), ours.forward(collate([[(IDS[:1], IDS[1:])]], base.pad_id, ours.packs)) as logits:
        expected = logits.clone()
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny / "base"), tmp_path / "merged")
        assert plain.peft_config["default"].r == 3
        actual = plain(torch.tensor([list(IDS)])).logits[0]
    assert torch.allclose(actual[: len(IDS) - 1], expected, atol=1e-4)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("recipe", ["linear", "svd", "ties", "dare"])
def test_folders_are_merged_without_data(recipe: str, trained: Path, tmp_path: Path, fedamole: Any) -> None:
    """Of two equal LoRAs, linear and svd are the LoRA itself."""
    shutil.copytree(folder_of(trained, "mood"), tmp_path / "copy")
    folders = [folder_of(trained, "mood"), tmp_path / "copy"]
    result = fedamole("merge", *folders, "--recipe", recipe, "--out", "merged")
    assert result.code == 0, result.err
    assert "no validation loss" in result.line
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["losses"] == {}
    loras = [factors_of(load_adapter(folder), "x") for folder in (tmp_path / "merged", folders[0])]
    changes = [{module: b @ a for module, (a, b) in lora.items()} for lora in loras]
    for module, change in changes[1].items():
        assert torch.allclose(changes[0][module], change, atol=1e-6) == (recipe in ("linear", "svd"))


def test_clients_are_chosen_and_a_table_shows_them(trained: Path, fedamole: Any) -> None:
    result = fedamole("merge", trained, "--clients", "mood,chat", "--recipe", "svd", "--out", "merged")
    assert result.code == 0, result.err
    assert "mood" in result.out
    assert "mean" in result.out
    assert "entail" not in result.out
    assert result.line == "merged: rank 2, of 2 models"


def test_mixtures_are_turned_into_loras_first(runs: Any, tmp_path: Path, fedamole: Any) -> None:
    run = runs("fedamole", "federation.rounds=1", "training.local_steps=30")
    result = fedamole("merge", run, "--clients", "mood,chat", "--recipe", "svd", "--out", "merged")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert report["rank"] > 2
    assert report["losses"]["mood"]["before"] < report["losses"]["mood"]["after"] < report["losses"]["mood"]["base"]
    assert load_adapter(tmp_path / "merged").spec != load_adapter(folder_of(run, "mood")).spec


def poisoned(run: Path, client: str, target: Path, factor: float = -5) -> Path:
    """A copy of a run in which one client's LoRA is negated and enlarged, or multiplied by another factor."""
    shutil.copytree(run, target)
    file = folder_of(target, client) / "adapter_model.safetensors"
    tensors = {key: factor * tensor if "lora_B" in key else tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file)
    return target


def test_a_poisoned_adapter_is_never_taken_selectively(trained: Path, tmp_path: Path, fedamole: Any) -> None:
    run = poisoned(trained, "mood", tmp_path / "poisoned")
    result = fedamole("merge", run, "--recipe", "selective", "--out", "merged", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert "mood" in report["refused"]
    assert "mood" not in report["taken"]
    assert list(report["taken"].values())[0] == 1.0  # noqa: RUF015  the first model is taken as it is
    means = {key: sum(row[key] for row in report["losses"].values()) for key in ("base", "after")}
    assert means["after"] < means["base"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_that_is_not_finite_is_refused(recipe: str, trained: Path, tmp_path: Path, fedamole: Any) -> None:
    run = poisoned(trained, "mood", tmp_path / "poisoned", factor=math.nan)
    result = fedamole("merge", run, "--recipe", recipe, "--out", "merged")
    assert result.code == 2
    assert re.fullmatch(r"error: \S*mood\S* holds NaN or infinity: leave this model out of the merge", result.error)
    assert not (tmp_path / "merged").exists()


def test_a_zoo_without_a_useful_model_is_an_error(trained: Path, tmp_path: Path, fedamole: Any) -> None:
    run = poisoned(poisoned(trained, "mood", tmp_path / "half"), "chat", tmp_path / "both")
    result = fedamole("merge", run, "--clients", "mood,chat", "--recipe", "selective", "--out", "merged")
    assert result.code == 2
    assert "no model has a lower loss than the untuned base" in result.error
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (["--clients", "mood,nobody"], 5, "has no client 'nobody'"),
        (["--clients", "mood"], 2, "a merge needs at least two models, and here is mood"),
        (["--clients", ""], 2, "a merge needs at least two models, and here is none"),
        (["--clients", "mood,mood"], 2, "--clients names mood twice"),
        (["--recipe", "mean"], 2, "--recipe mean: use one of linear, svd"),
        (["--rank", "0"], 2, "--rank 0: must be at least 1"),
        (["--rank", "65537"], 2, "--rank 65537: must be at most 65536"),
        (["--density", "1"], 2, "--density 1.0: must be above 0 and below 1"),
        (["--off-diagonal", "2"], 2, "--off-diagonal 2.0: must be at least 0 and at most 1"),
        (["--examples", "0"], 2, "--examples 0: must be at least 1"),
        (["--variant", "fedit"], 5, "it has no saved model of 'fedit'"),
    ],
)
def test_mistakes(options: list[str], code: int, reason: str, trained: Path, tmp_path: Path, fedamole: Any) -> None:
    result = fedamole("merge", trained, *options, "--out", "merged")
    assert (result.code, reason in result.error) == (code, True), result.err
    assert not (tmp_path / "merged").exists()


def test_an_existing_folder_is_left_alone(trained: Path, tmp_path: Path, fedamole: Any) -> None:
    (tmp_path / "merged").mkdir()
    result = fedamole("merge", trained, "--out", "merged")
    assert result.code == 5
    assert "merged already exists and is not overwritten" in result.error
    assert not list((tmp_path / "merged").iterdir())


def test_folders_that_cannot_be_merged(trained: Path, tmp_path: Path, fedamole: Any) -> None:
    first, second = folder_of(trained, "mood"), tmp_path / "other"
    shutil.copytree(folder_of(trained, "chat"), second)

    def error(*arguments: object) -> str:
        result = fedamole("merge", *arguments, "--out", "merged")
        assert not (tmp_path / "merged").exists()
        text: str = result.error
        return text

    assert "reads the clients' data, which are not known" in error(first, second, "--recipe", "regmean")
    assert f"{first} is named twice" in error(first, first, "--recipe", "svd")
    assert "is a run: name one run, or several adapter folders" in error(first, trained, "--recipe", "svd")
    assert "leave them out with several folders" in error(first, second, "--clients", "mood")
    assert "neither a run's folder" in error(first, tmp_path / "missing", "--recipe", "svd")
    identity = second / IDENTITY
    identity.write_text(json.dumps({**json.loads(identity.read_text()), "weights": "another"}))
    assert str(second) in error(first, second, "--recipe", "svd")


def test_what_is_no_lora_is_refused() -> None:
    with pytest.raises(ConfigError, match="soft is a soft prompt, which changes no weights"):
        factors_of(Adapter(PromptSpec(2), {}), "soft")
    lora = adapter_of({"m": (torch.ones(1, 2), torch.ones(3, 1))})
    changed = Adapter(lora.spec, lora.tensors, {"m/delta": torch.ones(3, 2)})
    with pytest.raises(ConfigError, match="changed is no plain LoRA"):
        factors_of(changed, "changed")


def test_factors_have_the_scaling_in_them() -> None:
    lora = adapter_of({"m": (torch.ones(2, 2), torch.ones(3, 2))}, dropout=0.1)
    assert (lora_spec(lora.spec).scaling, lora_spec(lora.spec).dropout) == (1.0, 0.1)
    spec = AdapterSpec(2, 6.0)
    assert torch.equal(factors_of(Adapter(spec, lora.tensors), "x")["m"][1], torch.full((3, 2), 3.0))
