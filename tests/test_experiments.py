"""All files under experiments/ load, and those of the paper can be planned without data or weights."""

import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedamole import experiment
from fedamole.comparison.file import load_comparison
from fedamole.config import Config, load_config, read_tables, to_config
from fedamole.experiment import plan_without_data
from fedamole.methods import METHODS
from fedamole.model.weightless import weightless_base
from fedamole.planning import PlanWithoutData

FOLDER = Path(__file__).parents[1] / "experiments"
FILES = sorted(FOLDER.rglob("*.toml"))
COMPARISONS = [path for path in FILES if "methods" in tomllib.loads(path.read_text())]
CONFIGS = [path for path in FILES if path not in COMPARISONS and "source" in read_tables(path).get("data", {})]
SEVEN = ["dolly_01", "dolly_1", "dolly_100", "natural", "snli_01", "snli_1", "snli_100"]
PAPER = FOLDER / "paper"


def name(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))


@pytest.fixture(scope="module", autouse=True)
def shapes_once() -> Iterator[None]:
    """Create the shapes of a base once for all plans; they depend only on its settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "weightless_base", cache(weightless_base))
        yield


comparison_of = cache(load_comparison)


def test_all_files_are_found() -> None:
    """Files that are neither configs nor comparisons are named base.toml, and others extend them."""
    parts = set(FILES) - set(CONFIGS) - set(COMPARISONS)
    assert {path.stem for path in parts} == {"base"}
    assert len([path for path in CONFIGS if path.is_relative_to(PAPER)]) == 7 + 5 + 5
    assert sorted(path.stem for path in CONFIGS if path.parent == PAPER) == SEVEN
    assert sorted(path.stem for path in CONFIGS if path.parent == FOLDER / "small") == SEVEN
    assert len([path for path in COMPARISONS if path.parent == PAPER]) == 3 + 5


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_every_config_loads(path: Path) -> None:
    config = load_config(path)
    assert to_config(config.tables()) == config


@pytest.mark.parametrize("path", COMPARISONS, ids=name)
def test_every_comparison_loads(path: Path) -> None:
    comparison = comparison_of(path)
    assert comparison.arms


def test_one_comparison_has_every_method() -> None:
    methods = comparison_of(PAPER / "all_methods.toml").settings.methods
    assert sorted(methods) == sorted(METHODS)


def test_comparisons_of_the_paper_have_its_seven_scenarios() -> None:
    for file in ("comparison", "all_methods", "ablations"):
        scenarios = comparison_of(PAPER / f"{file}.toml").settings.scenarios
        assert sorted(scenarios) == SEVEN
        assert all(path == f"{scenario}.toml" for scenario, path in scenarios.items())


# --- the paper's numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SEVEN)
def test_the_papers_settings(scenario: str) -> None:
    config = load_config(PAPER / f"{scenario}.toml")
    assert config.base.model == "meta-llama/Llama-3.2-1B"
    assert config.base.targets == ()
    assert (config.federation.rounds, config.federation.cohort) == (30, 1.0)
    training = config.training
    assert (training.local_steps, training.batch_size, training.learning_rate) == (200, 1, 5e-5)
    assert (training.lr_decay, training.accumulation, training.local_epochs, training.clip_norm) == (0.99, 1, 0, 0.0)
    data = config.data
    assert (data.validation_share, data.test_share, data.embedding_share) == (0.1, 0.1, 0.05)
    assert (data.test_cap_classification, data.test_cap_generation, data.embedding_cap) == (200, 50, 200)
    assert (data.validation_cap_classification, data.validation_cap_generation) == (200, 200)
    assert config.evaluation.max_new_tokens == 128
    if scenario == "natural":
        assert len(data.source) == 10
        assert all(source.partition.kind == "whole" for source in data.source)
        assert all(Path(source.path or "").stem == source.name for source in data.source)
        return
    [source] = data.source
    alpha = {"01": 0.1, "1": 1.0, "100": 100.0}[scenario.partition("_")[2]]
    assert (source.partition.kind, source.partition.alpha, source.partition.clients) == ("dirichlet", alpha, 10)
    hub, by = {
        "snli": ("stanfordnlp/snli", "label_text"),
        "dolly": ("databricks/databricks-dolly-15k", "category"),
    }[source.name]
    assert (source.hub, source.split, source.test_split, source.partition.by) == (hub, "train", None, by)
    assert source.limit is None


def test_the_papers_method_settings() -> None:
    """They are the defaults, so the paper's configs do not set them."""
    method: Any = load_config(PAPER / "snli_01.toml").method
    assert (method.pool_size(10), method.bounds(10).expert_choices) == (30, 2)
    assert (method.min_experts, method.max_experts, method.top_k, method.balance_weight) == (2, 8, 2, 0.001)
    assert (method.rank, method.alpha, method.dropout, method.assignment) == (8, 16.0, 0.05, "reverse")
    prompt, encoder, fdlora = (METHODS[method]() for method in ("fedprompt", "fedptuning", "fdlora"))
    assert getattr(prompt, "virtual_tokens", None) == 20
    assert getattr(encoder, "encoder_hidden_size", None) == 1024
    assert getattr(fdlora, "sync_every", None) == 5
    assert load_config(PAPER / "snli_01.toml").training.max_length == 1024


def arms(file: str) -> Iterator[tuple[str, str, Config]]:
    for arm in comparison_of(PAPER / f"{file}.toml").arms:
        yield arm.scenario, arm.name, to_config(arm.tables)


def plans(file: str, scenarios: tuple[str, ...] = ()) -> dict[tuple[str, str], PlanWithoutData]:
    return {
        (scenario, arm): plan_without_data(config)
        for scenario, arm, config in arms(file)
        if not scenarios or scenario in scenarios
    }


@pytest.mark.parametrize("scenario", SEVEN)
def test_a_scenario_is_planned_with_the_papers_numbers(scenario: str) -> None:
    """FedAMoLE: 7 experts on average of 8 x (in + out) numbers and a router of 8 x in, in 16 q and 16 v projections."""
    path = PAPER / f"{scenario}.toml"
    mixture, lora = (plan_without_data(load_config(path, [f"method.name={it}"])) for it in ("fedamole", "fedit"))
    assert len(mixture.clients) == mixture.clients_per_round == 10
    assert (mixture.base_parameters, mixture.targets, mixture.rounds, mixture.steps) == (1_235_814_400, 32, 30, 200)
    lora_parameters = 16 * 8 * ((2048 + 2048) + (2048 + 512))
    assert lora.adapter_parameters == lora_parameters == 851_968
    assert mixture.adapter_parameters == 7 * lora_parameters + 32 * 8 * 2048 == 6_488_064
    assert mixture.bytes_down / lora.bytes_down == pytest.approx(7.6, abs=0.05), "7.6 x FedIT in the paper"
    assert mixture.base_mib == pytest.approx(1_235_814_400 * 2 / 2**20)


def test_the_ablations_cost_what_the_method_costs() -> None:
    all_plans = plans("ablations", ("snli_01", "natural"))
    assert len(all_plans) == 4 * 2
    assert {plan.adapter_parameters for plan in all_plans.values()} == {6_488_064}


def test_the_papers_methods_cost_what_their_adapters_cost() -> None:
    all_plans = plans("comparison", ("snli_01",))
    sizes = {arm: plan.adapter_parameters for (_, arm), plan in all_plans.items()}
    assert sizes["fedprompt"] == 20 * 2048
    assert sizes["local_only"] == sizes["fedit"] == 851_968
    assert all_plans["snli_01", "local_only"].bytes_down < 1024
    assert set(sizes) == {"fedamole", "fedit", "fedprompt", "fedptuning", "fdlora", "local_only"}, "_ft is the same run"


def test_the_sweeps_are_feasible() -> None:
    experts = plans("sweep_experts", ("snli_01",))
    sizes = [plan.adapter_parameters for plan in experts.values()]
    assert sizes == [(1 + 2 * pool / 10) * 851_968 + 32 * 8 * 2048 for pool in (10, 20, 30, 40)]
    choices = [plan.adapter_parameters for plan in plans("sweep_expert_choices", ("snli_01",)).values()]
    assert choices == [(1 + 3 * each) * 851_968 + 32 * 8 * 2048 for each in (1, 2, 3, 4)]
    assert {plan.adapter_parameters for plan in plans("sweep_max_experts", ("snli_01",)).values()} == {6_488_064}
    rates = [config.training.learning_rate for *_, config in arms("sweep_learning_rate")]
    assert sorted(set(rates)) == [1e-5, 2e-5, 5e-5, 1e-4, 2e-4]


def test_ten_to_fifty_clients_are_planned() -> None:
    clients = {
        scenario: len(plan_without_data(config).clients)
        for scenario, arm, config in arms("sweep_clients")
        if arm == "fedamole-k4"
    }
    assert clients == {f"clients-{n}": n for n in (10, 20, 30, 40, 50)}
