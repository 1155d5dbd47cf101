"""How many clients fit, and how well that is foretold."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedamole import planning
from fedamole.cli.main import app
from fedamole.config import load_config
from fedamole.data.manifest import load_federation
from fedamole.data.settings import PartitionSettings, SourceSettings
from fedamole.errors import BaseModelError, ConfigError
from fedamole.experiment import plan, plan_without_data, prepare
from fedamole.methods import METHODS
from fedamole.model.base import BaseSettings
from fedamole.model.memory import HEADROOM, free_bytes, group_bytes, used_bytes
from fedamole.model.weightless import BYTES_IN_4BIT, weight_bytes, weightless_base


def test_the_group_fills_the_free_memory(runs: Any, monkeypatch: Any) -> None:
    config = runs.load("fedamole", "run.group=0")
    prepared = prepare(config)
    needed = {clients: planning._group_bytes(config, prepared.base, clients, 20_000) for clients in (1, 2, 3, 4)}
    monkeypatch.setattr(planning, "_sizes", lambda *_: ([20_000], [1]))
    for free, group in ((0, 1), (needed[1], 1), (needed[2], 2), (needed[3] + 1000, 3), (2**40, 4)):
        monkeypatch.setattr(planning, "free_bytes", lambda _, free=free: free / HEADROOM + 1)
        assert planning.chosen_group(config, prepared.base, prepared.clients) == group
    cohort = runs.load("fedamole", "run.group=0", "federation.cohort=0.5")
    assert planning.chosen_group(cohort, prepared.base, prepared.clients) == 2


def test_what_a_group_takes(runs: Any) -> None:
    """16 bytes a number and client; per token 24 values of 4 bytes in 2 layers of 32, and 8 bytes for half the 340
    logits."""
    base = prepare(runs.load("fedamole")).base
    vocabulary = base.model.config.vocab_size
    assert group_bytes(base, 3, 1000, 0) == 48_000
    assert group_bytes(base, 0, 0, 10) == 10 * (24 * 2 * 32 * 4 + vocabulary * 4)
    base.gradient_checkpointing = True
    assert group_bytes(base, 0, 0, 10) == 10 * (24 * 32 * 4 + vocabulary * 4)


def test_on_a_cpu_long_passes_are_cut_and_large_groups_gain_nothing(runs: Any, monkeypatch: Any) -> None:
    """4 clients x 2 rows x 96 tokens: read at once as far as TOKENS_AT_ONCE goes, but a client's own rows together."""
    config = runs.load("fedamole", "run.group=0")
    prepared = prepare(config)
    base, tokens_of_one = prepared.base, 2 * 96
    for at_once, tokens in (
        (10**9, [tokens_of_one, 4 * tokens_of_one]),
        (2 * tokens_of_one, [tokens_of_one, 2 * tokens_of_one]),
        (1, [tokens_of_one, tokens_of_one]),
    ):
        monkeypatch.setattr(planning, "TOKENS_AT_ONCE", at_once)
        results = [planning._group_bytes(config, base, clients, 1000) for clients in (1, 4)]
        assert results == [group_bytes(base, clients, 1000, n) for clients, n in zip((1, 4), tokens, strict=True)]
    monkeypatch.setattr(planning, "free_bytes", lambda _: 2**50)
    for most, group in ((16, 4), (3, 3)):
        monkeypatch.setattr(planning, "MOST_ON_CPU", most)
        assert planning.chosen_group(config, base, prepared.clients) == group


def test_a_set_group_is_kept_and_the_chosen_one_written_down(runs: Any) -> None:
    assert prepare(runs.load("fedit", "run.group=3")).config.run.group == 3
    folder = runs("fedit", "run.group=0")
    assert "group = 4" in (folder / "config.toml").read_text(), "so that a resumed run groups as before"


def test_memory_is_measured() -> None:
    import torch

    device = torch.device("cpu")
    assert 2**26 < used_bytes(device) < 2**36
    assert free_bytes(device) > 2**26


def test_the_planned_memory_is_close_to_the_measured_peak(runs: Any) -> None:
    """A fresh process, as the peak is the whole process's: the estimate is within a quarter of what was measured."""
    config, folder = runs.config, runs.free()
    overrides = ["method.name=fedamole", "run.group=4", f"run.folder={folder}", "federation.rounds=1"]
    subprocess.run([sys.executable, "-m", "fedamole", "run", str(config), *overrides], check=True, capture_output=True)
    command = [sys.executable, "-m", "fedamole", "plan", str(config), *overrides[:2], "--json"]
    done = subprocess.run(command, check=True, capture_output=True)
    measured = json.loads((folder / "summary.json").read_text())["peak_memory_mib"]
    planned = json.loads(done.stdout)
    assert planned["group"] == 4
    assert planned["memory_mib"] == pytest.approx(measured, rel=0.25)


def test_plan_and_run_say_it(runs: Any, tmp_path: Path) -> None:
    assert plan(runs.load("fedit", "run.group=3")).group == 3
    shown = CliRunner().invoke(app, ["plan", str(runs.config), "method.name=fedit", "run.group=3"])
    assert "MiB with 3 clients in lock-step (run.group)" in shown.output
    overrides = ["method.name=fedit", f"run.folder={tmp_path / 'run'}", "federation.rounds=1"]
    ran = CliRunner().invoke(app, ["run", str(runs.config), *overrides])
    assert "MiB with 2 clients in lock-step" in ran.output


# --- without data -----------------------------------------------------------------------------------------------


def config_without_data(folder: Path, partition: str, *arguments: str) -> Any:
    """A config of data that do not exist on a base of which there is nothing but a config.json."""
    base = folder / "shapes"
    base.mkdir(exist_ok=True)
    facts = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 256,
    }
    (base / "config.json").write_text(json.dumps(facts))
    path = folder / "mine.toml"
    path.write_text(
        '[base]\nmodel = "./shapes"\n[training]\nmax_length = 64\nlocal_steps = 7\n'
        f'[[data.source]]\nname = "a"\npath = "nowhere.jsonl"\npartition = {partition}\n'
    )
    return load_config(path, arguments)


TEN = '{ kind = "iid", clients = 10 }'


@pytest.mark.parametrize("clients", [10, 50])
@pytest.mark.parametrize("name", sorted(name for name in METHODS if not name.endswith("_ft")))
def test_every_method_is_planned_without_data(name: str, clients: int, tmp_path: Path) -> None:
    overrides = (f"method.name={name}", "data.public.path=nowhere.jsonl")
    planned = plan_without_data(config_without_data(tmp_path, f'{{ kind = "iid", clients = {clients} }}', *overrides))
    assert [row["client"] for row in planned.clients] == [f"a-{index:02d}" for index in range(clients)]
    steps = 7 - 7 % METHODS[name].trains_together  # partners take the same steps
    assert (planned.clients_per_round, planned.rounds, planned.steps) == (clients, 30, steps)
    assert planned.targets == 4
    assert planned.adapter_parameters > 0
    assert planned.bytes_down > 0
    assert planned.memory_mib == pytest.approx(planned.base_mib + planned.mib_per_client)


def test_model_glue_is_planned_where_it_merges_in_the_first_round(tmp_path: Path) -> None:
    """Untrained, the clients' LoRAs are one: the server sends each of them back in the next exchange."""
    overrides = ("method.name=model_glue", "federation.rounds=2")
    once, later = (plan_without_data(config_without_data(tmp_path, TEN, *overrides[:n])) for n in (2, 1))
    assert once.bytes_down > later.bytes_down > 0


@pytest.mark.parametrize(
    ("method", "budget", "steps"), [("ditto", "steps", 3), ("ditto", "paper", 6), ("fedit", "paper", 3)]
)
def test_the_planned_steps_are_those_of_the_budget(method: str, budget: str, steps: int, runs: Any) -> None:
    config = runs.load(method, f"training.budget={budget}")
    assert (plan(config).steps, plan_without_data(config).steps) == (steps, steps)


def test_without_data_is_the_plan_but_for_the_data(runs: Any) -> None:
    """Sizes of the same run with data and base at hand; only a device is not at hand."""
    config = runs.load("fedamole", "run.group=3")
    full, bare = plan(config), plan_without_data(config)
    assert sorted(row["client"] for row in bare.clients) == [row["client"] for row in full.clients]
    for part in ("base_parameters", "targets", "adapter_parameters", "bytes_down", "group", "steps", "rounds"):
        assert getattr(bare, part) == getattr(full, part), part
    assert bare.memory_mib == pytest.approx(bare.base_mib + 3 * bare.mib_per_client)
    assert "1,000 training examples for each client" in bare.assumed


def test_a_manifest_gives_clients_and_counts(runs: Any, tmp_path: Path) -> None:
    config = runs.load("fedit")
    manifest = tmp_path / "m.json"
    manifest.write_text(load_federation(config.data, Path.cwd()).manifest.to_json())
    stored = runs.load("fedit", f"data.manifest={manifest}", "training.local_epochs=1")
    planned = plan_without_data(stored)
    assert {row["client"]: row["train"] for row in planned.clients} == {
        row["client"]: row["train"] for row in plan(config).clients
    }
    assert planned.steps == plan(stored).steps
    assert planned.assumed == "clients and example counts of data.manifest"


def test_a_deployment_is_planned_by_the_names_of_its_clients(tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text('[deployment]\nclients = ["a", "b", "c"]\n[base]\nmodel = "bundled"\n')
    config = load_config(tmp_path / "d.toml")
    assert [row["client"] for row in plan_without_data(config).clients] == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="fedamole plan --without-data"):
        plan(config)


def test_names_of_clients_without_data() -> None:
    def names(**settings: Any) -> list[str]:
        return planning._names_without_data(SourceSettings("s", path="p", partition=PartitionSettings(**settings)))

    assert names() == ["s"]
    assert names(kind="iid", clients=2) == ["s-00", "s-01"]
    assert names(kind="dirichlet", by="x", alpha=0.1, clients=101)[-1] == "s-100"
    assert len(names(kind="classes", by="x", classes_per_client=1, clients=3)) == 3
    with pytest.raises(ConfigError, match=r"source 's': a client per value of 'x'.*data.manifest.*iid"):
        names(kind="value", by="x")


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("method.experts=5",), ConfigError, "expert"),
        (("training.max_length=999",), ConfigError, "training.max_length = 999: this base has 256 positions"),
        (("base.model=some/model",), BaseModelError, "its shapes are not in this package, which has meta-llama"),
        (("base.targets=['w']",), BaseModelError, "no linear is called 'w'"),
        (("evaluation.pre_aggregation=true",), ConfigError, "scored before the aggregation anyway"),
    ],
)
def test_what_cannot_be_planned(
    arguments: tuple[str, ...], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        plan_without_data(config_without_data(tmp_path, TEN, *arguments))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "nothing"}'])
def test_a_folder_without_shapes(text: str, tmp_path: Path) -> None:
    config = config_without_data(tmp_path, TEN)
    (tmp_path / "shapes" / "config.json").write_text(text)
    with pytest.raises(BaseModelError, match=r"cannot read shapes from its config.json"):
        plan_without_data(config)


def test_two_sources_with_a_client_of_one_name(tmp_path: Path) -> None:
    config = config_without_data(tmp_path, TEN)
    double = dataclasses.replace(config.data, source=(*config.data.source, SourceSettings("a-00", path="b.jsonl")))
    with pytest.raises(ConfigError, match="client 'a-00' comes from two sources"):
        planning.clients_without_data(double, Path.cwd())


def test_bytes_of_the_base() -> None:
    """Llama-3.2-1B: 1,235,814,400 weights, of which 262,668,288 are embeddings and 67,584 no matrix."""
    base = weightless_base(BaseSettings("meta-llama/Llama-3.2-1B"), Path.cwd())
    assert {str(weight.device) for weight in base.model.parameters()} == {"meta"}
    assert base.max_positions == 131_072
    assert weight_bytes(base, "none") == 2 * 1_235_814_400
    matrices = 1_235_814_400 - 128_256 * 2048 - 33 * 2048
    assert weight_bytes(base, "4bit") == 2 * (128_256 * 2048 + 33 * 2048) + BYTES_IN_4BIT * matrices


def test_memory_follows_the_settings(tmp_path: Path) -> None:
    usual, twice = (plan_without_data(config_without_data(tmp_path, TEN, *more)) for more in ((), ("run.group=2",)))
    assert (usual.group, twice.group) == (1, 2)
    assert twice.memory_mib - usual.memory_mib == pytest.approx(usual.mib_per_client)
    full_precision = plan_without_data(config_without_data(tmp_path, TEN, "base.dtype=float32"))
    assert full_precision.base_mib == pytest.approx(2 * usual.base_mib)
    saved = plan_without_data(config_without_data(tmp_path, TEN, "base.gradient_checkpointing=true"))
    assert saved.mib_per_client < usual.mib_per_client


def test_the_command_says_what_it_assumes(tmp_path: Path) -> None:
    config_without_data(tmp_path, TEN)
    command = ["plan", str(tmp_path / "mine.toml"), "--without-data"]
    shown = CliRunner().invoke(app, command).output
    for part in ("10 clients", "1,000 training examples for each", "MiB on a GPU with run.group = 1", "feasible"):
        assert part in shown
    assert planning.NOT_INCLUDED in shown
    as_json = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert as_json["clients"][0] == {"client": "a-00", "train": planning.ASSUMED_EXAMPLES}


def test_a_plan_says_what_others_can_compute(runs: Any) -> None:
    """Four clients, 12 experts of 2 holders: 6 held on average at rank 2, so 2 x (1 + 6) = 14 equations per linear and
    round, 28 of the two of the first layer; 32 unknowns in two rounds. mood has fewest rows."""
    config = runs.load("fedamole")
    output = " ".join(plan(config).exposure)
    assert "Either of the two can subtract its own" in output
    assert "3 clients together can compute the last one's part" in output
    assert "about 14 linear equations" in output
    assert "of width 32) these determine it after 2 rounds" in output
    rows = {row["client"]: row for row in plan(config).clients}
    few = rows["mood"]
    assert f"an update of mood is about 6 of its {few['train']} training rows" in output, "3 steps of 2"
    assert f"mean embeddings are about {few['embedding']} rows" in output
    assert "mean embeddings" not in " ".join(plan(runs.load("fedit")).exposure)
    alone = planning.exposure(runs.load("local_only"), 4)
    assert alone == ["Nothing of the training is sent: the coordinator gets only the losses and scores of each client."]
    two = " ".join(planning.exposure(runs.load("fedit"), 2))
    assert "Two clients take part" in two
    assert "Two clients take part" not in " ".join(planning.exposure(runs.load("fedit"), 3))


def test_a_deployment_is_planned_as_the_server_runs_it(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('[deployment]\nclients = ["a", "b", "c", "d", "e", "f"]\n[base]\nmodel = "bundled"\n')
    result = CliRunner().invoke(app, ["plan", str(config), "--without-data"])
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "every expert is held by 3 clients" in output
    config.write_text('[deployment]\nclients = ["a", "b"]\n[base]\nmodel = "bundled"\n')
    refused = CliRunner().invoke(app, ["plan", str(config), "--without-data"])
    assert "min_holders" in str(refused.exception)
