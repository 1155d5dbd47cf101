"""Which configs may have secure aggregation, and what the others are told."""

import re
from pathlib import Path
from typing import Any

import pytest
from tests.federation.test_robust import BY_KEY

from fedamole.config import to_config
from fedamole.deployment.server_processes import prepare_folder
from fedamole.errors import ConfigError
from fedamole.experiment import plan, plan_without_data, prepare
from fedamole.federation.secure.settings import SecureAggregationSettings, check_groups
from fedamole.methods import METHODS

UNMASKED = 'secure_aggregation.unmasked=["token_embedding"]'


def tables(name: str, **secure: Any) -> dict[str, Any]:
    return {
        "method": {"name": name},
        "secure_aggregation": {"enabled": True, **secure},
        "deployment": {"clients": ["a", "b", "c"]},
    }


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_that_need_single_replies_are_refused_by_name(name: str) -> None:
    if name.removesuffix("_ft") in BY_KEY:
        assert to_config(tables(name)).secure_aggregation.enabled
        return
    if METHODS[name].averaged_fields:
        with pytest.raises(ConfigError, match=f"{name} needs the field 'token_embedding' of each client's reply alone"):
            to_config(tables(name))
        assert to_config(tables(name, unmasked=["token_embedding"])).secure_aggregation.enabled
        return
    with pytest.raises(ConfigError, match=f"{name} needs the reply of each client, not only sums of them"):
        to_config(tables(name))


@pytest.mark.parametrize("aggregation", ["clipped", "median", "trimmed"])
def test_aggregations_that_compare_single_updates_are_refused(aggregation: str) -> None:
    other = {"federation": {"aggregation": aggregation}}
    with pytest.raises(ConfigError, match=f"federation.aggregation = '{aggregation}': it compares single updates"):
        to_config(tables("fedit") | other)
    disabled = tables("fedit", enabled=False) | other
    assert to_config(disabled).federation.aggregation == aggregation


def test_weights_by_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"set method\.weighting to 'uniform'"):
        to_config({**tables("fedit"), "method": {"name": "fedit", "weighting": "examples"}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_group": 2}, "secure_aggregation.min_group = 2: must be at least 3, because each of two clients"),
        ({"min_group": -1}, "secure_aggregation.min_group = -1: must be at least 3"),
        ({"clip": 0.0}, "secure_aggregation.clip = 0.0: must be above 0 and below 682.7"),
        ({"clip": 700.0}, "secure_aggregation.clip = 700.0: must be above 0 and below 682.7"),
        ({"clip": float("nan")}, "secure_aggregation.clip = nan: must be a finite number"),
        ({"unmasked": ["x", "x"]}, "secure_aggregation.unmasked = ['x', 'x']: each name once"),
        ({"unmasked": ["tensors"]}, "'tensors' is not a field of fedit's reply that can be sent unmasked; it has none"),
        ({"minimum": 3}, "unknown key secure_aggregation.minimum"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        to_config(tables("fedit", **values))


def test_a_deployment_is_refused(tmp_path: Path) -> None:
    """Its coordinator would get every update, though the config says that it does not."""
    with pytest.raises(ConfigError, match="not available between organisations yet"):
        prepare_folder(to_config(tables("fedit")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="not available between organisations yet"):
        plan_without_data(to_config(tables("fedit")))


def test_a_plan_names_groups_that_are_too_small(runs: Any) -> None:
    """Two holders an expert by default; the remedy of the error makes the plan feasible. 4 clients, 8 experts."""
    config = runs.load("fedamole", "secure_aggregation.enabled=true", UNMASKED)
    with pytest.raises(ConfigError) as caught:
        plan(config)
    assert re.search(
        r"secure_aggregation.min_group = 3: \d+ of \d+ tensors have fewer holders, such as \S+ with 2 \(\w+, \w+\); "
        r"a sum over so few .*: set method.experts = 8 and method.expert_choices = 3$",
        str(caught.value),
    )
    remedy = ("method.experts=8", "method.expert_choices=3")
    planned = plan(runs.load("fedamole", "secure_aggregation.enabled=true", UNMASKED, *remedy))
    assert (
        "gets sums over at least 3 clients in place of single updates, token_embedding of each" in planned.exposure[0]
    )
    assert "personal model of every client" not in " ".join(planned.exposure), "it is trained after the sum"
    averaged = plan(runs.load("fedit", "secure_aggregation.enabled=true"))
    assert "So the coordinator can have the personal model of every client." in averaged.exposure, "it is the mean"
    assert "each client's own part before it is averaged" in plan(runs.load("fedit")).exposure[0]


def test_a_plan_without_data_checks_the_groups_too(runs: Any) -> None:
    enabled = ("secure_aggregation.enabled=true", "federation.cohort=0.5")
    with pytest.raises(ConfigError, match=r"2 of 4 clients take part in a round.*\(federation.cohort\)"):
        plan_without_data(runs.load("fedit", *enabled))
    with pytest.raises(ConfigError, match="2 of 4 clients take part in a round"):
        prepare(runs.load("fedit", *enabled))
    assert plan_without_data(runs.load("fedit", enabled[0])).exposure


def test_a_clip_with_which_sums_wrap_is_refused() -> None:
    """2048 / 16 = 128 clients are one too many."""
    settings, method = SecureAggregationSettings(enabled=True), METHODS["fedit"]()
    names = [f"client-{index}" for index in range(128)]
    check_groups(settings, {"tensors:x": names[:127]}, 127, 127, method)
    with pytest.raises(ConfigError, match=r"with 128 clients a sum could leave 32 bits; set it below 16$"):
        check_groups(settings, {"tensors:x": names}, 128, 128, method)
