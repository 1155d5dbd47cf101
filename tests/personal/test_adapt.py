"""A new client of a finished federation: the experts choose it, it gets a model, and the run stays to the byte."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedamole.assignment.relevance import choice_probabilities
from fedamole.assignment.reverse_selection import Bounds, select
from fedamole.federation.client_data import client_data
from fedamole.federation.local import embed
from fedamole.federation.record import unpack
from fedamole.methods import METHODS
from fedamole.methods.fedamole import Pool
from fedamole.methods.model_glue import GlueState
from fedamole.model.bank import Bank
from fedamole.model.params import Adapter, expert_ids, expert_keys
from fedamole.model.pretrained import load_adapter
from fedamole.personal.adapt import final_state
from fedamole.personal.saved_models import find_model, load_base_for, saved_models
from fedamole.runs.run_files import SPLITS
from fedamole.runs.run_folder import RunFolder

NEW = "dusk"


@pytest.fixture
def rows(tiny: Path, tmp_path: Path) -> Path:
    """Data like those of the client mood, with other words."""
    table = [json.loads(line) for line in (tiny / "mood.jsonl").read_text().splitlines()]
    for row in table:
        row["text"] = row["text"].replace("day", "night")
    path = tmp_path / f"{NEW}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def joined(fedamole: Any, run: Path, rows: Path, *arguments: str) -> dict[str, Any]:
    result = fedamole("adapt", run, "--data", rows, "--folder", "out", "--json", *arguments)
    assert result.code == 0, result.err
    report: dict[str, Any] = json.loads(result.out)
    return report


def new_adapter(report: dict[str, Any]) -> Adapter:
    return load_adapter(find_model(Path(report["folder"]), report["client"]).folder)


def test_it_joins_after_the_last_round_of_a_run_that_stopped_early(runs: Any, rows: Path, fedamole: Any) -> None:
    """It trains as in the round after the stop: the rate of that round, which is logged with it."""
    stops = ("training.learning_rate=1.0", "federation.rounds=9", "federation.patience=1")
    run = runs("fedit", *stops)
    done = json.loads((run / "summary.json").read_text())["rounds"]
    assert 1 < done < 9, "choose another rate"
    report = joined(fedamole, run, rows)
    lines = map(json.loads, (Path(report["folder"]) / "metrics.jsonl").open())
    assert {line["round"] for line in lines if line["method"] == "fedit"} == {done}


def test_the_run_is_unchanged_and_the_new_folder_is_a_run_folder(
    runs: Any, rows: Path, tmp_path: Path, fedamole: Any
) -> None:
    run = runs("fedamole")
    before = content(run)
    report = joined(fedamole, run, rows)
    assert content(run) == before
    folder = Path(report["folder"])
    assert folder == Path("out") / f"fedamole-{NEW}"
    assert report["validation"][report["kept"]] == min(
        report["validation"][variant] for variant in ("as sent", "trained")
    )
    assert set(report["test"]) == {"base", "majority", report["kept"]}
    assert json.loads((folder / "adapted.json").read_text()) == report
    opened = RunFolder.open(folder)
    assert (opened.kind, opened.finished) == ("client", True)
    assert opened.about["base"] == RunFolder.open(run).about["base"]
    assert opened.about["id"] != report["from"] == RunFolder.open(run).about["id"]
    assert [saved_model.client for saved_model in saved_models(folder)] == [NEW]
    assert (folder / "clients" / NEW / "adapter" / "README.md").exists()
    shown = json.loads(fedamole("show", folder, "--json").out)
    assert f'"{NEW}"' in json.dumps(shown)
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"night" not in everything, "no row of the data is in the folder"
    again = joined(fedamole, run, rows)
    assert again == {**report, "folder": f"{folder}-2"}
    assert fedamole("export", folder, "--out", "lora", "--force").code == 0


def test_the_experts_choose_among_all_clients(runs: Any, rows: Path, fedamole: Any) -> None:
    """Worked out once more from the pool: its embeddings, P over five clients, and the optimum of each module."""
    from fedamole.config import load_config
    from fedamole.data.manifest import load_federation, read_manifest

    run = runs("fedamole")
    report = joined(fedamole, run, rows, "--steps", "0")
    assert report["kept"] == "as sent"
    assert "trained" not in report["validation"]
    state = unpack(Pool, final_state(RunFolder.open(run))[0])
    folder = Path(report["folder"])
    config = load_config(folder / "config.toml")
    shard = load_federation(config.data, Path.cwd(), read_manifest(folder / "manifest.json")).shards[0]
    assert [len(getattr(shard, split)) > 0 for split in SPLITS] == [True] * 4
    bank = Bank(load_base_for(find_model(folder, NEW), "cpu"))
    bank.load([Adapter(config.method.spec(), state.tensors)])
    data = client_data(shard, bank.base.tokenizer, config.training.max_length)
    (means,) = embed(bank, [data.embedding.pairs()], 8192)
    names = sorted((*next(iter(state.held.values())), NEW))
    experts = [f"expert-{expert:02d}" for expert in range(12)]
    result = new_adapter(report)
    lines = {line["module"]: line for line in RunFolder.open(folder).lines("assignment.jsonl")}
    assert set(lines) == set(bank.base.shapes)
    for module in bank.base.shapes:
        known = {name: state.client_embeddings[module][name] for name in names if name != NEW}
        client = {**known, NEW: means[module].token}
        t = torch.stack([client[name] for name in names])
        e = torch.stack([state.expert_embeddings[module][expert] for expert in experts])
        P = choice_probabilities((e.double() @ t.double().T / np.sqrt(2)).numpy())
        X = select(P, Bounds(2, 2, 8), expert_ids=experts, client_ids=names)
        expected = np.flatnonzero(X[:, names.index(NEW)]).tolist()
        assert expert_ids(result.tensors)[module] == expected == lines[module]["experts"]
        column = P[expected, names.index(NEW)]
        assert lines[module]["relevance"] == pytest.approx(column.tolist(), abs=1e-6)
        for expert in expected:
            for key in expert_keys(module, expert):
                assert torch.equal(result.tensors[key], state.tensors[key]), "as the federation left it"


def test_what_no_expert_chooses_is_filled_up_by_relevance(runs: Any, rows: Path, fedamole: Any) -> None:
    """8 experts x 1 choice = 2 each for 4 clients: a fifth can be promised 1, and gets the next most relevant."""
    run = runs("fedamole", "federation.rounds=1", "method.experts=8", "method.expert_choices=1")
    report = joined(fedamole, run, rows, "--steps", "0")
    modules = [len(ids) for ids in expert_ids(new_adapter(report).tensors).values()]
    assert min(modules) >= 2
    assert report["chosen_by"] + report["added"] == sum(modules)
    assert report["added"] > 0


def test_training_starts_from_the_message(runs: Any, rows: Path, fedamole: Any) -> None:
    run = runs("fedamole")
    report = joined(fedamole, run, rows, "--steps", "30")
    assert report["kept"] == "trained"
    assert report["validation"]["trained"] < report["validation"]["as sent"]
    sent = joined(fedamole, run, rows, "--steps", "0")
    assert sent["validation"]["as sent"] == report["validation"]["as sent"]
    assert set(new_adapter(sent).tensors) == set(new_adapter(report).tensors)


@pytest.mark.parametrize("method", ["fedit", "ffa_lora", "fedprompt"])
def test_one_adapter_for_all_is_the_new_ones_too(method: str, runs: Any, rows: Path, fedamole: Any) -> None:
    run = runs(method)
    before = content(run)
    report = joined(fedamole, run, rows, "--steps", "0")
    assert content(run) == before
    state = unpack(load_method(run).records.state, final_state(RunFolder.open(run))[0])
    tensors, member = new_adapter(report).tensors, load_adapter(find_model(run, "mood").folder).tensors
    assert set(tensors) == set(member)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state.tensors.get(name, member[name])), name


def load_method(run: Path) -> Any:
    from fedamole.config import load_config

    return load_config(run / "config.toml").method


def test_a_method_with_nothing_for_a_new_client(runs: Any, rows: Path, tmp_path: Path, fedamole: Any) -> None:
    result = fedamole("adapt", runs("local_only", "federation.rounds=1"), "--data", rows, "--folder", "out")
    assert result.code == 2
    assert "fedamole, " in result.line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--name", "mood"], 2, "already"),
        (["--name", "a b"], 2, "letters"),
        (["--steps", "-1"], 2, "--steps"),
        (["--column", "text"], 2, "new=old"),
        (["--test", "nowhere.jsonl"], 3, "no file"),
    ],
)
def test_a_mistake_leaves_nothing_behind(
    arguments: Sequence[str], code: int, message: str, runs: Any, rows: Path, tmp_path: Path, fedamole: Any
) -> None:
    result = fedamole("adapt", runs("fedamole"), "--data", rows, "--folder", "out", *arguments)
    assert (result.code, message in result.line) == (code, True), result.line
    assert not (tmp_path / "out").exists()


def test_a_coordinators_folder_serves_too(runs: Any, rows: Path, tmp_path: Path, fedamole: Any) -> None:
    """It has the server's state, and nothing of any client."""
    shutil.copytree(runs("fedamole"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "clients")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**about, "kind": "server"}))
    report = joined(fedamole, tmp_path / "run", rows, "--steps", "0")
    there = joined(fedamole, runs("fedamole"), rows, "--steps", "0")
    assert report == {**there, "folder": report["folder"]}
    (tmp_path / "run" / "run.json").write_text(json.dumps({**about, "kind": "client"}))
    refused = fedamole("adapt", "run", "--data", rows, "--folder", "out")
    assert (refused.code, "coordinator" in refused.line) == (5, True)


def test_a_run_without_its_last_state(runs: Any, rows: Path, tmp_path: Path, fedamole: Any) -> None:
    def told(change: Any) -> str:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(runs("fedamole"), tmp_path / "run")
        change(tmp_path / "run")
        result = fedamole("adapt", "run", "--data", rows, "--folder", "out")
        assert result.code == 5, result.err
        line: str = result.line
        return line

    state = max((runs("fedamole") / "checkpoints").glob("*.safetensors")).name
    assert "not finished" in told(lambda run: (run / "summary.json").unlink())
    assert "no checkpoints" in told(lambda run: shutil.rmtree(run / "checkpoints"))
    assert "damaged" in told(lambda run: (run / "checkpoints" / state).write_bytes(b"something else"))


def test_model_glue_gives_its_mixture(runs: Any, rows: Path, fedamole: Any) -> None:
    """As the server has it; only the mixers are trained, and the experts stay."""
    run = runs("model_glue", "federation.rounds=2", "training.local_steps=6")
    state = unpack(GlueState, final_state(RunFolder.open(run))[0])
    assert bool(state.mixture), "choose other settings"
    sent = new_adapter(joined(fedamole, run, rows, "--steps", "0"))
    assert sent.tensors.keys() == state.mixture.keys()
    assert all(torch.equal(sent.tensors[name], tensor) for name, tensor in state.mixture.items())
    report = joined(fedamole, run, rows, "--steps", "4")
    assert report["kept"] == "trained"
    differing = {
        key for key, tensor in new_adapter(report).tensors.items() if not torch.equal(tensor, sent.tensors[key])
    }
    assert differing == {key for key in sent.tensors if "/mixer/" in key}


@pytest.mark.parametrize("method", ["feddat", "fedmoe", "adaptive_experts"])
def test_a_method_without_a_model_for_newcomers_names_others(
    method: str, runs: Any, rows: Path, tmp_path: Path, fedamole: Any
) -> None:
    result = fedamole("adapt", runs(method, "federation.rounds=1"), "--data", rows, "--folder", "out")
    assert result.code == 2
    assert f"cannot join a run of {method}, because this method has no model for a client that took part in no" in (
        result.error
    )
    assert "(fedamole merge RUN --out FOLDER), or use runs of fedamole, fedit" in result.error
    assert not (tmp_path / "out").exists()


def test_which_methods_accept_newcomers() -> None:
    """A pool of experts, or one set of tensors for all clients, which keep nothing else."""
    accepting = {name for name, method in METHODS.items() if method.accepts_newcomers and not name.endswith("_ft")}
    assert accepting == {
        *(
            "fedamole",
            "fedawa",
            "fedit",
            "fedprompt",
            "fedptuning",
            "fedprox",
            "ffa_lora",
            "fedsvd",
            "flash",
            "regmean",
            "feddm",
        ),
        "model_glue",
        "fedaf",
        "data_engine",
        "fedptr",
        "feddpms",
        "steerable",
    }
    assert METHODS["fedit_ft"].accepts_newcomers
