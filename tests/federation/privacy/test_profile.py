"""`privacy.profile = "private"`: what it sets, what it leaves to the config, and where both can be seen."""

import re
from typing import Any

import pytest

from fedamole.config import load_config, to_config
from fedamole.errors import ConfigError
from fedamole.federation.privacy.profile import profile_settings
from fedamole.methods import METHODS

PROFILE = {"privacy": {"profile": "private"}}
SOURCE = {"data": {"source": [{"name": "a", "path": "a.jsonl"}]}}


def test_one_line_sets_rank_batch_and_for_fedamole_a_static_assignment_to_three() -> None:
    config = to_config(PROFILE | SOURCE)
    method: Any = config.method
    assert (method.rank, method.alpha, method.assignment, config.training.batch_size) == (4, 8.0, "static", 64)
    assert (method.bounds(10).expert_choices, method.pool_size(10), method.min_holders) == (3, 20, 3)
    assert config.from_profile == {
        "training": {"batch_size": 64},
        "method": {"rank": 4, "alpha": 8.0, "assignment": "static", "min_holders": 3},
    }


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "fedsvd", "fedprox", "ditto", "flora", "fedex_lora"])
def test_methods_without_an_assignment_get_rank_and_batch(name: str) -> None:
    config = to_config(PROFILE | SOURCE | {"method": {"name": name}})
    assert config.from_profile == {"training": {"batch_size": 64}, "method": {"rank": 4, "alpha": 8.0}}


def test_without_the_profile_nothing_is_set() -> None:
    cases: list[dict[str, Any]] = [{}, {"privacy": {}}, {"privacy": {"profile": "none"}}]
    for tables in cases:
        config = to_config(tables | SOURCE | {"method": {"name": "fedit"}})
        assert (config.from_profile, config.training.batch_size, config.method) == ({}, 1, METHODS["fedit"]())


@pytest.mark.parametrize(
    ("tables", "left_out"),
    [
        ({"training": {"local_steps": 5}}, set()),
        ({"training": {"batch_size": 8}}, {"batch_size"}),
        ({"training": {"accumulation": 32}}, {"batch_size"}),  # it makes batches large, too
        ({"method": {"rank": 2}}, {"rank", "alpha"}),
        ({"method": {"alpha": 1.0}}, {"alpha"}),
        ({"method": {"assignment": "random"}}, {"assignment"}),
        ({"method": {"expert_choices": 2}}, {"min_holders"}),
        ({"method": {"min_holders": 2}}, {"min_holders"}),
        ({"method": {"experts": 40}}, set()),
    ],
)
def test_what_the_config_sets_wins(tables: dict[str, Any], left_out: set[str]) -> None:
    fields = ["rank", "alpha", "assignment", "min_holders", "expert_choices", "experts"]
    settings, not_applied = profile_settings(PROFILE | tables, fields)
    assert [text.split(" = ")[0].split(".")[1] for text in not_applied] == [
        key for key in ("batch_size", "rank", "alpha", "assignment", "min_holders") if key in left_out
    ]
    keys = {key for table in settings.values() for key in table}
    assert keys == {"batch_size", "rank", "alpha", "assignment", "min_holders"} - left_out
    assert all(settings.values()), "no empty table"


def test_the_words_name_what_the_config_has_instead() -> None:
    config = to_config(
        PROFILE | SOURCE | {"training": {"accumulation": 4}, "method": {"rank": 2, "assignment": "static"}}
    )
    assert config.not_from_profile == (
        "training.batch_size = 64 (the config has training.accumulation = 4)",
        "method.rank = 4 (the config has method.rank = 2)",
        "method.alpha = 8.0 (the config has method.rank = 2)",
    )
    complete = to_config(to_config(PROFILE | SOURCE).tables())
    assert (complete.from_profile, complete.not_from_profile) == ({}, ())


def test_settings_of_the_command_line_win_too(runs: Any) -> None:
    config = load_config(runs.config, ["method.name=fedit", "privacy.profile=private", "method.rank=3"])
    assert config.method.rank == 3  # type: ignore[attr-defined]


def test_a_mistake_is_an_error_of_the_key_that_was_written() -> None:
    with pytest.raises(ConfigError, match=r"privacy.profile = 'privat': must be one of 'none', 'private'"):
        to_config({"privacy": {"profile": "privat"}} | SOURCE)
    with pytest.raises(ConfigError, match=r"the method fedrep cannot be made private"):
        to_config(PROFILE | SOURCE | {"method": {"name": "fedrep"}})
    with pytest.raises(ConfigError, match=r"unknown key method.rnak"):
        to_config(PROFILE | SOURCE | {"method": {"rnak": 2}})


def test_plan_shows_what_it_set_and_the_run_has_it_in_its_config(
    runs: Any, fedamole: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The tiny federation's clients have fewer than 64 examples, so the batch is the config's."""
    options = ("privacy.profile=private", "training.batch_size=2", "method.rank=2", "method.min_holders=2")
    result = fedamole("plan", runs.config, *options)
    assert re.search(r'profile +privacy.profile has set method.assignment = "static"\n', result.out), result.out
    not_applied = (
        "not applied  privacy.profile has not set training.batch_size = 64 (the config has training.batch_size = 2), "
    )
    assert not_applied in result.out
    assert "profile" not in fedamole("plan", runs.config, "privacy.epsilon=8", "method.assignment=static").out
    folder = runs.fresh("fedamole", "federation.rounds=1", *options)
    (warning,) = [record.getMessage() for record in caplog.records if "privacy.profile" in record.getMessage()]
    assert warning.startswith("privacy.profile has not set training.batch_size = 64 (the config has")
    stored = load_config(folder / "config.toml", stored=True)
    assert stored.method.assignment == "static"  # type: ignore[attr-defined]
    assert stored.privacy is not None
    assert stored.privacy.profile == "private"
    assert stored.from_profile == {}
    assert to_config(stored.tables()) == stored
