"""The client's side: what is warned of, and what lies where."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamole.data.examples import Example, Shard
from fedamole.errors import DataError
from fedamole.experiment import prepare, worker_of
from fedamole.federation.client_data import client_data
from fedamole.federation.probe import ProbeCounts, draw_examples
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.batch import Ids, TokenPair
from fedamole.model.params import Adapter, new_shared
from fedamole.model.pretrained import load_adapter
from fedamole.runs.run_folder import RunFolder


def test_cut_prompts_are_counted_in_a_warning(runs: Any, caplog: Any) -> None:
    prepared = prepare(runs.load("local_only"))
    assert "cut" not in caplog.text
    cut = prepare(runs.load("local_only", "training.max_length=24"))
    messages = {record.args[0]: record.args for record in caplog.records if "cut to fit" in record.msg}
    assert messages
    for client, (_, count, limit, _) in messages.items():
        longer = sum(
            len(row.prompt) + max(map(len, (row.answer, *row.options))) > 24
            for split in ("train", "embedding", "validation", "test")
            for row in getattr(prepared.clients[client], split).rows
        )
        assert (count, limit) == (longer, 24)
        rows = cut.clients[client].train.rows
        assert max(len(row.prompt) + len(row.answer) for row in rows) <= 24
    assert set(messages) == {
        name
        for name, data in prepared.clients.items()
        if any(len(r.prompt) + max(map(len, (r.answer, *r.options))) > 24 for r in data.train.rows)
    }


def test_a_limit_that_no_answer_fits_names_client_and_setting(runs: Any) -> None:
    short = Example("a prompt\n", "", "", "yes")
    rows = (short, short)
    shard = Shard("mia", rows, rows, rows, (Example("a prompt\n", "", "", "far too long " * 9),))
    with pytest.raises(DataError, match=r"client mia: no test example fits into training.max_length = 16"):
        client_data(shard, prepare(runs.load("local_only")).base.tokenizer, 16)


def test_text_of_special_tokens_is_counted_in_a_warning(runs: Any, caplog: Any) -> None:
    plain, special = Example("a prompt\n", "", "", "yes"), Example("a <end> prompt\n", "", "", "yes")
    tokenizer = prepare(runs.load("local_only")).base.tokenizer
    assert "special token" not in caplog.text
    data = client_data(Shard("mia", (special, plain), (plain,), (special,), (plain,)), tokenizer, 96)
    assert "client mia: 2 of 5 examples hold the text of a special token" in caplog.text
    assert tokenizer.decode(data.train.rows[0].prompt) == "a <end> prompt\n"
    assert tokenizer.eos_token_id not in data.train.rows[0].prompt


def test_what_cannot_become_tokens_names_the_client(runs: Any) -> None:
    plain, broken = Example("a prompt\n", "", "", "yes"), Example("a \ud83d\n", "", "", "yes")
    tokenizer = prepare(runs.load("local_only")).base.tokenizer
    with pytest.raises(DataError, match=r"client mia, validation data: text 2 of 2 holds half a character"):
        client_data(Shard("mia", (plain,), (plain,), (plain, broken), (plain,)), tokenizer, 96)


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
        ("feddpa", "train", 1, 5, 0),  # prompts that later ones are compared with
    ],
)
def test_examples_looked_at_are_counted(method: str, split: str, looks: int, most: int, first: int, runs: Any) -> None:
    data = prepare(runs.load("fedit")).clients
    lines = [json.loads(line) for line in (runs(method) / "metrics.jsonl").open()]
    lines = [line for line in lines if line["split"] == split and line["round"] >= 0]
    assert len(lines) == 12
    for line in lines:
        examples = min(most, len(data[line["client"]].embedding.rows))
        assert line.get("probed", 0) == (looks * examples if line["round"] >= first else 0)


def test_who_looks_at_nothing_counts_nothing(runs: Any) -> None:
    assert "probed" not in (runs("fedit") / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in (runs("fedit") / "metrics.jsonl").open()]
    assert {line["forward_tokens"] for line in lines if line["split"] == "train"} == {0}
    assert not any("forward_tokens" in line for line in lines if line["split"] != "train")


def test_the_embedding_split_counts_as_looked_at(runs: Any) -> None:
    """FedAMoLE reads all of it once a round, prompts and answers, after training."""
    data = prepare(runs.load("fedamole")).clients
    lines = [json.loads(line) for line in (runs("fedamole") / "metrics.jsonl").open()]
    trained = [line for line in lines if line["split"] == "train"]
    assert len(trained) == 12
    for line in trained:
        rows = data[line["client"]].embedding.rows
        assert line["probed"] == len(rows)
        assert line["forward_tokens"] == sum(len(row.prompt) + len(row.answer) for row in rows)
    assert not any("probed" in line for line in lines if line["split"] == "validation")


def test_a_look_is_at_drawn_examples_the_same_in_every_round(runs: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Three of a client's examples set aside, not the first three; the same in all rounds, others with another seed."""
    config = runs.load("ifca_lora", "data.embedding_share=0.5")
    prepared = prepare(config)
    seen: list[list[TokenPair]] = []

    def losses(bank: Bank, clients: list[list[TokenPair]], batch_tokens: int) -> list[float]:
        seen.append(clients[0])
        return [0.0] * len(clients)

    def last_hidden(clients: list[list[Ids]]) -> torch.Tensor:
        seen.append([(prompt, ()) for prompt in clients[0]])
        return torch.ones(1)

    data, bank = prepared.clients["entail"], Bank(prepared.base)
    monkeypatch.setattr("fedamole.federation.probe.mean_losses", losses)
    monkeypatch.setattr(bank, "last_hidden", last_hidden)
    adapter = Adapter(AdapterSpec(2), new_shared(prepared.base.shapes, 2, torch.Generator()))
    for seed, round_ in ((0, 0), (0, 5), (1, 0)):
        folder = RunFolder.create(tmp_path / f"{seed}-{round_}", "", "", "ifca_lora", prepared.base.identity)
        worker = worker_of(replace(config, run=replace(config.run, seed=seed)), bank, folder)
        client = worker.factory.client(data, round_, ProbeCounts())
        client.probe.losses([adapter], 3)
        client.probe.hidden_states(adapter, 2)
    rows = data.embedding.pairs()
    assert seen[0] == seen[2] == draw_examples(rows, 3, 0, "losses", "entail")
    assert seen[1] == seen[3] == [(prompt, ()) for prompt, _ in draw_examples(rows, 2, 0, "hidden", "entail")]
    assert seen[4] != seen[0]
    assert [len(examples) for examples in seen] == [3, 2] * 3


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
        for line in map(json.loads, (folder / "assignment.jsonl").open())
        if line["round"] == best
    }
    assert len(held) == 16
    for client in ("chat", "entail", "mood", "plain"):
        pattern = json.loads((folder / f"clients/{client}/adapter/adapter_config.json").read_text())["expert_pattern"]
        for module, experts in pattern.items():
            assert experts == held[client, module]
