"""Runs and comparisons that are started in Python."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

import fedamole as fa
from fedamole.errors import FedamoleError, RunError

ROWS = [{"prompt": f"Is {number} even?\n", "completion": ("yes", "no")[number % 2]} for number in range(30)]
DATA = {"north": ROWS, "south": [{"prompt": f"Is {n} odd?\n", "completion": ("no", "yes")[n % 2]} for n in range(30)]}
CONFIG: dict[str, Any] = {
    "method": {"name": "fedit"},
    "federation": {"rounds": 3},
    "training": {"local_steps": 1},
    "run": {"threads": 1, "device": "cpu"},
    "evaluation": {"pre_aggregation": True},
}


class Recorder(fa.Callback):
    """Records events, and ends the run after a number of rounds."""

    def __init__(self, rounds: int = 100) -> None:
        self.rounds, self.events = rounds, list[tuple[str, Any]]()

    def round_started(self, round_: int, rounds: int, cohort: Any) -> None:
        self.events.append(("started", (round_, rounds, list(cohort))))

    def step(self, done: int, steps: int) -> None:
        self.events.append(("step", (done, steps)))

    def client_done(self, round_: int, name: str, report: Mapping[str, Any]) -> None:
        self.events.append(("client", name))

    def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
        self.events.append(("done", list(validation)))
        self.rounds -= 1

    def should_stop(self) -> bool:
        return self.rounds <= 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder(2)


@pytest.fixture(scope="module")
def run(folder: Path, recorder: Recorder) -> fa.Run:
    """A run of which a callback ends the last round."""
    return fa.run(CONFIG, data=DATA, folder=folder / "mine", callbacks=[recorder], progress="none")


def test_callbacks_receive_events_and_end_the_run(run: fa.Run, recorder: Recorder) -> None:
    one_round = [("step", (1, 1)), ("client", "north"), ("client", "south"), ("done", ["fedit", "fedit_ft"])]
    first, second = (("started", (round_, 3, ["north", "south"])) for round_ in (0, 1))
    assert recorder.events == [first, *one_round, second, *one_round]
    assert run.finished
    assert set(run.metrics["round"]) == {-1, 0, 1}
    card = (run.path / "clients/north/adapter/README.md").read_text()
    assert "stopped after 2 of 3 rounds: a callback ended it" in " ".join(card.split())


def test_frames_have_the_numbers_of_the_files(run: fa.Run) -> None:
    from fedamole.reporting.runs import read_run

    rows = read_run(run.path).summary["rows"]
    assert len(run.scores) == sum(len(row["clients"]) for row in rows.values()) == 8
    for line in run.scores.itertuples():
        assert line.score == rows[line.model]["clients"][line.client]["score"]
    assert run.scores.set_index(["model", "client"])["best_round"].isna()["base"].all()
    assert run.clients == ["north", "south"]
    assert run.config["training"]["local_steps"] == 1
    assert (run.metrics.query("split == 'train'")["bytes_up"] > 0).all()


def test_the_model_is_the_one_that_load_personal_model_returns(run: fa.Run) -> None:
    model = run.model("north", device="cpu")
    assert isinstance(model, PeftModel)
    other, tokenizer = fa.load_personal_model(run.path, "north", device="cpu")
    ids = tokenizer("Is 3 even?\n", return_tensors="pt")["input_ids"]
    assert model(ids).logits.equal(other(ids).logits)
    assert not model(ids).logits.equal(run.model("north", "fedit_ft", device="cpu")(ids).logits)
    assert run.tokenizer("north").get_vocab() == tokenizer.get_vocab()


def test_the_report_is_the_page(run: fa.Run, tmp_path: Path) -> None:
    page = run.report().save(tmp_path / "report.html").read_text()
    assert "<!doctype html>" in page.lower()[:200]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not a report"):
        run.report().save(tmp_path / "notes.txt")
    assert "finished=True" in run._repr_html_()


def test_rows_lie_beside_the_run_so_that_it_can_be_resumed(run: fa.Run, folder: Path) -> None:
    assert len(list((folder / "data").glob("*.jsonl"))) == 2
    again = fa.resume(run.path, progress="none")
    assert again.scores.equals(run.scores)


def test_the_same_run_by_the_command_line_is_the_same(run: fa.Run, tmp_path: Path) -> None:
    config = (run.path / "config.toml").read_text().replace("rounds = 3", "rounds = 2")
    (tmp_path / "config.toml").write_text(config)
    command = [sys.executable, "-m", "fedamole", "run", "config.toml", f"run.folder={tmp_path / 'run'}"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert fa.Run(tmp_path / "run").scores.equals(run.scores)


def test_comparison(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {key: CONFIG[key] for key in ("training", "run")} | {"federation": {"rounds": 1}}
    settings: dict[str, Any] = {"data": DATA, "seeds": [0, 1], "folder": folder / "compared"}
    result = fa.compare(["local_only", "fedit"], config, **settings, progress="none")
    assert not result.failed
    assert sorted(result.runs) == [f"scenario/{name}-s{seed}" for name in ("fedit", "local_only") for seed in (0, 1)]
    scores = result.records.query("table == 'methods' and measure == 'score'").set_index("method")
    runs = [result.runs[f"scenario/fedit-s{seed}"].scores.query("model == 'fedit'")["score"].mean() for seed in (0, 1)]
    assert scores.loc["fedit", "mean"] == pytest.approx(sum(runs) / 2)
    assert "fedit" in result._repr_html_()
    times = {run.path: (run.path / "summary.json").stat().st_mtime_ns for run in result.runs.values()}
    again = fa.compare(folder / "compared" / "comparison.toml", progress="none")
    assert {run.path: (run.path / "summary.json").stat().st_mtime_ns for run in again.runs.values()} == times
    with pytest.raises(RunError, match="local_steps"):
        fa.compare(["fedit"], config | {"training": {"local_steps": 2}}, **settings, progress="none")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fa.run({"method": {"name": "fedit"}}), "data.source is empty"),
        (lambda: fa.run({"training": {"local_step": 1}}, data=DATA), "did you mean 'local_steps'"),
        (lambda: fa.run("missing.toml"), "missing.toml"),
        (lambda: fa.run(CONFIG, data=DATA, callbacks=[print]), "is not derived from fedamole.Callback"),  # type: ignore
        (lambda: fa.run(CONFIG, data=DATA, progress="bar"), "progress = 'bar'"),  # type: ignore[arg-type]
        (lambda: fa.run(CONFIG, data={"../x": ROWS}), "data.source.name"),
        (lambda: fa.compare("a.toml", seeds=[1]), "give the file alone"),
        (lambda: fa.compare(["fedit"], data=DATA, seedz=[1]), "seedz"),
        (lambda: fa.compare(["fedit"], data=DATA, seeds=[None]), "cannot be written as TOML"),
        (lambda: fa.Run("nothing"), "nothing"),
    ],
)
def test_mistakes_leave_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FedamoleError) as caught:
        call()
    assert message in str(caught.value)
    assert not list(tmp_path.rglob("run.json"))


def test_importing_the_package_does_not_import_torch() -> None:
    text = "import fedamole, sys; assert 'run' in dir(fedamole); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", text], check=True)


def test_public_names_exist() -> None:
    for name in fa.__all__:
        assert getattr(fa, name) is not None
    with pytest.raises(AttributeError):
        _ = fa.nothing
