"""`fedamole demo`: its run folders, seeds, the table of means, and what happens where its folder exists."""

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from fedamole.cli import demo_runs
from fedamole.cli.options import bundled_config
from fedamole.comparison.trials import LOCK
from fedamole.config import load_config
from fedamole.experiment import start
from fedamole.federation.progress import PlainProgress, ProgressListener
from fedamole.files import exclusive
from tests.conftest import CommandResult, call_command

METHODS = ("local_only", "fedit", "fedamole", "fedamole_peers")
TWO_SEEDS = [*METHODS, *(f"{method}-s1" for method in METHODS)]


Demo = Callable[..., CommandResult]


def write_configs(folder: Path, tiny: Path, rounds: int = 1) -> None:
    """A small demo in place of the bundled one: the tiny federation, one round of one step."""
    rest = f"[federation]\nrounds = {rounds}\n[training]\nlocal_steps = 1\n"
    for method in METHODS:
        own = f'[run]\nname = "{method}"\n[method]\nname = "{method}"\nrank = 2\nalpha = 4\n'
        (folder / f"{method}.toml").write_text(f'extends = "{tiny}/config.toml"\n{own}{rest}')


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path) -> Demo:
    """Call a command in an empty folder; `demo` runs the small configs."""
    write_configs(tmp_path, tiny)
    monkeypatch.setattr(demo_runs, "bundled_config", lambda name: tmp_path / f"{name}.toml")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, command: str = "demo") -> CommandResult:
        return call_command(command, *arguments)

    return call


def read(path: str) -> Any:
    """A JSON file of the demo's folder."""
    return json.loads(Path("runs/demo", path).read_text())


def run_names(folder: str = "runs/demo") -> list[str]:
    """The run folders in a folder."""
    return sorted(path.parent.name for path in Path(folder).glob("*/run.json"))


def ids() -> dict[str, str]:
    """The id of each run; a run that was made again has another one."""
    return {name: read(f"{name}/run.json")["id"] for name in run_names()}


def test_each_seed_is_a_run_and_the_table_has_means_and_deviations(demo: Demo) -> None:
    done = demo("--seeds", 2)
    assert done.code == 0, done.err
    assert run_names() == sorted(TWO_SEEDS)
    for name in TWO_SEEDS:
        run = tomllib.loads(Path(f"runs/demo/{name}/config.toml").read_text())["run"]
        assert (run["seed"], run["name"]) == (int(name.endswith("-s1")), name.removesuffix("-s1"))
        assert read(f"{name}/manifest.json") == read("fedit/manifest.json"), "the partition does not follow run.seed"
    progress = re.findall(r"run \d of \d: .*", done.err)
    assert progress == [
        f"run {number} of 8: {name.removesuffix('-s1')}, seed {int(number > 4)} -> runs/demo/{name}"
        for number, name in enumerate(TWO_SEEDS, 1)
    ]
    assert done.out == demo("runs/demo", command="show").out
    assert "(seed 0, 1)" in done.out
    [table] = json.loads(demo("--seeds", 2, "--json").out)
    assert table["seeds"] == [0, 1]
    for method in METHODS:
        means = [read(f"{name}/summary.json")["rows"][method]["mean"] for name in (method, f"{method}-s1")]
        assert table["columns"][method]["mean"] == means
        assert f" {mean(means):.1f} ± {stdev(means):.1f} " in re.findall(r"│ mean  .*", done.out)[0].replace("*", " ")
    assert len(table["columns"]["base"]["mean"]) == 1


def test_finished_runs_are_used_again(demo: Demo) -> None:
    first = demo()
    assert first.code == 0, first.err
    assert run_names() == sorted(METHODS)
    assert "±" not in first.out
    assert "run 3 of 4: fedamole, seed 0 -> runs/demo/fedamole" in first.err
    before = ids()
    more = demo("--seeds", 2)
    assert run_names() == sorted(TWO_SEEDS)
    assert {name: ids()[name] for name in METHODS} == before
    assert "run 3 of 8: fedamole, seed 0: already finished, in runs/demo/fedamole" in more.err
    assert "run 5 of 8: local_only, seed 1 -> runs/demo/local_only-s1" in more.err
    assert demo().out == first.out, "the table of one seed, although runs of two are there"


def test_an_interrupted_demo_is_continued(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = demo("--folder", "whole")

    def interrupt(listener: PlainProgress, round_: int, validation: dict[str, float]) -> None:
        if "fedit" in validation:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PlainProgress, "round_done", interrupt)
        stopped = demo()
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1] == "interrupted; repeat the command to continue after the last finished round"
    assert run_names() == ["fedit", "local_only"]
    before = ids()
    done = demo()
    assert done.code == 0, done.err
    assert done.out == complete.out
    assert {name: ids()[name] for name in before} == before


def test_runs_with_other_settings_are_refused(demo: Demo, tiny: Path, tmp_path: Path) -> None:
    assert demo().code == 0
    before = ids()
    write_configs(tmp_path, tiny, rounds=2)
    refused = demo("--seeds", 2)
    assert (refused.code, refused.out) == (5, "")
    loading, error = refused.err.splitlines()
    assert loading == "loading PyTorch"
    assert error.startswith(
        "error: runs/demo/local_only: the stored run has federation.rounds = 1, but `fedamole demo` now has 2; "
        "nothing is overwritten"
    )
    assert ids() == before


@pytest.mark.parametrize("kind", ["a folder with other things", "a file", "a damaged run", "another process", "seeds"])
def test_what_else_is_refused(kind: str, demo: Demo) -> None:
    path = Path("runs/demo")
    arguments: list[object] = []
    code, says = 5, "error: runs/demo exists already and contains no run of the demo: choose --folder OTHER"
    path.parent.mkdir()
    if kind == "a folder with other things":
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    elif kind == "a file":
        path.write_text("mine")
    elif kind == "a damaged run":
        assert demo().code == 0
        (path / "fedit" / "summary.json").write_text("{")
        says = "error: runs/demo/fedit/summary.json is not valid JSON"
    elif kind == "seeds":
        arguments, code, says = ["--seeds", 0], 2, "0 is not in the range"
    if kind == "another process":
        path.mkdir()
        says = "error: runs/demo: another process is running this demo"
        with exclusive(path / LOCK, "held"):
            result = demo(*arguments)
    else:
        result = demo(*arguments)
    assert result.code == code, result.err
    assert says in result.err
    assert "run 1 of" not in result.err, "refused before any run"


def test_the_bundled_demo_differs_between_seeds_in_the_seed_alone(tmp_path: Path) -> None:
    runs = demo_runs.demo_runs(tmp_path / "demo", 3)
    assert [run.path.name for run in runs] == [*TWO_SEEDS, *(f"{method}-s2" for method in METHODS)]
    for run in runs:
        expected = load_config(bundled_config(run.config.method_name)).tables()
        expected["run"]["seed"] = run.seed
        assert run.config.tables() == expected


@pytest.mark.long
def test_a_shared_lora_does_not_depend_on_the_group(tmp_path: Path) -> None:
    """The bundled task as it is: what docs/compare.md says of LoRA methods under "What can be reproduced"."""
    results = []
    for group in (3, 8):
        config = load_config(bundled_config("fedit"), [f"run.group={group}"])
        results.append(start(config, tmp_path / str(group), ProgressListener())["rows"])
    for row in ("fedit", "fedit_ft"):
        for client, scores in results[0][row]["clients"].items():
            other = results[1][row]["clients"][client]
            assert scores["loss"] == pytest.approx(other["loss"], abs=1e-4)
            assert scores["score"] == pytest.approx(other["score"], abs=0.1)
