"""Model cards: true, loadable as they say, accepted by the hub's own reader, and without anything private."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tests.deployment.test_client_handler import RUN_ID, ManualServer, ask, client

from fedamole.data.manifest import ClientRecord, read_manifest
from fedamole.engine.messages import TEST, Request
from fedamole.experiment import resume
from fedamole.federation.progress import ProgressListener
from fedamole.personal.saved_models import find_model, open_bank
from fedamole.reporting.card import card, write_cards
from fedamole.reporting.page.content import content
from fedamole.reporting.page.reading import read_folders
from fedamole.runs.run_folder import RunFolder

__all__ = ["client"]

TWO_ROWS = ("fedit", "evaluation.pre_aggregation=true")


def text_of(run: Path, who: str, folder: str = "adapter") -> str:
    return (run / "clients" / who / folder / "README.md").read_text()


def table(text: str, heading: str) -> dict[str, list[str]]:
    """The first table under a heading, by its first column."""
    part = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


def test_every_saved_model_has_a_card_that_the_hub_can_read(runs: Any) -> None:
    run = runs("fedamole")
    folders = sorted(run.glob("clients/*/adapter"))
    assert len(folders) == 4
    for folder in folders:
        result = ModelCard.load(folder / "README.md")
        data = result.data.to_dict()
        assert data.pop("model-index")[0]["name"] == f"fedamole {folder.parent.name}"
        assert data == {
            "library_name": "peft",
            "pipeline_tag": "text-generation",
            "license": "other",
            "license_name": "unspecified",
            "tags": ["fedamole", "federated-learning", "personalised"],
        }
        assert result.text.strip().startswith(f"# A personal model of {folder.parent.name}\n")


def test_its_numbers(runs: Any) -> None:
    run, names = runs("fedamole"), {"entail": "accuracy", "chat": "rouge_l"}
    rows = json.loads((run / "summary.json").read_text())["rows"]
    (record,) = (client for client in read_manifest(run / "manifest.json").clients if client.client == "chat")
    for who, headline in names.items():
        scores, own = table(text_of(run, who), "Test scores"), rows["fedamole"]["clients"][who]
        assert scores["model"] == [headline, "loss"]
        assert scores["this model"] == [f"{own['score']:.1f}", f"{own['loss']:.4f}"]
        assert scores["untuned base"][1] == f"{rows['base']['clients'][who]['loss']:.4f}"
        assert scores["constant answer (the most frequent)"] == [f"{rows['majority']['clients'][who]['score']:.1f}", ""]
    text = text_of(run, "chat")
    assert table(text, "Data")["train"] == [str(len(record.train.rows))]
    assert "answers in free text" in text
    assert "answers chosen from a closed list" in text_of(run, "entail")
    assert table(text, "Base")["weights"] == [json.loads((run / "run.json").read_text())["base"]["weights"]]
    assert table(text, "Method")["`method.rank`"] == ["2"]
    assert f"saved in round {rows['fedamole']['best_round']} of 0 to 2" in text


def test_its_round_is_the_clients_own_where_each_has_one(runs: Any) -> None:
    run = runs("fedamole", "evaluation.best_round=client")
    rounds = json.loads((run / "summary.json").read_text())["rows"]["fedamole"]["best_round"]
    for name in ("chat", "mood"):
        assert f"saved in round {rounds[name]} of 0 to 2" in text_of(run, name)


def test_a_second_row_has_its_own(runs: Any) -> None:
    rows = json.loads((runs(*TWO_ROWS) / "summary.json").read_text())["rows"]
    for row, folder in (("fedit", "adapter"), ("fedit_ft", "adapter-fedit_ft")):
        text = text_of(runs(*TWO_ROWS), "mood", folder)
        assert table(text, "Test scores")["this model"][1] == f"{rows[row]['clients']['mood']['loss']:.4f}"
        assert ("after local training, before the aggregation" in text) == (row == "fedit_ft")


@pytest.mark.parametrize("arguments", [("fedamole",), TWO_ROWS, ("feddpa",)], ids=lambda words: words[0])
def test_nothing_private(arguments: tuple[str, ...], runs: Any, tiny: Path) -> None:
    """No text or label of any row, no path, no other client's name."""
    values = {
        str(value)
        for path in tiny.glob("*.jsonl")
        for row in map(json.loads, path.read_text().splitlines())
        for key, cell in row.items()
        for value in ([turn["content"] for turn in cell] if key == "messages" else [cell])
        if not isinstance(cell, int)
    } | {"Maybe"}
    assert len(values) > 200
    run = runs(*arguments)
    for path in run.glob("clients/*/adapter*/README.md"):
        text, own = path.read_text(), path.parts[-3]
        assert not [value for value in values if re.search(rf"\b{re.escape(value)}\b", text)]
        assert not [part for part in (str(tiny), str(run), str(Path.home()), "/tmp") if part in text]
        others = {"entail", "mood", "chat", "plain"} - {own}
        assert not [other for other in others if re.search(rf"\b{other}\b", text)]
        assert "by its folder on the machine that trained it" in text


def test_a_card_lists_what_an_adapter_contains_besides_weights(runs: Any) -> None:
    """FedDPA keeps hidden states of prompts in adapter_config.json."""
    seen = json.loads((runs("feddpa") / "clients/mood/adapter/adapter_config.json").read_text())["references"]
    assert f"hidden states for {len(seen)} of the client's own prompts" in text_of(runs("feddpa"), "mood")
    assert "hidden states" not in text_of(runs("fedamole"), "mood")
    assert "the other clients' data" not in text_of(runs("local_only"), "mood")


@pytest.mark.parametrize("method", ["fedamole", "local_only", "fedprompt"])
def test_its_ways_to_load_it(method: str, runs: Any, tiny: Path) -> None:
    """The card's own lines, with the two folders filled in, give the model of the bank."""
    folder = runs(method) / "clients/mood/adapter"
    text = (folder / "README.md").read_text()
    assert ("import fedamole  # registers" in text) == (method == "fedamole")
    bank, adapters = open_bank([find_model(runs(method), "mood")], "cpu")
    bank.load(adapters)
    ids = (5, 9, 14, 33)
    with torch.no_grad():
        expected = bank.base.model(input_ids=torch.tensor([bank.prefix(ids)])).logits[0, -1]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        results: dict[str, Any] = {}
        exec(block.replace("path/to/this/folder", str(folder)).replace("path/to/the/base", str(tiny / "base")), results)
        with torch.no_grad():
            logits = results["model"](input_ids=torch.tensor([ids])).logits[0, -1]
        assert torch.allclose(logits.cpu(), expected, atol=1e-4)
        assert results["tokenizer"].eos_token == "<end>"


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "1e3", "no"])
def test_a_base_of_the_hub(name: str, runs: Any) -> None:
    """Named in the front matter as text, also where YAML would read something else."""
    folder = RunFolder.open(runs("local_only"))
    at = folder.path / "clients/mood/adapter"
    adapter, identity = (json.loads((at / file).read_text()) for file in ("adapter_config.json", "base_identity.json"))
    (record,) = (client for client in read_manifest(folder.path / "manifest.json").clients if client.client == "mood")
    config = {**runs.load("local_only").tables()}
    summary = folder.read_json("summary.json")
    text = card(
        folder.about, config, summary, record, "local_only", {**adapter, "base_model_name_or_path": name}, identity
    )
    assert vars(ModelCard(text).data)["base_model"] == name
    assert table(text, "Base")["base"] == [name]
    assert f'base = "{name}"' in text
    assert "on the machine" not in text


def test_equal_runs_have_equal_cards_and_an_edited_one_stays(runs: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs("fedit"), tmp_path / "run"))
    before = {path.name: text_of(run, path.name) for path in (run / "clients").iterdir()}
    assert before == {name: text_of(runs.fresh("fedit"), name) for name in before}
    (run / "clients/mood/adapter/README.md").write_text("mine")
    (run / "clients/chat/adapter/README.md").unlink()  # killed between the summary and the cards
    shutil.rmtree(run / "clients/plain/adapter")
    resume(run, ProgressListener())
    assert text_of(run, "mood") == "mine"
    assert text_of(run, "chat") == before["chat"]
    assert not (run / "clients/plain/adapter").exists()


def test_a_server_has_no_model_and_no_card(runs: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs("fedit"), tmp_path / "run"))
    shutil.rmtree(run / "clients")
    write_cards(RunFolder.open(run))
    assert not (run / "clients").exists()


def test_a_deployed_client_writes_its_own(client: Any, tiny: Path, tmp_path: Path) -> None:
    """Once, when it sums the run up; asked for the test again, it leaves the card as it is."""
    server, host = ManualServer(tiny / "config.toml", "local_only"), client("one")
    ask(host, server.join())
    ask(host, server.update(0, -1))
    for _ in range(2):
        assert ask(host, Request(RUN_ID, 0, TEST, last=0, best={"local_only": 0})).failed is None
        (path,) = (tmp_path / "one").rglob("README.md")
        assert path.parts[-3:] == ("entail", "adapter", "README.md")
        changed = path.stat().st_mtime_ns
        result = ModelCard.load(path)
        assert result.text.strip().startswith("# A personal model of entail")
        assert "saved in round 0 of 0 to 5" in result.text
        assert str(tmp_path) not in path.read_text()
    assert path.stat().st_mtime_ns == changed


def test_names_are_written_safely(runs: Any) -> None:
    """A value with a bar must not end its cell."""
    folder = RunFolder.open(runs("local_only"))
    record = read_manifest(folder.path / "manifest.json").clients[0]
    assert isinstance(record, ClientRecord)
    adapter = {"base_model_name_or_path": "a|b", "peft_type": "LORA"}
    identity = {"weights": "w", "tokenizer": "t", "targets": "m"}
    config = runs.load("local_only").tables()
    text = card(folder.about, config, folder.read_json("summary.json"), record, "local_only", adapter, identity)
    assert "| base | a\\|b |" in text


def test_what_comes_from_a_folder_stays_text(runs: Any) -> None:
    """A version, a base and settings are whatever the folder says; a card shows them and does nothing of theirs."""
    evil = "</script><img src=x onerror=alert(1)>[link=http://x](http://x)\n# h\x1b[31m\u202e|`"
    run = runs("fedamole")
    about, record = RunFolder(run).about, read_manifest(run / "manifest.json").clients[0]
    config, summary = RunFolder(run).tables(), RunFolder(run).read_json("summary.json")
    config["method"][evil] = evil
    adapter = json.loads((run / "clients" / record.client / "adapter" / "adapter_config.json").read_text())
    identity = dict.fromkeys(("weights", "tokenizer", "targets"), evil)
    text = card(
        {**about, "fedamole": evil},
        config,
        summary,
        record,
        "fedamole",
        {**adapter, "base_model_name_or_path": evil},
        identity,
    )
    assert not set(text) & {"\x1b", "\u202e"}
    assert "\n# h" not in text
    outside = re.sub(r"(?s)```.*?```|(`+)[^`].*?\1", "", text[text.index("\n---\n") :])
    assert "<img" not in outside
    assert not re.search(r"(?<!\\)\]\(", outside)
    assert "://" not in outside


def test_a_private_run_shows_what_each_client_has_spent_and_what_that_does_not_cover(runs: Any) -> None:
    """In summary.json, in the card and on the page; Ditto's own LoRA is trained without noise."""
    run = runs.fresh("fedit", "federation.rounds=2", "privacy.epsilon=8")
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    last = {line["client"]: line["epsilon"] for line in lines if line["split"] == "train"}
    assert summary["epsilon"] == last
    text = text_of(run, "mood")
    assert f"has epsilon {last['mood']:.2f} at delta 1e-05 for each of its training examples" in text
    assert "computed from noised values alone" in text
    assert "They are not noised, and not covered by the epsilon below." in text
    page = content(read_folders([run]))
    settings = dict(page["about"]["lines"])
    assert settings["Differential privacy"][0].startswith("epsilon at most 8 at delta 1e-05 for each training example")
    assert "not noised" in settings["Differential privacy"][0]
    assert "not noised" in page["test"]["caption"]
    assert [line[-1] for line in page["test"]["body"]][:4] == [f"{last[name]:.2f}" for name in sorted(last)]
    ditto = runs.fresh("ditto", "federation.rounds=1", "privacy.epsilon=8")
    assert "epsilon does not cover it: do not publish it" in text_of(ditto, "mood")
    assert "psilon" not in text_of(runs("fedit"), "mood")
