"""`match = "parameters"`: arms of equal size, counted on the adapters' shapes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedamole.comparison.budgets import of_equal_size, planned
from fedamole.comparison.file import Comparison, load_comparison
from fedamole.comparison.run import check_shown, check_stored, preview
from fedamole.config import Config, to_config
from fedamole.errors import ConfigError, RunError
from fedamole.experiment import prepare, resolved
from fedamole.methods import METHODS
from fedamole.planning import trained_parameters
from fedamole.runs.run_folder import RunFolder
from tests.test_comparison import written

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, tiny: Path) -> Write:
    def write(methods: Sequence[str], variants: str = "", **settings: Any) -> Path:
        return written(tmp_path, tiny, [*methods], variants, **{"name": "c", "overrides": None, **settings})

    return write


def sizes(config: Config, folder: Path) -> dict[str, int]:
    prepared = prepare(resolved(config, folder))
    return trained_parameters(config, prepared.base, prepared.clients)


def mean(config: Config, folder: Path) -> float:
    result = sizes(config, folder).values()
    return sum(result) / len(result)


def configs(comparison: Comparison) -> dict[str, Config]:
    return {name: to_config(arm.tables) for arm in comparison.arms for name in arm.variants}


def parameters(config: Config) -> Any:
    """The method of a config, whose parameters depend on which method it is."""
    return config.method


@pytest.mark.parametrize("method", [name for name in METHODS if not name.endswith("_ft")])
def test_a_plan_counts_what_a_run_trains(method: str, runs: Any, tmp_path: Path) -> None:
    """In round 0, client by client; the run of this test is that of the contract tests."""
    lines = RunFolder(runs(method)).lines("metrics.jsonl")
    reported = {
        line["client"]: line["trained_parameters"] for line in lines if line["split"] == "train" and line["round"] == 0
    }
    assert len(reported) == 4
    assert sizes(runs.load(method), tmp_path) == reported


def test_local_training_gets_as_many_parameters_as_a_mixture(write: Write, tmp_path: Path) -> None:
    """The nearest rank is less than one step of the rank away; the scaling stays."""
    path = write(["fedamole", "local_only"], match="parameters", overrides=["method.rank=2", "method.alpha=8"])
    before, after = (configs(result) for result in (load_comparison(path), of_equal_size(load_comparison(path))))
    assert after["fedamole"] == before["fedamole"], "the reference keeps its size"
    ours, theirs = parameters(after["fedamole"]), parameters(after["local_only"])
    step = mean(before["local_only"], tmp_path) / 2
    expected, reached = mean(after["fedamole"], tmp_path), mean(after["local_only"], tmp_path)
    assert expected > 3 * 2 * step, "a mixture is much larger at the same rank"
    assert abs(expected - reached) <= step / 2
    assert reached == theirs.rank * step
    assert theirs.alpha / theirs.rank == ours.alpha / ours.rank == 4


def test_every_kind_of_method_is_sized(write: Write, tmp_path: Path) -> None:
    """A LoRA of rank 4 has 896 numbers here, 224 per rank; a virtual token has 32."""
    variants = '[variants.four]\nname = "local_only"\nrank = 4\n[variants.fixed]\nname = "flexlora"\nranks = [2]\n'
    methods = ["four", "fedit", "ffa_lora", "feddpa", "feddat", "fedalt", "hetlora", "fedprompt", "fedptuning", "fixed"]
    path = write(methods, variants, match="parameters")
    before, result = (
        configs(comparison) for comparison in (load_comparison(path), of_equal_size(load_comparison(path)))
    )
    assert mean(result["four"], tmp_path) == 896
    assert parameters(result["fedit"]).rank == 4
    assert parameters(result["feddpa"]).rank == parameters(result["feddat"]).rank == 2, "they train two LoRAs"
    assert parameters(result["fedprompt"]).virtual_tokens == 28
    assert parameters(result["fedptuning"]).virtual_tokens == 1, "its encoder alone is larger"
    assert result["fixed"] == before["fixed"], "its ranks are set one by one"
    for name in ("ffa_lora", "fedalt", "hetlora"):
        tables, rank = result[name].tables(), parameters(result[name]).rank
        around = [to_config(tables | {"method": {**tables["method"], "rank": rank + step}}) for step in (-1, 0, 1)]
        away = [abs(mean(config, tmp_path) - 896) for config in around]
        assert min(away) == away[1], name


def test_a_prompt_is_no_longer_than_the_base_has_positions(write: Write) -> None:
    """128 positions and texts of 96 leave 32; the mixture would be many more tokens."""
    result = configs(of_equal_size(load_comparison(write(["fedamole", "fedprompt"], match="parameters"))))
    assert parameters(result["fedprompt"]).virtual_tokens == 32


def test_both_rows_and_both_budgets_of_a_method_have_one_size(write: Write) -> None:
    path = write(["fedamole", "fedrep", "fedrep_ft", "ditto"], match="parameters", budget="both")
    result = configs(of_equal_size(load_comparison(path)))
    names = ("fedrep", "fedrep_ft", "fedrep-paper", "fedrep_ft-paper")
    assert len({parameters(result[name]).rank for name in names}) == 1
    assert parameters(result["ditto"]).rank == parameters(result["ditto-paper"]).rank > 8


def test_sizes_come_before_bytes_and_stand_in_the_preview(write: Write) -> None:
    settings = {"match": "parameters", "budget": "bytes", "overrides": ["federation.rounds=20"]}
    path = write(["fedamole", "fedit"], **settings)
    lines = {line["trial"]: line for line in preview(load_comparison(path))}
    rank = parameters(configs(planned(load_comparison(path)))["fedit"]).rank
    assert lines["tiny/fedamole-s0"]["size"] == "rank 8"
    assert lines["tiny/fedit-s0"]["size"] == f"rank {rank}"
    assert rank > 8
    assert 18 <= lines["tiny/fedit-s0"]["rounds"] <= 22, "equal sizes travel at equal cost; at rank 8 it would be 60"


def test_stored_sizes_are_taken_as_they_are_for_tables_alone(write: Write) -> None:
    path = write(["fedamole", "fedit"], match="parameters")
    comparison = planned(load_comparison(path))
    [trial] = [trial for trial in comparison.all_trials() if trial.name == "tiny/fedit-s0"]
    trial.path.mkdir(parents=True)
    (trial.path / "config.toml").write_text(tomli_w.dumps(trial.config.tables()))
    (trial.path / "run.json").write_text("{}")
    check_shown(load_comparison(path))
    check_stored(comparison)
    with pytest.raises(RunError, match=r"method\.(alpha|rank) = .*, but"):
        check_stored(load_comparison(path))


def test_nothing_is_matched_without_asking(write: Write) -> None:
    comparison = load_comparison(write(["fedamole", "fedit"]))
    assert of_equal_size(comparison) is comparison
    with pytest.raises(ConfigError, match="match = 'size': must be one of 'nothing', 'parameters'"):
        load_comparison(write(["fedit"], match="size"))
