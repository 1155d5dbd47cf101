"""Names that become folders: the same ones are refused wherever a name is given."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedamole.comparison.arms import check_names
from fedamole.comparison.file import load_comparison
from fedamole.config import RunSettings
from fedamole.data.settings import SourceSettings
from fedamole.deployment.security.client_keys import check_name
from fedamole.errors import ConfigError, RunError
from fedamole.federation.settings import DeploymentSettings
from fedamole.received.names import as_name, checked_name

WINDOWS = ("con", "CON", "nul", "Aux.txt", "prn.", "com1", "LPT9.jsonl", "a.", "mood.v1.")
"""Names that Windows reads as a device, or changes."""


@pytest.mark.parametrize("name", WINDOWS)
def test_names_that_no_folder_can_have_on_windows(name: str) -> None:
    """Refused alike for runs, comparisons, sources, clients of a config, clients with a key, and whatever is read."""
    with pytest.raises(RunError, match=f"x: the name '{name}' is invalid: on Windows"):
        checked_name(name, "x")
    refusals: tuple[tuple[str, Callable[[], object]], ...] = (
        (r"run\.name", lambda: RunSettings(name)),
        (r"data\.source\.name", lambda: SourceSettings(name, path="x")),
        (r"deployment\.clients", lambda: DeploymentSettings((name, "other"))),
        ("client", lambda: check_name(name)),
        ("variants", lambda: check_names("variants", [name])),
    )
    for key, refused in refusals:
        with pytest.raises(ConfigError, match=f"{key}.*on Windows"):
            refused()
    converted = as_name(name)
    assert checked_name(converted, "x") == converted


@pytest.mark.parametrize(
    "name", ["icon", "con-x", "const", "console.log", "com", "com10", "lpt", "a.b", "nullable", "x.con"]
)
def test_names_that_only_look_like_a_device(name: str) -> None:
    assert checked_name(name, "x") == name
    assert as_name(name) == name
    SourceSettings(name, path="x")
    RunSettings(name)


@pytest.mark.parametrize("name", ["con", "../x", "a/b", "x."])
def test_the_name_of_a_comparison_stays_inside_runs(name: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f'name = "{name}"\nmethods = ["fedit"]\n[scenarios]\na = "missing.toml"\n')
    with pytest.raises(ConfigError, match=f"c.toml: name = '{name}': .* folder may be any path"):
        load_comparison(file)


@pytest.mark.parametrize("names", [("a", "A"), ("a b", "c"), ("../x", "y")])
def test_clients_of_a_deployment_are_names_of_folders(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"deployment\.clients: the name"):
        DeploymentSettings(names)
