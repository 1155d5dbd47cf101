"""Kendall's tau against published orders, by hand."""

from pathlib import Path
from typing import Any

import pytest
from tests.loaded_script import load_script

from fedamole.methods import METHODS

SCRIPT = Path(__file__).parents[2] / "scripts" / "published_order.py"


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script(SCRIPT)


def test_tau_counts_pairs_in_the_same_order(script: Any) -> None:
    """Of the six pairs of a, b, c, d, five are in the same order and one is not: (5 - 1) / 6. x is in one alone."""
    published = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "x": 9.0}
    methods, tau, _ = script.order(published, {"d": 50.0, "a": 1.0, "b": 7.0, "c": 6.0})
    assert methods == ["a", "b", "c", "d"]
    assert tau == pytest.approx(4 / 6)


def test_a_missing_comparison_is_one_error(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["published_order.py", "nowhere.toml"])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "nowhere.toml cannot be read" in capsys.readouterr().err


def test_published_methods_are_in_the_registry(script: Any) -> None:
    assert {name for table in script.PUBLISHED.values() for name in table} <= METHODS.keys()
