"""Configs are read strictly, can be written and read back, and every key has an effect."""

import dataclasses
import json
import math
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedamole.config import RunSettings, load_config, load_run_config, read_tables, to_config
from fedamole.errors import BaseModelError, ConfigError
from fedamole.evaluation.personal import EvaluationSettings
from fedamole.experiment import prepare
from fedamole.federation.settings import FederationSettings, TrainingSettings
from fedamole.methods import METHODS
from fedamole.model.bank import Bank
from fedamole.model.base import BaseSettings
from fedamole.runs.run_folder import RunFolder
from tests.pairs import preference_overrides

ROOT = Path(__file__).parents[1]
DATA = '[[data.source]]\nname = "a"\npath = "a.jsonl"\n'


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nlocal_stepz = 3\n", "unknown key training.local_stepz; did you mean 'local_steps'"),
        ("[trainning]\nlocal_steps = 3\n", "unknown key trainning; did you mean 'training'"),
        ("[run]\nzzzzzz = 3\n", "unknown key run.zzzzzz; known are device, folder, group, name"),
        ("[method]\nname = 'fedamol'\n", "method.name = 'fedamol': there is no such method; did you mean 'fedamole'"),
        ("[method]\nname = 'fedit'\nexperts = 3\n", "unknown key method.experts"),
        ("[training]\nlocal_steps = 'many'\n", "training.local_steps = 'many': must be a whole number, not str"),
        ("[training]\nlocal_steps = 2.5\n", "training.local_steps = 2.5: must be a whole number, not float"),
        ("[training]\nlocal_steps = true\n", "training.local_steps = True: must be a whole number, not bool"),
        ("[training]\nlearning_rate = '1e-3'\n", "training.learning_rate = '1e-3': must be a number, not str"),
        ("[base]\ngradient_checkpointing = 1\n", "base.gradient_checkpointing = 1: must be true or false, not int"),
        ("[base]\ntargets = 'q_proj'\n", "base.targets = 'q_proj': must be a list, not str"),
        ("[base]\ntargets = [1]\n", "base.targets[0] = 1: must be text in quotes, not int"),
        ("[base]\ndtype = 'half'\n", "base.dtype = 'half': must be one of 'auto', 'float32', 'bfloat16'"),
        ("[run]\nname = 3\n", "run.name = 3: must be text in quotes, not int"),
        ("[method]\nexperts = 'x'\n", "method.experts = 'x': must be a whole number"),
        ("training = 3\n", "training = 3: must be a table; write [training]"),
        ("[federation]\nrounds = 0\n", "federation.rounds = 0: must be at least 1"),
        ("[run]\ngroup = -1\n", "run.group = -1: must be at least 1, or 0 to fill the free memory"),
        ("[federation]\ncohort = 1.5\n", "federation.cohort = 1.5: a fraction of the clients"),
        ("[training]\nlr_decay = 0.0\n", "training.lr_decay = 0.0 above 0"),
        ("[training]\nmax_length = 3\n", "training.max_length = 3: must be at least 8 tokens"),
        ("[training]\nbatch_size = 0\n", "training.batch_size = 0: must be at least 1"),
        ("[training]\nbeta = 0.0\n", "training.beta = 0.0: must be above 0 and at most 1000"),
        ("[training]\nobjective = 'dpo'\n", "training.objective = 'dpo': must be one of 'answer', 'preference'"),
        ("[evaluation]\nbatch_tokens = 0\n", "evaluation.batch_tokens = 0: must be at least 1"),
        ("[method]\nrank = 0\n", "rank = 0: must be at least 1"),
        ("[method]\ndropout = 1.0\n", "dropout = 1.0: must be at least 0 and below 1"),
    ],
)
def test_a_mistake_names_file_key_and_remedy(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", text + DATA)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data\n", "is not TOML"),
        ("[run]\nname = 'x'\n", "data.source is empty: add a [[data.source]]"),
        ("[data]\nmin_examples = 3\n", "data.source is empty"),
        ('[[data.source]]\npath = "a.jsonl"\n', "data.source[0].name is missing"),
        ("extends = 3\n" + DATA, "extends = 3 must be the path of a config"),
        ('extends = "mine.toml"\n' + DATA, "extends = 'mine.toml' leads back to"),
        ('extends = "away.toml"\n' + DATA, "away.toml cannot be read"),
    ],
)
def test_a_file_that_is_no_config(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path / "mine.toml", text))
    assert message in str(caught.value)
    assert "mine.toml" in str(caught.value)


def test_a_key_that_was_renamed(runs: Any, tmp_path: Path) -> None:
    """A config of a user must name the new key; a run that an earlier version stored is still read."""
    config = tmp_path / "old.toml"
    config.write_text((runs("local_only") / "config.toml").read_text().replace("max_wait = 3600.0", "patience = 7.0"))
    error = f"{config}: deployment.patience is now called deployment.max_wait: rename it"
    with pytest.raises(ConfigError, match=re.escape(error)):
        load_config(config)
    assert load_config(config, stored=True).deployment.max_wait == 7.0
    folder = tmp_path / "run"
    shutil.copytree(runs("local_only"), folder)
    shutil.copyfile(config, folder / "config.toml")
    assert load_run_config(RunFolder.open(folder)).deployment.max_wait == 7.0


@pytest.mark.parametrize(("fallback", "max_excess"), [("true", 0.0), ("false", 40.0)])
def test_a_key_that_was_renamed_and_has_other_values(
    fallback: str, max_excess: float, runs: Any, tmp_path: Path
) -> None:
    stored, config = (runs("fedamole_peers") / "config.toml").read_text(), tmp_path / "old.toml"
    assert "max_excess = 0.1" in stored
    config.write_text(stored.replace("max_excess = 0.1", f"fallback = {fallback}"))
    error = "method.fallback is now called method.max_excess: rename it, 0.0 for true, 40.0 for false"
    with pytest.raises(ConfigError, match=re.escape(error)):
        load_config(config)
    assert load_config(config, stored=True).tables()["method"]["max_excess"] == max_excess


def test_a_circle_of_extends(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", 'extends = "b.toml"\n' + DATA)
    write(tmp_path / "b.toml", 'extends = "a.toml"\n')
    with pytest.raises(ConfigError, match=r"b.toml: extends = .a.toml. leads back to"):
        load_config(tmp_path / "a.toml")


# --- extends, overrides, paths --------------------------------------------------------------------------------


def test_extends_across_folders(tmp_path: Path) -> None:
    """Paths are relative to their file; keys of the extending file win, tables are merged, lists replaced."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    write(tmp_path / "base.toml", '[base]\nmodel = "models/tiny"\n[training]\nlocal_steps = 5\nbatch_size = 3\n')
    write(
        tmp_path / "one" / "base.toml",
        'extends = "../base.toml"\n[data]\nmanifest = "m.json"\n'
        '[[data.source]]\nname = "a"\npath = "../data/a.jsonl"\ntest = "b.jsonl"\n'
        '[data.public]\npath = "p.jsonl"\n',
    )
    write(tmp_path / "one" / "deep" / "run.toml", 'extends = "../base.toml"\n[training]\nlocal_steps = 9\n')
    config = load_config(tmp_path / "one" / "deep" / "run.toml")
    assert config.base.model == str(tmp_path / "models" / "tiny")
    assert config.data.manifest == str(tmp_path / "one" / "m.json")
    assert config.data.source[0].path == str(tmp_path / "data" / "a.jsonl")
    assert config.data.source[0].test == str(tmp_path / "one" / "b.jsonl")
    assert config.data.public is not None
    assert config.data.public.path == str(tmp_path / "one" / "p.jsonl")
    assert (config.training.local_steps, config.training.batch_size) == (9, 3)
    write(tmp_path / "one" / "other.toml", 'extends = "base.toml"\n' + DATA)
    assert load_config(tmp_path / "one" / "other.toml").data.source[0].path == str(tmp_path / "one" / "a.jsonl")


@pytest.mark.parametrize("model", ["bundled", "meta-llama/Llama-3.2-1B"])
def test_names_of_bases_are_no_paths(model: str, tmp_path: Path) -> None:
    assert load_config(write(tmp_path / "c.toml", f'[base]\nmodel = "{model}"\n' + DATA)).base.model == model


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", "[training]\nlocal_steps = 5\n" + DATA)
    overrides = ["training.local_steps=7", "method.assignment=random", "base.targets=['q_proj']", "federation.cohort=1"]
    config = load_config(path, overrides)
    assert config.training.local_steps == 7
    assert config.method.assignment == "random"  # type: ignore[attr-defined]
    assert config.base.targets == ("q_proj",)
    assert isinstance(config.federation.cohort, float)
    for override in ("training", "local_steps=3", "training.=3", "=3"):
        with pytest.raises(ConfigError, match=r"write table\.key=value"):
            load_config(path, [override])
    with pytest.raises(ConfigError, match=r"unknown key training\.local_stepz"):
        load_config(path, ["training.local_stepz=3"])


def test_paths_of_overrides_are_relative_to_the_working_folder(tmp_path: Path, monkeypatch: Any) -> None:
    """Paths of overrides are relative to the working folder; other values and the config file's paths are unchanged."""
    path = write(tmp_path / "configs" / "c.toml", '[base]\nmodel = "./tiny"\n' + DATA)
    folder = tmp_path / "here"
    (folder / "models" / "own").mkdir(parents=True)
    monkeypatch.chdir(folder)
    for model, expected in (
        ("./tiny", folder / "tiny"),
        ("../tiny", tmp_path / "tiny"),
        ("models/own", folder / "models" / "own"),
        ("~/tiny", Path.home() / "tiny"),
        ("/abs", "/abs"),
        ("bundled", "bundled"),
        ("models/other", "models/other"),
    ):
        assert load_config(path, [f"base.model={model}"]).base.model == str(expected)
    assert load_config(path).base.model == str(tmp_path / "configs" / "tiny")
    overrides = ["data.manifest=m.json", 'data.source=[{name = "x", path = "x.jsonl", test = "../t.jsonl"}]']
    data = load_config(path, overrides).data
    assert (data.manifest, data.source[0].path) == (str(folder / "m.json"), str(folder / "x.jsonl"))
    assert data.source[0].test == str(tmp_path / "t.jsonl")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_round_trip(name: str, runs: Any) -> None:
    """The config.toml of a run, which includes all defaults, loads as the same config."""
    folder = runs(name)
    again = load_config(folder / "config.toml")
    assert to_config(again.tables()) == again
    expected = runs.load(name)
    assert dataclasses.replace(again, run=expected.run) == expected
    tables = tomllib.loads((folder / "config.toml").read_text())
    for section in ("run", "base", "federation", "training", "evaluation"):
        kind = type(getattr(again, section))
        assert set(tables[section]) == {field.name for field in dataclasses.fields(kind)}


# --- what is shipped ------------------------------------------------------------------------------------------

SHIPPED = [
    path
    for folder in (ROOT / "experiments", ROOT / "src" / "fedamole" / "bundled")
    for path in sorted(folder.rglob("*.toml"))
    if path.name != "base.toml"  # a part that others extend
]


def test_shipped_configs_are_found() -> None:
    assert len(SHIPPED) > 3
    assert any(path.parent.name == "bundled" for path in SHIPPED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_loads(path: Path) -> None:
    if "data" not in read_tables(path):
        pytest.skip("a part that others extend")
    config = load_config(path)
    assert to_config(config.tables()) == config
    if path.stem in METHODS:
        assert config.method_name == path.stem


# --- every key has an effect ----------------------------------------------------------------------------------

Runs = Any


def files(folder: Path, kind: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob(kind))]


def trains_differently(
    override: str, method: str = "local_only", others: tuple[str, ...] = ()
) -> Callable[[Runs], bool]:
    """The private states of a one-round run differ."""

    def check(runs: Runs) -> bool:
        states = [
            files(runs(method, "federation.rounds=1", *others, *more), "clients/*/state/*")
            for more in ((), (override,))
        ]
        return len(states[0]) > 0 and states[0] != states[1]

    return check


def aggregates_differently(*overrides: str, others: tuple[str, ...] = ()) -> Callable[[Runs], bool]:
    """The server's states of a one-round run differ."""

    def check(runs: Runs) -> bool:
        first, second = (
            files(runs("fedit", "federation.rounds=1", *more), "checkpoints/*.safetensors")
            for more in (others, overrides)
        )
        return len(first) > 0 and first != second

    return check


def scores(folder: Path) -> dict[str, Any]:
    rows: dict[str, Any] = json.loads((folder / "summary.json").read_text())["rows"]
    return rows


def folder_is_named(runs: Runs) -> bool:
    from fedamole.experiment import wanted_folder

    return wanted_folder(runs.load("fedit", "run.name=mine")) == Path("runs/mine")


def folder_is_chosen(runs: Runs) -> bool:
    from fedamole.experiment import wanted_folder

    return wanted_folder(runs.load("fedit", "run.folder=/tmp/there")) == Path("/tmp/there")


def device_is_used(runs: Runs) -> bool:
    with pytest.raises(ConfigError, match=r"run.device = 'gpu': not a device"):
        runs.fresh("fedit", "run.device=gpu")
    return True


def threads_are_set(runs: Runs) -> bool:
    import torch

    try:
        prepare(runs.load("fedit", "run.threads=2"))
        return torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def groups_are_formed(runs: Runs) -> bool:
    def groups(folder: Path) -> set[int]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        return {line["group"] for line in lines if line["split"] == "train"}

    return groups(runs("local_only")) == {2} and groups(runs("local_only", "run.group=3")) == {3, 1}


def trackers_are_written(runs: Runs) -> bool:
    overrides = ("federation.rounds=1", 'run.trackers=["tensorboard"]')
    return bool(files(runs("local_only", *overrides), "tensorboard/events*")) and not files(
        runs("local_only"), "tensorboard/*"
    )


def model_is_loaded(runs: Runs) -> bool:

    with pytest.raises(BaseModelError, match="there is no folder"):
        prepare(runs.load("fedit", "base.model=./nowhere"))
    return True


def targets_are_adapted(runs: Runs) -> bool:
    shapes = prepare(runs.load("fedit", "base.targets=['o_proj']")).base.shapes
    return len(shapes) == 2 and all(name.endswith("o_proj") for name in shapes)


def dtype_is_used(runs: Runs) -> bool:
    import torch

    weights = prepare(runs.load("fedit", "base.dtype=bfloat16")).base.model.parameters()
    return {weight.dtype for weight in weights} == {torch.bfloat16}


def quantisation_needs_a_gpu(runs: Runs) -> bool:
    with pytest.raises(ConfigError, match=r"base.quantization = '4bit' needs a GPU"):
        prepare(runs.load("fedit", "base.quantization=4bit"))
    return True


def images_need_an_image_part(runs: Runs) -> bool:
    with pytest.raises(BaseModelError, match="LlamaConfig has no image part"):
        prepare(runs.load("fedit", "base.images=true"))
    return True


def checkpointing_is_on(runs: Runs) -> bool:
    on, off = (
        prepare(runs.load("fedit", f"base.gradient_checkpointing={setting}")).base for setting in ("true", "false")
    )
    return on.recomputation is not None and off.recomputation is None


def rounds_are_counted(runs: Runs) -> bool:
    return all(scores(runs("fedit", f"federation.rounds={n}")) and last_round(runs, n) == n - 1 for n in (1, 3))


def last_round(runs: Runs, n: int) -> int:
    lines = map(json.loads, (runs("fedit", f"federation.rounds={n}") / "metrics.jsonl").open())
    return max(int(line["round"]) for line in lines)


def patience_ends_the_run(runs: Runs) -> bool:
    """A rate that makes every later round worse: the run ends after the first round that is not the best."""
    spoilt = ("training.learning_rate=3.0", "federation.rounds=6", "federation.patience=1")
    summary = json.loads((runs("local_only", *spoilt) / "summary.json").read_text())
    best = summary["rows"]["local_only"]["best_round"]
    return bool(summary["rounds"] == best + 2 < 6 and summary["stopped"] == {"rounds": 6, "patience": 1})


def cohort_is_smaller(runs: Runs) -> bool:
    folder = runs("fedamole", "federation.cohort=0.25", "federation.rounds=1")
    lines = map(json.loads, (folder / "metrics.jsonl").open())
    return [len(line["cohort"]) for line in lines if line["split"] == "round"] == [1]


def two_trainings_take_all_steps(runs: Runs) -> bool:
    """Ditto trains twice in a round: 3 steps in total, or 3 each."""
    steps = []
    for budget in ("steps", "paper"):
        lines = map(json.loads, (runs("ditto", f"training.budget={budget}") / "metrics.jsonl").open())
        steps.append({line["steps"] for line in lines if line["split"] == "train"})
    return steps == [{3}, {6}]


def decay_acts_from_round_1(runs: Runs) -> bool:
    first, second = (files(runs("local_only", *more), "clients/*/state/*") for more in ((), ("training.lr_decay=0.5",)))
    return first != second


def long_prompts_are_cut(runs: Runs) -> bool:
    rows = prepare(runs.load("fedit", "training.max_length=20")).clients["entail"].train.rows
    return max(len(row.prompt) + len(row.answer) for row in rows) <= 20


def selects_by_score(runs: Runs) -> bool:
    by_score, by_loss = runs("local_only", "evaluation.select=score"), runs("local_only")
    lines = [list(map(json.loads, (folder / "metrics.jsonl").open())) for folder in (by_score, by_loss)]
    scored = [all("score" in line for line in of_run if line["split"] == "validation") for of_run in lines]
    return scored == [True, False]


def headline_is_chosen(runs: Runs) -> bool:
    chosen = scores(runs("local_only", "evaluation.generation_score=token_f1"))["majority"]["clients"]
    return all(chosen[c]["score"] == chosen[c]["token_f1"] != chosen[c]["rouge_l"] for c in ("plain",))


def answers_are_longer(runs: Runs) -> bool:
    from fedamole.evaluation.generation import generate_answers

    prepared = prepare(runs.load("fedit"))
    prompts = [row.prompt for row in prepared.clients["plain"].test.rows]
    lengths = []
    for limit in (runs.load("fedit", f"evaluation.max_new_tokens={n}").evaluation.max_new_tokens for n in (1, 20)):
        lengths.append(sum(map(len, generate_answers(Bank(prepared.base), [prompts], limit, 4096)[0])))
    first, second = scores(runs("local_only")), scores(runs("local_only", "evaluation.max_new_tokens=20"))
    return lengths[0] < lengths[1] and first["base"]["clients"]["plain"] != second["base"]["clients"]["plain"]


def batches_are_smaller(runs: Runs) -> bool:
    """The maximum number of tokens per forward pass of the evaluation, counted at the base model."""
    from fedamole.evaluation.personal import losses_of

    prepared = prepare(runs.load("fedit"))
    sizes: list[int] = []
    prepared.base.model.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    most = []
    for tokens in (100, 8192):
        sizes.clear()
        settings = runs.load("fedit", f"evaluation.batch_tokens={tokens}").evaluation
        losses_of(Bank(prepared.base), [prepared.clients["entail"].train.rows], settings)
        most.append(max(sizes))
    return most[0] <= 100 < most[1]


def scores_pre_aggregation(runs: Runs) -> bool:
    return "fedit_ft" in scores(runs("fedit", "evaluation.pre_aggregation=true")) and "fedit_ft" not in scores(
        runs("fedit")
    )


def trains_on_preferences(runs: Runs) -> bool:
    """Pairs are refused by the default objective; with the other one the untuned base has the loss ln 2."""
    overrides = preference_overrides(runs)
    with pytest.raises(ConfigError, match="are preference pairs"):
        prepare(runs.load("local_only", *overrides, "training.objective=answer"))
    lines = list(map(json.loads, (runs("local_only", *overrides) / "metrics.jsonl").open()))
    bases = [line["loss"] for line in lines if line.get("method") == "base"]
    return bases == pytest.approx([math.log(2)] * len(bases)) and bool(bases)


EFFECTS: dict[str, Callable[[Runs], bool]] = {
    "run.name": folder_is_named,
    "run.folder": folder_is_chosen,
    "run.seed": trains_differently("run.seed=1"),
    "run.device": device_is_used,
    "run.threads": threads_are_set,
    "run.group": groups_are_formed,
    "run.trackers": trackers_are_written,
    "base.model": model_is_loaded,
    "base.targets": targets_are_adapted,
    "base.dtype": dtype_is_used,
    "base.quantization": quantisation_needs_a_gpu,
    "base.gradient_checkpointing": checkpointing_is_on,
    "base.images": images_need_an_image_part,
    "federation.rounds": rounds_are_counted,
    "federation.patience": patience_ends_the_run,
    "federation.cohort": cohort_is_smaller,
    "federation.aggregation": aggregates_differently("federation.aggregation=median"),
    "federation.clip_factor": aggregates_differently(
        "federation.aggregation=clipped", "federation.clip_factor=1", others=("federation.aggregation=clipped",)
    ),
    "training.local_steps": trains_differently("training.local_steps=2"),
    "training.local_epochs": trains_differently("training.local_epochs=1"),
    "training.budget": two_trainings_take_all_steps,
    "training.batch_size": trains_differently("training.batch_size=1"),
    "training.accumulation": trains_differently("training.accumulation=2"),
    "training.learning_rate": trains_differently("training.learning_rate=0.02"),
    "training.lr_decay": decay_acts_from_round_1,
    "training.clip_norm": trains_differently("training.clip_norm=0.001"),
    "training.max_length": long_prompts_are_cut,
    "training.objective": trains_on_preferences,
    "training.beta": lambda runs: (
        trains_differently("training.beta=1.0", others=preference_overrides(runs))(runs)
        and not trains_differently("training.beta=1.0")(runs)
    ),
    "evaluation.select": selects_by_score,
    "evaluation.best_round": lambda runs: (
        set(scores(runs("fedit", "evaluation.best_round=client"))["fedit"]["best_round"])
        == {"chat", "entail", "mood", "plain"}
    ),
    "evaluation.generation_score": headline_is_chosen,
    "evaluation.max_new_tokens": answers_are_longer,
    "evaluation.batch_tokens": batches_are_smaller,
    "evaluation.pre_aggregation": scores_pre_aggregation,
}
"""For every key outside [data] (tests/data) and [method] (tests/contract): a check that it changes something."""

FIELDS = [
    f"{section}.{field.name}"
    for section, kind in {
        "run": RunSettings,
        "base": BaseSettings,
        "federation": FederationSettings,
        "training": TrainingSettings,
        "evaluation": EvaluationSettings,
    }.items()
    for field in dataclasses.fields(kind)
]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_has_an_effect(field: str, runs: Any) -> None:
    assert field in EFFECTS, "say in EFFECTS what this key changes"
    assert EFFECTS[field](runs)


def test_every_listed_effect_is_of_an_existing_field() -> None:
    assert set(EFFECTS) == set(FIELDS)
