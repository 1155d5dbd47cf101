"""How many clients fit, and how well that is foretold."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedamole import planning
from fedamole.cli import app
from fedamole.experiment import plan, prepare
from fedamole.model.memory import free_bytes, group_bytes, used_bytes


def test_the_group_fills_the_free_memory(runs: Any, monkeypatch: Any) -> None:
    config = runs.load("fedamole", "run.group=0")
    prepared = prepare(config)
    needed = {clients: planning._group_bytes(config, prepared.base, clients, 20_000) for clients in (1, 2, 3, 4)}
    monkeypatch.setattr(planning, "_sizes", lambda *_: ([20_000], [1]))
    for free, group in ((0, 1), (needed[1], 1), (needed[2], 2), (needed[3] + 1000, 3), (2**40, 4)):
        monkeypatch.setattr(planning, "free_bytes", lambda _, free=free: free / planning.HEADROOM + 1)
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
    base, one = prepared.base, 2 * 96
    for at_once, tokens in ((10**9, [one, 4 * one]), (2 * one, [one, 2 * one]), (1, [one, one])):
        monkeypatch.setattr(planning, "TOKENS_AT_ONCE", at_once)
        found = [planning._group_bytes(config, base, clients, 1000) for clients in (1, 4)]
        assert found == [group_bytes(base, clients, 1000, n) for clients, n in zip((1, 4), tokens, strict=True)]
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


def test_the_plan_foretells_the_peak(runs: Any) -> None:
    """A fresh process, as the peak is the whole process's: the estimate is within a quarter of what was measured."""
    config, folder = runs.config, runs.free()
    words = ["method.name=fedamole", "run.group=4", f"run.folder={folder}", "federation.rounds=1"]
    subprocess.run([sys.executable, "-m", "fedamole.cli", "run", str(config), *words], check=True, capture_output=True)
    command = [sys.executable, "-m", "fedamole.cli", "plan", str(config), *words[:2], "--json"]
    done = subprocess.run(command, check=True, capture_output=True)
    measured = json.loads((folder / "summary.json").read_text())["peak_memory_mib"]
    planned = json.loads(done.stdout)
    assert planned["group"] == 4
    assert planned["memory_mib"] == pytest.approx(measured, rel=0.25)


def test_plan_and_run_say_it(runs: Any, tmp_path: Path) -> None:
    assert plan(runs.load("fedit", "run.group=3")).group == 3
    shown = CliRunner().invoke(app, ["plan", str(runs.config), "method.name=fedit", "run.group=3"])
    assert "MiB with 3 clients in lock-step (run.group)" in shown.output
    words = ["method.name=fedit", f"run.folder={tmp_path / 'run'}", "federation.rounds=1"]
    ran = CliRunner().invoke(app, ["run", str(runs.config), *words])
    assert "MiB with 2 clients in lock-step" in ran.output
