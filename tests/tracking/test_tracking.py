"""Experiment trackers: the values that they receive are those of the run's files, once each, also after a resume."""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import call_command

import fedamole as fa
from fedamole.config import to_config
from fedamole.errors import ConfigError, RunError
from fedamole.runs.run_folder import RunFolder
from fedamole.tracking.series import hyper_parameters, round_series, score_series
from fedamole.tracking.trackers import check_trackers

ROWS = [{"prompt": f"Is {number} even?\n", "completion": ("yes", "no")[number % 2]} for number in range(30)]
DATA = {"north": ROWS, "south": ROWS}
OTHERS = ("wandb", "mlflow", "trackio")


def config(*trackers: str) -> dict[str, Any]:
    return {
        "method": {"name": "fedit"},
        "federation": {"rounds": 3},
        "training": {"local_steps": 1},
        "run": {"threads": 1, "device": "cpu", "trackers": list(trackers)},
    }


class Interrupts(fa.Callback):
    """Interrupts a run after its second round is committed, before the trackers have it."""

    def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
        if round_ == 1:
            raise KeyboardInterrupt


def interrupted_and_resumed(tracker: str, folder: Path) -> fa.Run:
    with pytest.raises(KeyboardInterrupt):
        fa.run(config(tracker), data=DATA, folder=folder, callbacks=[Interrupts()], progress="none")
    assert json.loads((folder / "trackers.json").read_text())[tracker]["step"] == 1
    run = fa.resume(folder, progress="none")
    stored = json.loads((folder / "trackers.json").read_text())[tracker]
    assert (stored["step"], stored["finished"]) == (4, True)
    return run


def test_series_by_hand() -> None:
    lines = [
        {"round": -1, "client": "a", "split": "validation", "method": "base", "loss": 3.0},
        {"round": 0, "client": "a", "split": "train", "loss": 1.0, "steps": 2},
        {"round": 0, "client": "b", "split": "train", "loss": 4.0, "steps": 2},
        {"round": 0, "client": "c", "split": "train", "failed": "no answer in time", "bytes_down": 7},
        {"round": 0, "client": "a", "split": "train", "exchange": 1, "loss": 0.5},
        {"round": 0, "split": "round", "cohort": ["a"], "seconds_update": 0.25},
        {"round": 0, "client": "a", "split": "test", "method": "fedit", "loss": 9.0},
    ]
    assert round_series(lines) == {
        0: {"validation/base/clients/a/loss": 3.0, "validation/base/mean/loss": 3.0},
        1: {
            "train/clients/a/loss": 1.0,
            "train/clients/a/steps": 2,
            "train/clients/b/loss": 4.0,
            "train/clients/b/steps": 2,
            "train/clients/c/bytes_down": 7,
            "train/mean/loss": 2.5,
            "train/mean/steps": 2.0,
            "train/mean/bytes_down": 7.0,
            "train/exchange-1/clients/a/loss": 0.5,
            "train/exchange-1/mean/loss": 0.5,
            "train/failed": 1,
            "round/seconds_update": 0.25,
        },
    }
    row = {"mean": 50.0, "worst": 40.0, "clients": {"a": {"score": 40.0}, "b": {"score": 60.0, "loss": 1.0}}}
    assert score_series({"rows": {"fedit": row}}) == {
        "test/fedit/mean/score": 50.0,
        "test/fedit/worst/score": 40.0,
        "test/fedit/clients/a/score": 40.0,
        "test/fedit/clients/b/score": 60.0,
        "test/fedit/clients/b/loss": 1.0,
    }


def test_hyper_parameters_name_no_path(tmp_path: Path) -> None:
    base = tmp_path / "secret" / "qwen"
    tables = {
        **config(),
        "base": {"model": str(base)},
        "data": {"source": [{"name": "a", "path": str(tmp_path / "a.jsonl")}]},
    }
    values = hyper_parameters(to_config(tables))
    assert values["base.model"] == "qwen"
    assert (values["method.name"], values["federation.rounds"], values["data.sources"]) == ("fedit", 3, 1)
    assert str(tmp_path) not in json.dumps(values)
    assert all(isinstance(value, bool | int | float | str) for value in values.values())


def test_tensorboard_continues_after_an_interruption(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = interrupted_and_resumed("tensorboard", tmp_path / "run")
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()

    def series(name: str) -> list[Any]:
        return [(event.step, event.value) for event in events.Scalars(name)]

    lines = run.metrics
    mean = lines[(lines["split"] == "validation") & (lines["method"] == "fedit")].groupby("round")["loss"].mean()
    assert series("validation/fedit/mean/loss") == [(step + 1, pytest.approx(mean[step])) for step in range(3)]
    north = lines[(lines["split"] == "train") & (lines["client"] == "north")].set_index("round")["loss"]
    assert series("train/clients/north/loss") == [(step + 1, pytest.approx(north[step])) for step in range(3)]
    assert [step for step, _ in series("validation/base/mean/loss")] == [0]
    scores = run.scores.query("model == 'fedit'")["score"]
    assert series("test/fedit/mean/score") == [(4, pytest.approx(scores.mean()))]
    (parameters,) = run.path.glob("tensorboard/*/hparams.yml")
    assert "training.local_steps: 1\n" in parameters.read_text()


@pytest.mark.parametrize("name", OTHERS)
def test_other_trackers_start_offline_or_are_refused_before_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder = tmp_path / "run"
    if find_spec(name) is None:
        with pytest.raises(ConfigError, match=f"{name} not installed; pip install {name}; or remove it"):
            fa.run(config(name), data=DATA, folder=folder, progress="none")
        assert not list(tmp_path.rglob("run.json"))
        return
    interrupted_and_resumed(name, folder)
    if name == "mlflow":
        import mlflow

        (finished,) = mlflow.search_runs(experiment_names=["fedamole"], output_format="list")
        client = mlflow.MlflowClient()
        history = client.get_metric_history(finished.info.run_id, "validation/fedit/mean/loss")
        assert [metric.step for metric in history] == [1, 2, 3]
        assert [artifact.path for artifact in client.list_artifacts(finished.info.run_id)] == ["report.html"]
        mlflow.set_tracking_uri(None)
    if name == "wandb":
        assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2


def test_a_folder_named_as_a_tracker_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder `wandb/` with old results lies in the working folder, which is in the search path of modules."""
    (tmp_path / "comet").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_spec("comet") is not None
    settings = to_config({**config("tensorboard"), "data": {"source": [{"name": "a", "path": "a.jsonl"}]}})
    check_trackers(settings)
    named = replace(settings, run=replace(settings.run, trackers=("comet",)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="comet not installed; pip install comet"):
        check_trackers(named)


@pytest.mark.parametrize("method", ["start", "store_init_configuration"])
def test_a_tracker_that_does_not_start_leaves_no_run(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.tracking import TensorBoardTracker

    def fails(self: Any, *arguments: Any) -> None:
        raise OSError("nobody is logged in")

    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardTracker, method, fails)
        for folder in (tmp_path / "new", tmp_path / "empty"):
            with pytest.raises(ConfigError, match=r"tensorboard does not start: nobody is logged in; see its settings"):
                fa.run(config("tensorboard"), data=DATA, folder=folder, progress="none")
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "empty").iterdir())


def test_a_run_that_is_resumed_keeps_its_folder_if_a_tracker_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.tracking import TensorBoardTracker

    def fails(self: Any) -> None:
        raise OSError("nobody is logged in")

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fa.run(config("tensorboard"), data=DATA, folder=folder, callbacks=[Interrupts()], progress="none")
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(TensorBoardTracker, "start", fails)
    with pytest.raises(ConfigError, match="does not start"):
        fa.resume(folder, progress="none")
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(RunError, match="has values of a round"):
        RunFolder.open(folder).empty_new()


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from accelerate.tracking import TensorBoardTracker

    def fails(self: Any, values: Any, step: int | None = None) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(TensorBoardTracker, "log", fails)
    run = fa.run(config("tensorboard"), data=DATA, folder=tmp_path / "run", progress="none")
    assert run.finished
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("fedamole.tracking")]
    assert len(warnings) == 1
    assert warnings[0].startswith("tracker tensorboard: the disk is full; the run continues without it")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (
            '["tensorbord"]',
            "run.trackers[0] = 'tensorbord': must be one of 'tensorboard', 'wandb', 'mlflow', 'trackio'",
        ),
        ('["wandb", "wandb"]', "a tracker is named twice"),
        ("tensorboard", "run.trackers = 'tensorboard': must be a list"),
    ],
)
def test_mistakes_on_the_command_line(value: str, error: str, tiny: Path) -> None:
    result = call_command("run", tiny / "config.toml", f"run.trackers={value}")
    assert result.code == 2
    assert error in result.error


def test_the_old_key_names_the_new_one(tiny: Path) -> None:
    result = call_command("run", tiny / "config.toml", "run.tensorboard=true")
    assert result.code == 2
    assert "run.tensorboard is now called run.trackers" in result.error
