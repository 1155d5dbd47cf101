"""Methods from outside the package: by decorator, and by the entry point of an installed package."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fedamole as fa
from fedamole.errors import ConfigError
from fedamole.methods import METHODS
from fedamole.methods.fedit import FedIT

MODULE = '''
from dataclasses import dataclass

from fedamole.methods.fedit import FedIT


@dataclass(frozen=True)
class Mine(FedIT):
    """FedIT under another name."""

    extra: int = 3
'''


@dataclass(frozen=True)
class Mine(FedIT):
    """FedIT under another name."""


@pytest.fixture
def registry() -> Iterator[dict[str, Any]]:
    """The registry, which is restored after the test."""
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


def test_a_decorated_class_runs_with_its_variant(registry: dict[str, Any], tmp_path: Path) -> None:
    assert fa.register_method("mine")(Mine) is Mine
    assert {"mine", "mine_ft"} <= set(fa.list_methods().index)
    rows = [{"prompt": f"{number}?\n", "completion": ("yes", "no")[number % 2]} for number in range(30)]
    config: dict[str, Any] = {"federation": {"rounds": 1}, "training": {"local_steps": 1}, "run": {"threads": 1}}
    runs = [
        fa.run(config | {"method": {"name": name}}, data={"a": rows}, folder=tmp_path / name, progress="none")
        for name in ("mine", "fedit")
    ]
    mine, other = (run.scores[["client", "score", "loss"]] for run in runs)
    assert mine.equals(other)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("fedit", Mine, "registered already"),
        ("Mine", Mine, "lower-case"),
        ("my-method", Mine, "lower-case"),
        ("mine_ft", Mine, "no _ft at the end"),
        ("mine", print, "not a class derived from"),
        ("mine", type("Bare", (FedIT,), {}), "must be decorated with @dataclass(frozen=True)"),
        ("mine", type("Plain", (), {}), "not a class derived from"),
    ],
)
def test_a_wrong_registration_changes_nothing(registry: dict[str, Any], name: str, method: Any, message: str) -> None:
    before = dict(registry)
    with pytest.raises(ConfigError) as caught:
        fa.register_method(name)(method)
    assert message in str(caught.value)
    assert registry == before


def install(folder: Path, entry_points: str) -> None:
    """What an installed package consists of: a module, and metadata with its entry points."""
    (folder / "outside.py").write_text(MODULE)
    about = folder / "outside-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[fedamole.methods]\n{entry_points}")


def fedamole(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), *sys.path])
    command = [sys.executable, "-m", "fedamole", *arguments]
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_an_installed_package_adds_its_methods_to_the_command_line(tmp_path: Path) -> None:
    install(tmp_path, "mine = outside:Mine\nbroken = outside:Nothing\n")
    planned = fedamole(tmp_path, "plan", "method.name=mine", "method.extra=4")
    assert planned.returncode == 0, planned.stderr
    assert "method 'broken' of outside:Nothing is not available" in " ".join(planned.stderr.split())
    refused = fedamole(tmp_path, "plan", "method.name=broken")
    assert refused.returncode == 2
    assert "there is no such method" in refused.stderr
