"""`fedamole compare` with real tiny runs, each in a process of its own."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedamole.cli import main as cli
from fedamole.comparison.budgets import within_bytes
from fedamole.comparison.chosen_row import with_chosen
from fedamole.comparison.file import load_comparison
from fedamole.comparison.run import check_shown, check_stored, preview, run_comparison
from fedamole.comparison.trials import Trial, TrialListener
from fedamole.errors import ConfigError, RunError
from fedamole.experiment import plan
from fedamole.reporting.results import best_validation_loss, read_scenarios
from fedamole.reporting.runs import read_run
from tests.conftest import heeding_interrupts

SMALL = [
    "method.rank=2",
    "method.alpha=4",
    "federation.rounds=2",
    "training.local_steps=2",
    "evaluation.max_new_tokens=1",
]
RANDOM = 'name = "fedamole"\nassignment = "random"\n'


class Recorder(TrialListener):
    """Records the progress of the trials."""

    def __init__(self) -> None:
        self.started: list[tuple[int, int]] = []
        self.done: list[str] = []
        self.failed: dict[str, str] = {}

    def trials_started(self, trials: int, finished: int) -> None:
        self.started.append((trials, finished))

    def trial_done(self, trial: Trial, seconds: float, summary: Mapping[str, Any]) -> None:
        self.done.append(trial.name)

    def trial_failed(self, trial: Trial, seconds: float, error: str) -> None:
        self.failed[trial.name] = error


Write = Callable[..., Path]


def written(folder: Path, tiny: Path, methods: list[str], variants: str = "", **settings: Any) -> Path:
    """A comparison file in a folder, its trials in the folder's `out`."""
    keys = {"name": "small", "methods": methods, "overrides": SMALL, "folder": str(folder / "out"), **settings}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items() if value is not None)
    path = folder / "compare.toml"
    path.write_text(f'{text}[scenarios]\ntiny = "{tiny}/config.toml"\n{variants}')
    return path


@pytest.fixture
def write(tmp_path: Path, tiny: Path) -> Write:
    return lambda methods, variants="", **settings: written(tmp_path, tiny, methods, variants, **settings)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """The file of a finished comparison: read its trials, do not write to them."""
    folder = tmp_path_factory.mktemp("study")
    variants = f"[variants.random]\n{RANDOM}"
    methods = ["random", "fedit_ft", "fedit", "local_only"]
    path = written(folder, tiny, methods, variants, seeds=[0, 1], workers=2)
    recorder = Recorder()
    assert run_comparison(load_comparison(path), recorder) == []
    assert recorder.started == [(6, 0)], "fedit and fedit_ft are one run"
    assert sorted(recorder.done) == sorted(f"tiny/{name}-s{seed}" for name in METHODS for seed in (0, 1))
    return path


METHODS = ("random", "fedit", "local_only")


def test_cells_are_ordinary_runs(study: Path, runs: Any, remains: Any) -> None:
    """The same run from the command line has the same bytes; two rows come from one folder."""
    comparison = load_comparison(study)
    alone = runs("local_only", *SMALL, "run.seed=1")
    assert remains(comparison.folder / "tiny/local_only-s1") == remains(alone)
    fedit = read_run(comparison.folder / "tiny/fedit-s0")
    assert {"fedit", "fedit_ft"} <= set(fedit.summary["rows"])
    [scenario] = read_scenarios(comparison.results())
    assert list(scenario.methods) == ["base", "majority", "random", "fedit_ft", "fedit", "local_only"]
    assert scenario.methods["fedit"][0].measures["score"] == fedit.summary["rows"]["fedit"]["mean"]
    assert scenario.methods["fedit_ft"][0].measures["score"] == fedit.summary["rows"]["fedit_ft"]["mean"]
    assert scenario.methods["random"][1].measures["steps"] == 2


def test_finished_cells_are_skipped_and_unfinished_ones_resumed(
    study: Path, tmp_path: Path, tiny: Path, crash: Any, remains: Any
) -> None:
    comparison = load_comparison(study)
    shutil.copytree(comparison.folder, tmp_path / "out")
    path = tmp_path / "compare.toml"
    path.write_text(study.read_text().replace(str(comparison.folder), str(tmp_path / "out")))
    damaged = tmp_path / "out/tiny/local_only-s0"
    shutil.rmtree(damaged)
    os.rename(crash("round_started", 2, "local_only", *SMALL), damaged)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("out/tiny/*/summary.json")}
    does = {line["trial"]: line["action"] for line in preview(load_comparison(path))}
    assert does == {f"tiny/{name}-s{seed}": "skip (finished)" for name in METHODS for seed in (0, 1)} | {
        "tiny/local_only-s0": "resume"
    }
    recorder = Recorder()
    run_comparison(load_comparison(path), recorder)
    assert recorder.started == [(1, 5)]
    assert recorder.done == ["tiny/local_only-s0"]
    assert remains(damaged) == remains(comparison.folder / "tiny/local_only-s0")
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_failed_cell_is_named_not_averaged_and_tried_again(write: Write, tmp_path: Path) -> None:
    """20 experts cannot be placed on these clients, which shows when the trial runs; local_only goes on."""
    path = write(["big", "local_only"], '[variants.big]\nname = "fedamole"\nexperts = 20\n')
    for _ in range(2):
        recorder = Recorder()
        [failed] = run_comparison(load_comparison(path), recorder)
        assert "no expert assignment exists" in recorder.failed["tiny/big-s0"]
        assert "\n" not in failed.error
    assert recorder.started == [(1, 1)]
    record = json.loads((tmp_path / "out/tiny/big-s0.failed.json").read_text())
    assert record["error"] == failed.error
    [scenario] = read_scenarios(load_comparison(path).results())
    assert list(scenario.methods) == ["base", "majority", "local_only"]
    assert [line["action"][:20] for line in preview(load_comparison(path))] == [
        "run again; it failed",
        "skip (finished)",
    ]


def test_a_trial_whose_process_was_killed_failed_and_resumes(write: Write, tmp_path: Path) -> None:
    path = write(["local_only"], overrides=[*SMALL, "federation.rounds=10"])
    log = str(tmp_path / "out/tiny/local_only-s0.log")

    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list(tmp_path.glob("out/tiny/*/checkpoints/*.json")):
            time.sleep(0.01)
        for process in psutil.Process().children(recursive=True):
            if log in {file.path for file in process.open_files()}:
                process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    [failed] = run_comparison(load_comparison(path), Recorder())
    killer.join()
    assert failed.error.startswith("its process was ended by SIGKILL")
    assert run_comparison(load_comparison(path), Recorder()) == []
    assert not failed.failure.exists()
    assert read_run(failed.path).summary["rounds"] == 10


def test_a_folder_with_other_settings_is_refused(study: Path, tmp_path: Path) -> None:
    def changed(old: str, new: str) -> Path:
        path = tmp_path / "changed.toml"
        path.write_text(study.read_text().replace(old, new))
        return path

    with pytest.raises(
        RunError, match=r"random-s0: the stored run has training.local_steps = 2, but .* now has 3"
    ) as refused:
        run_comparison(load_comparison(changed("local_steps=2", "local_steps=3")), Recorder())
    assert "nothing is overwritten" in str(refused.value)
    with pytest.raises(RunError, match=r"method.assignment = 'random', but"):
        check_stored(load_comparison(changed('"random"\n', '"static"\n')))
    with pytest.raises(RunError, match=r"evaluation.pre_aggregation = True, but"):
        check_stored(load_comparison(changed('"fedit_ft", ', "")))
    with pytest.raises(RunError, match=r"training.local_steps = 2, but"):
        check_shown(load_comparison(changed("local_steps=2", "local_steps=3")))
    path = changed('name = "small"', 'name = "small"\nbudget = "bytes"')
    path.write_text(path.read_text().replace("federation.rounds=2", "federation.rounds=3"))
    check_shown(load_comparison(path))
    with pytest.raises(RunError, match=r"federation.rounds = 2, but"):
        check_stored(load_comparison(path))
    overrides = '"evaluation.max_new_tokens=1", "run.threads=2", "run.group=3", "run.device=auto"'
    check_stored(load_comparison(changed('"evaluation.max_new_tokens=1"', overrides)))


@pytest.mark.parametrize(
    ("changes", "variants", "message"),
    [
        ({"worker": 2}, "", "unknown key worker; did you mean 'workers'?"),
        ({"name": None}, "", "name is missing"),
        ({"workers": 0}, "", "workers = 0: must be at least 1"),
        ({"seeds": [1, 1]}, "", "seeds: 1 occurs twice"),
        ({"seeds": [0.5]}, "", "seeds[0] = 0.5: must be a whole number"),
        ({"budget": "time"}, "", "budget = 'time': must be one of 'steps', 'paper', 'both', 'bytes'"),
        ({"bytes_of": "fedit"}, "", "bytes_of = 'fedit' needs budget"),
        ({"methods": ["fedit", "fedamol"]}, "", "'fedamol' is neither a method nor one of [variants]; did you mean"),
        ({"target": "local"}, "", "target = 'local' is no method; did you mean"),
        ({"reference": "fedamole"}, "", "reference = 'fedamole' is not one of methods"),
        ({"overrides": ["run.seed=3"]}, "", "the comparison sets run.seed itself"),
        ({"overrides": ["training.local_stepz=3"]}, "", "training.local_stepz; did you mean 'local_steps'"),
        ({"overrides": ["training"]}, "", "overrides: override 'training': write table.key=value"),
        (
            {"overrides": ["training.learning_rate=1"], "learning_rates": [1.0]},
            "",
            "learning_rates sets it too; remove one",
        ),
        ({}, "[variants.fedit]\nname = 'fedit'\n", "variants.fedit: this is the name of a method"),
        ({}, "[variants.x]\nrank = 2\n", "variants.x has no method"),
        ({}, "[variants.x]\nname = 'fedit'\n", "variants.x is not compared"),
        ({}, "[variants.'a/b']\nname = 'fedit'\n", "variants.a/b: the name becomes a folder; use only letters, digits"),
        ({}, "[variants.FedIT]\nname = 'fedit'\n", "variants.FedIT: the same folder as 'fedit' on some systems"),
        ({"methods": ["x"]}, "[variants.x]\nname = 'fedit'\nrang = 2\n", "unknown key method.rang; did you mean"),
        ({"methods": ["x"]}, "[variants.x]\nname = 'fed'\n", "variants.x.name = 'fed': there is no such method"),
    ],
)
def test_mistakes_name_file_and_key(changes: dict[str, Any], variants: str, message: str, write: Write) -> None:
    path = write(changes.pop("methods", ["fedit"]), variants, **changes)
    with pytest.raises(ConfigError) as refused:
        load_comparison(path)
    assert str(refused.value).startswith(str(path))
    assert message in str(refused.value)


def test_scenarios_that_cannot_be_compared(write: Write, tmp_path: Path) -> None:
    path = write(["fedit"])
    text = path.read_text()
    path.write_text(text + 'away = "away.toml"\n')
    with pytest.raises(ConfigError, match=r"scenarios.away: .*away.toml cannot be read"):
        load_comparison(path)
    (tmp_path / "away.toml").write_text('[method]\nname = "fedit"\n')
    with pytest.raises(ConfigError, match=r"scenarios.away: .*away.toml has a \[method\]"):
        load_comparison(path)


def test_rounds_that_fit_into_the_bytes_of_another_method(write: Write, runs: Any) -> None:
    """local_only sends nothing and keeps its rounds; the mixtures get as many as fedit's twenty rounds pay for."""
    many = [*SMALL, "federation.rounds=20"]
    settings = {"overrides": many, "budget": "bytes", "reference": "random", "bytes_of": "fedit"}
    comparison = load_comparison(write(["random", "fedit", "local_only"], f"[variants.random]\n{RANDOM}", **settings))
    rounds = {line["trial"]: line["rounds"] for line in preview(comparison)}
    sizes = {name: plan(runs.load(name, *SMALL)).bytes_down for name in ("fedit", "fedamole")}
    fit = int(20 * sizes["fedit"] // sizes["fedamole"])
    assert 2 <= fit < 20
    assert rounds == {"tiny/random-s0": fit, "tiny/fedit-s0": 20, "tiny/local_only-s0": 20}
    few = load_comparison(write(["random", "fedit"], f"[variants.random]\n{RANDOM}", budget="bytes", bytes_of="fedit"))
    assert {line["rounds"] for line in preview(few) if "random" in line["trial"]} == {1}, "at least one round"
    with pytest.raises(ConfigError, match=r"local_only sends .* bytes a round: set bytes_of"):
        within_bytes(load_comparison(write(["local_only"], budget="bytes")))


def test_the_rate_is_chosen_on_validation_and_its_run_used(write: Write, tmp_path: Path) -> None:
    path = write(["fedit", "fedit_ft"], learning_rates=[1e-6, 1e-2, 1e12], widen=0)
    first = preview(load_comparison(path))
    assert [(line["trial"], line["action"]) for line in first] == [
        ("tiny/grid/fedit-lr1e-06", "run"),
        ("tiny/grid/fedit-lr0.01", "run"),
        ("tiny/grid/fedit-lr1000000000000.0", "run"),
        ("tiny/fedit-s0", "wait for its learning rate"),
    ]
    recorder = Recorder()
    assert run_comparison(load_comparison(path), recorder) == []
    assert recorder.started == [(3, 0), (0, 1)], "the first seed's trial is the grid's run"
    comparison = load_comparison(path)
    [arm] = comparison.arms
    losses = {rate: best_validation_loss(trial.path, "fedit") for rate, [trial] in comparison.grid_trials(arm).items()}
    assert losses[1e-2] < losses[1e-6]
    assert losses[1e12] == math.inf, "every update diverged, so the untrained base was scored"
    assert comparison.chosen(arm) == {"fedit": (1e-2, False), "fedit_ft": (1e-2, False)}
    [scenario] = read_scenarios(comparison.results())
    assert scenario.methods["fedit"][0].learning_rate == 1e-2
    assert not scenario.methods["fedit"][0].at_edge
    # Let the other rate be better for fedit_ft alone: then each method has a run of its own, at its own rate.
    metrics = comparison.grid_trials(arm)[1e-6][0].path / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [line | {"loss": 0.1} if line.get("method") == "fedit_ft" else line for line in lines]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trials = {trial.name: trial for trial in comparison.trials(arm)}
    assert list(trials) == ["tiny/fedit-s0", "tiny/fedit_ft-s0"]
    assert trials["tiny/fedit_ft-s0"].config.training.learning_rate == 1e-6
    assert trials["tiny/fedit_ft-s0"].variants == {"fedit_ft": "fedit_ft"}


def test_an_interrupt_stops_everything_and_says_how_to_go_on(write: Write, tmp_path: Path) -> None:
    path = write(["local_only"], overrides=[*SMALL, "federation.rounds=500"])
    arguments = [sys.executable, "-m", "fedamole", "compare", str(path)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, preexec_fn=heeding_interrupts)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("out/tiny/*/checkpoints/*.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    below = psutil.Process(process.pid).children(recursive=True)
    assert below
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "repeat the command to continue" in err.splitlines()[-1]
    assert not psutil.wait_procs(below, timeout=10)[1], "no process is left"
    assert [line["action"] for line in preview(load_comparison(path))] == ["resume"]


def test_the_command_shows_and_writes_tables(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fedamole", "compare", str(study), *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        return out

    files = [tmp_path / name for name in ("t.md", "t.csv", "t.tex", "t.svg")]
    kinds = ("--markdown", "--csv", "--latex", "--plot")
    text = call(
        "--show", *(argument for kind, file in zip(kinds, files, strict=True) for argument in (kind, str(file)))
    )
    assert "tiny: methods" in text
    assert "random minus each other method" in text
    assert all(file.stat().st_size > 300 for file in files)
    assert "| fedit_ft |" in files[0].read_text()
    result = json.loads(call("--show", "--json"))
    assert result["trials"] == {"finished": 6, "failed": 0, "unfinished": 0, "new": 0}
    assert {record["method"] for record in result["records"]} >= {"base", "majority", "fedit", "fedit_ft"}
    assert "skip (finished)" in call("--dry-run")


def test_the_command_shows_the_row_chosen(
    study: Path, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a margin, with one that nobody passes, and with words that cannot be meant."""

    def call(path: Path, *words: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedamole", "compare", str(path), "--show", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code, *capsys.readouterr())

    def scores(text: str, method: str) -> dict[str, Any]:
        records = [line for line in json.loads(text)["records"] if line["table"] == "clients"]
        return {
            line["client"]: line["values"] for line in records if (line["method"], line["measure"]) == (method, "loss")
        }

    code, out, _ = call(study, "--choose", "--json")
    assert code == 0
    methods = ("random", "fedit_ft", "fedit", "local_only")
    validation = best_validation_by_client(study)
    expected = {
        client: [
            [seed, scores(out, min(methods, key=lambda name: validation[name, seed][client]))[client][seed][1]]
            for seed in (0, 1)
        ]
        for client in ("chat", "entail", "mood", "plain")
    }
    assert scores(out, "chosen") == expected
    assert {"steps_to_target", "tokens_to_target"} <= {line["measure"] for line in json.loads(out)["records"]}
    code, out, _ = call(study, "--choose", "--margin", "1e9", "--json")
    assert scores(out, "chosen") == scores(out, "local_only") != expected
    code, out, _ = call(study, "--choose")
    assert "chosen minus each other method" in out
    assert (call(study, "--margin", "1")[0], call(study)[0]) == (2, 0)
    named = write(["chosen", "local_only"], '[variants.chosen]\nname = "fedit"\n')
    with pytest.raises(ConfigError, match=r"variants.chosen: --choose adds a row of this name; rename the variant"):
        with_chosen(load_comparison(named), [], 0.0)


def best_validation_by_client(study: Path) -> dict[tuple[str, int], dict[str, float]]:
    """Validation losses at the best round, by method and seed, straight from the files."""
    actual = {}
    for trial in load_comparison(study).results():
        summary = json.loads((trial.path / "summary.json").read_text())
        best = summary["rows"][trial.variant]["best_round"]
        lines = map(json.loads, (trial.path / "metrics.jsonl").open())
        actual[trial.method, trial.seed] = {
            line["client"]: line["loss"]
            for line in lines
            if (line["split"], line["round"], line.get("method")) == ("validation", best, trial.variant)
        }
    return actual
