"""Personal models found and loaded again: they are the ones that were trained, or the error says what is missing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedamole import load_personal_model
from fedamole.errors import BaseModelError, RunError
from fedamole.evaluation.generation import generate_answers
from fedamole.personal.saved_models import find_model, open_bank, saved_models

IDS = (5, 9, 14, 33, 7)
IN_A_FRESH_PROCESS = """
import json, sys
import torch
import fedamole
model, tokenizer = fedamole.load_personal_model(sys.argv[1], base=sys.argv[2], device="cpu")
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.tensor([json.loads(sys.argv[3])])).logits[0, -1].tolist()))
"""


def of_bank(run: Path, client: str) -> torch.Tensor:
    """Logits after the last of IDS, of a client's adapter in a bank."""
    bank, adapters = open_bank([find_model(run, client)], "cpu")
    bank.load(adapters)
    with torch.no_grad():
        logits: torch.Tensor = bank.base.model(input_ids=torch.tensor([bank.prefix(IDS)])).logits
        return logits[0, -1]


def of_peft(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([IDS])).logits
        return logits[0, -1]


@pytest.mark.parametrize("method", ["fedamole", "fedit", "fedprompt"])
def test_from_a_run(method: str, runs: Any) -> None:
    model, tokenizer = load_personal_model(runs(method), "mood", device="cpu")
    assert torch.allclose(of_peft(model), of_bank(runs(method), "mood"), atol=1e-5)
    assert not torch.allclose(of_peft(model), of_bank(runs("local_only"), "chat"), atol=1e-2)
    assert not model.training
    assert tokenizer.eos_token == "<end>"


def test_it_answers_as_evaluation_does(runs: Any) -> None:
    model = find_model(runs("fedamole"), "mood")
    bank, adapters = open_bank([model], "cpu")
    bank.load(adapters)
    model, tokenizer = load_personal_model(runs("fedamole"), "mood", device="cpu")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    output = model.generate(input_ids=torch.tensor([IDS]), max_new_tokens=12)[0, len(IDS) :]
    text = tokenizer.decode(output, skip_special_tokens=True).strip()
    assert [text] == generate_answers(bank, [[IDS]], 12, 8192)[0]


def test_from_a_copied_folder_in_a_fresh_process(runs: Any, tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "mood-model"
    shutil.copytree(runs("fedamole") / "clients/mood/adapter", copy)
    arguments = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(copy), str(tiny / "base"), json.dumps(IDS)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    there = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert torch.allclose(there, of_bank(runs("fedamole"), "mood"), atol=1e-5)
    assert [model.client for model in saved_models(copy)] == ["mood-model"]
    assert find_model(runs("fedamole") / "clients/mood/adapter", "mood").run is None


def test_all_of_a_run_and_its_second_row(runs: Any) -> None:
    run = runs("fedit", "evaluation.pre_aggregation=true")
    assert [model.client for model in saved_models(run)] == ["chat", "entail", "mood", "plain"]
    assert find_model(run, "chat", "fedit_ft").folder == run / "clients/chat/adapter-fedit_ft"
    with pytest.raises(RunError, match="no saved model of 'fedit_tf'"):
        saved_models(run, "fedit_tf")


def test_no_such_client_or_none_named(runs: Any) -> None:
    with pytest.raises(RunError, match=r"no client 'mod'.*mean 'mood'.*its clients are chat, entail, mood, plain"):
        find_model(runs("fedamole"), "mod")
    with pytest.raises(RunError, match=r"models of chat, entail, mood, plain: select one with --client"):
        find_model(runs("fedamole"), None)


@pytest.fixture
def own(runs: Any, tmp_path: Path) -> Path:
    """A copy of a run that a test may spoil."""
    return Path(shutil.copytree(runs("fedamole"), tmp_path / "own"))


def test_the_only_client_needs_no_name(own: Path) -> None:
    for name in ("chat", "entail", "plain"):
        shutil.rmtree(own / "clients" / name)
    assert find_model(own, None).client == "mood"


def test_a_client_without_a_model(own: Path) -> None:
    shutil.rmtree(own / "clients/mood/adapter")
    with pytest.raises(RunError, match=r"mood did not train in any round .* its model is the untuned base"):
        find_model(own, "mood")


def test_a_run_that_is_not_finished(own: Path) -> None:
    for path in own.glob("clients/*/adapter"):
        shutil.rmtree(path)
    (own / "summary.json").unlink()
    with pytest.raises(RunError, match=r"not finished \(round 3 of 3\).*`fedamole resume"):
        find_model(own, "mood")


def test_a_servers_folder(own: Path) -> None:
    shutil.rmtree(own / "clients")
    (own / "run.json").write_text(json.dumps({**json.loads((own / "run.json").read_text()), "kind": "server"}))
    with pytest.raises(RunError, match="a coordinator's folder holds no personal model"):
        find_model(own, "mood")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="neither a run's folder"):
        load_personal_model(tmp_path, "mood")


def test_another_base(runs: Any, tiny: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny / "base", tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    name = min(weights)
    save_file({**weights, name: weights[name] + 1e-3}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match="made on another base: its weights hash"):
        load_personal_model(runs("fedamole"), "mood", base=str(other))


def test_a_base_that_is_not_here(runs: Any, tmp_path: Path) -> None:
    """The bundled base is tried, as it lies elsewhere on every machine; this is not the one."""
    copy = Path(shutil.copytree(runs("fedamole") / "clients/mood/adapter", tmp_path / "copy"))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/far/away"}))
    with pytest.raises(
        BaseModelError, match=r"/far/away, the base of .* is not on this machine: pass a copy with --base"
    ):
        load_personal_model(copy)


def test_a_folder_without_its_bases_identity(
    runs: Any, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(runs("fedamole") / "clients/mood/adapter", tmp_path / "copy"))
    (copy / "base_identity.json").unlink()
    model, _ = load_personal_model(copy, base=str(tiny / "base"), device="cpu")
    assert torch.allclose(of_peft(model), of_bank(runs("fedamole"), "mood"), atol=1e-5)
    (warning,) = [record.getMessage() for record in caplog.records if "base_identity" in record.getMessage()]
    assert "copy this file from the adapter folder that was saved first" in warning
