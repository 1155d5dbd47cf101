"""Adapters that travel: saved again by PEFT and transformers, from the hub's cache, trained further, exported."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from fedamole import load_personal_model
from fedamole.errors import BaseModelError, RunError
from fedamole.personal.export import export
from fedamole.personal.export_settings import ExportSettings
from fedamole.personal.hub import local_folder
from fedamole.personal.saved_models import find_model, open_bank

IDS = torch.tensor([[5, 9, 14, 33, 7]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=IDS).logits[0, -1]
        return values


@pytest.mark.parametrize("method", ["fedamole", "fedit", "fedprompt"])
def test_saved_again_by_peft(method: str, runs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = load_personal_model(runs(method), "mood", device="cpu")
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "base_identity.json").exists()
    again, _ = load_personal_model(tmp_path / "again", device="cpu")
    assert torch.equal(logits(again), logits(model))
    assert "base_identity.json" in caplog.text
    bank, adapters = open_bank([find_model(tmp_path / "again", None)], "cpu")
    bank.load(adapters)


def test_trained_further_and_saved_by_trainer(runs: Any, tmp_path: Path) -> None:
    model, tokenizer = load_personal_model(runs("fedamole"), "mood", device="cpu", is_trainable=True)
    before = logits(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("amole" in name for name in trained)
    rows = [{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}] * 4
    arguments = TrainingArguments(
        str(tmp_path / "work"), max_steps=2, learning_rate=0.05, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again, _ = load_personal_model(tmp_path / "saved", device="cpu")
    assert torch.allclose(logits(again), logits(model.eval()), atol=1e-6)
    assert not torch.allclose(logits(again), before, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_a_folder_that_names_a_missing_base_and_has_no_identity(runs: Any, tmp_path: Path) -> None:
    """The bundled base must not be taken for it: nothing would show that it is another one."""
    copy = Path(shutil.copytree(runs("fedamole") / "clients/mood/adapter", tmp_path / "copy"))
    (copy / "base_identity.json").unlink()
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/far/away"}))
    with pytest.raises(BaseModelError, match=r"/far/away, the base of .* is not on this machine: pass a copy"):
        load_personal_model(copy)


def test_without_its_file_a_model_in_its_run_is_still_checked(runs: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs("fedit"), tmp_path / "run"))
    (run / "clients/mood/adapter/base_identity.json").unlink()
    load_personal_model(run, "mood", device="cpu")
    about = json.loads((run / "run.json").read_text())
    about["base"]["weights"] = "another"
    (run / "run.json").write_text(json.dumps(about))
    with pytest.raises(BaseModelError, match="was made on another base"):
        load_personal_model(run, "mood", device="cpu")


def in_cache(cache: Path, adapter: Path) -> None:
    """Store an adapter as the hub's client does: blobs, and a snapshot of links to them."""
    repository = cache / "models--ann--my-adapter"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    for number, path in enumerate(sorted(adapter.iterdir())):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")


def test_from_the_hubs_cache_without_a_network(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    in_cache(tmp_path / "cache", runs("fedamole") / "clients/mood/adapter")
    model, _ = load_personal_model("ann/my-adapter", device="cpu")
    expected, _ = load_personal_model(runs("fedamole"), "mood", device="cpu")
    assert torch.equal(logits(model), logits(expected))
    with pytest.raises(RunError, match="ann/other: no such folder here, and not loaded from the Hugging Face hub"):
        load_personal_model("ann/other")
    (tmp_path / "ann").mkdir()
    with pytest.raises(RunError, match="neither a run's folder"):
        load_personal_model("ann/my-adapter")


@pytest.mark.parametrize("path", ["/a/b", "./a", "a", "a/b/c", "../b", Path("a/b"), "a/ b", "~/b"])
def test_paths_are_not_looked_for_on_the_hub(path: Any) -> None:
    assert local_folder(path) == Path(path)


def test_cards_have_the_test_results_as_a_model_index(runs: Any) -> None:
    folder = runs("fedamole")
    card = ModelCard.load(folder / "clients/mood/adapter/README.md")
    scores = json.loads((folder / "summary.json").read_text())["rows"]["fedamole"]["clients"]["mood"]
    results = {result.metric_type: result for result in card.data.eval_results or []}
    headline = "accuracy" if "accuracy" in scores else "rouge"
    assert {kind: result.metric_value for kind, result in results.items()} == {
        headline: scores["score"],
        "loss": scores["loss"],
    }
    assert results["loss"].dataset_type == "private"
    assert card.data.model_name == "fedamole mood"


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_exports_carry_card_and_tokenizer_and_follow_the_umask(to: Any, runs: Any, tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        export(find_model(runs("fedit"), "mood"), tmp_path / "out", ExportSettings(to=to, force=True), device="cpu")
    finally:
        os.umask(previous)
    out = tmp_path / "out"
    modes = {path.name: path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640}, modes
    assert out.stat().st_mode & 0o777 == 0o750
    tokenizer = AutoTokenizer.from_pretrained(out)
    expected, own = load_personal_model(runs("fedit"), "mood", device="cpu")
    assert tokenizer("all is well").input_ids == own("all is well").input_ids
    auto = AutoPeftModelForCausalLM if to == "lora" else AutoModelForCausalLM
    assert torch.allclose(logits(auto.from_pretrained(out)), logits(expected), atol=1e-4)
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == ("peft" if to == "lora" else "transformers")
    report = json.loads((out / "export.json").read_text())
    assert f"{report['losses']['export']:.4f}" in card.text
    assert "## Test scores of the personal model" in card.text
    assert str(tmp_path) not in card.content
    assert str(Path.home()) not in card.content


def test_the_files_of_a_run_follow_the_umask(runs: Any) -> None:
    umask = os.umask(0)
    os.umask(umask)
    files = [path for path in (runs("fedit") / "clients").rglob("*") if path.is_file()]
    assert files
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
