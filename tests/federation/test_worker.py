"""The client's side: what is warned of, and what lies where."""

import json
from typing import Any

import pytest

from fedamole.data.examples import Example, Shard
from fedamole.errors import DataError
from fedamole.experiment import prepare
from fedamole.federation.worker import client_data
from fedamole.model.pretrained import load_adapter


def test_cut_prompts_are_counted_in_a_warning(runs: Any, caplog: Any) -> None:
    whole = prepare(runs.load("local_only"))
    assert "cut" not in caplog.text
    cut = prepare(runs.load("local_only", "training.max_length=24"))
    messages = {record.args[0]: record.args for record in caplog.records if "cut to fit" in record.msg}
    assert messages
    for client, (_, count, limit, _) in messages.items():
        longer = sum(
            len(row.prompt) + max(map(len, (row.answer, *row.options))) > 24
            for split in ("train", "embedding", "validation", "test")
            for row in getattr(whole.clients[client], split).rows
        )
        assert (count, limit) == (longer, 24)
        rows = cut.clients[client].train.rows
        assert max(len(row.prompt) + len(row.answer) for row in rows) <= 24
    assert set(messages) == {
        name for name, data in whole.clients.items()
        if any(len(r.prompt) + max(map(len, (r.answer, *r.options))) > 24 for r in data.train.rows)
    }  # fmt: skip


def test_a_limit_that_no_answer_fits_names_client_and_setting(runs: Any) -> None:
    short = Example("a prompt\n", "", "", "yes")
    rows = (short, short)
    shard = Shard("mia", rows, rows, rows, (Example("a prompt\n", "", "", "far too long " * 9),))
    with pytest.raises(DataError, match=r"client mia: no test example fits into training.max_length = 16"):
        client_data(shard, prepare(runs.load("local_only")).base.tokenizer, 16)


def test_a_report_has_loss_steps_time_and_memory(runs: Any) -> None:
    lines = [json.loads(line) for line in (runs("fedit") / "metrics.jsonl").open()]
    for line in lines:
        if line["split"] == "train":
            assert line["steps"] == 3
            assert line["seconds"] > 0
            assert line["peak_memory_mib"] > 10


@pytest.mark.parametrize(
    ("method", "split", "looks", "most", "first"),
    [
        ("ifca_lora", "train", 3, 64, 1),  # each of its LoRAs, from the round on in which they differ
        ("ifca_lora", "validation", 3, 64, 0),  # once more, to choose the model that is scored
        ("fdlora", "validation", 10, 16, 0),  # ten pairs of weights
    ],
)
def test_examples_looked_at_are_counted(
    method: str, split: str, looks: int, most: int, first: int, runs: Any
) -> None:
    data = prepare(runs.load("fedit")).clients
    lines = [json.loads(line) for line in (runs(method) / "metrics.jsonl").open()]
    lines = [line for line in lines if line["split"] == split and line["round"] >= 0]
    assert len(lines) == 12
    for line in lines:
        examples = min(most, len(data[line["client"]].embedding.rows))
        assert line.get("probed", 0) == (looks * examples if line["round"] >= first else 0)


def test_who_looks_at_nothing_counts_nothing(runs: Any) -> None:
    assert "probed" not in (runs("fedit") / "metrics.jsonl").read_text()


def test_saved_adapters_load_on_their_base_only(runs: Any) -> None:
    base = prepare(runs.load("fedamole")).base
    for method, experts in (("fedamole", True), ("fedit", False)):
        adapter = load_adapter(runs(method) / "clients/mood/adapter", base.identity)
        assert adapter.modules() == sorted(base.shapes)
        assert any("expert-" in key for key in adapter.tensors) == experts


def test_fedamoles_saved_architecture_is_the_one_assigned_before_the_best_round(runs: Any) -> None:
    folder = runs("fedamole")
    best = json.loads((folder / "summary.json").read_text())["rows"]["fedamole"]["best_round"]
    held = {
        (line["client"], line["module"]): line["experts"]
        for line in map(json.loads, (folder / "assignment.jsonl").open()) if line["round"] == best
    }  # fmt: skip
    assert len(held) == 16
    for client in ("chat", "entail", "mood", "plain"):
        pattern = json.loads((folder / f"clients/{client}/adapter/adapter_config.json").read_text())["expert_pattern"]
        for module, experts in pattern.items():
            assert experts == held[client, module]
