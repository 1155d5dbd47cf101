"""The trackers of a run, opened through the tracker classes of accelerate.

Weights & Biases, MLflow and Trackio decide by their own settings where the series go, and TensorBoard's event files go
to the run folder. docs/tracking.md has the settings.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from fedamole.config import Config
from fedamole.errors import ConfigError
from fedamole.runs.run_folder import RunFolder

PROJECT = "fedamole"
"""Project (in MLflow: experiment) of the runs, unless the environment names another."""
Stored = dict[str, Any]


def check_trackers(config: Config) -> None:
    """Raise ConfigError if the package of a tracker in `run.trackers` is not installed; imports none of them."""
    missing = [name for name in config.run.trackers if not _installed(name)]
    if missing:
        raise ConfigError(
            f"run.trackers: {', '.join(missing)} not installed; pip install {' '.join(missing)}; or remove it from "
            "run.trackers"
        )


def _installed(name: str) -> bool:
    """Return whether a package is installed; a folder of this name in the working folder, as `wandb/`, is none."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


class TrackerError(ConfigError):
    """A tracker does not start."""


class Tracker:
    """One open tracker of a run."""

    def __init__(self, name: str, folder: RunFolder, config: Config, stored: Stored) -> None:
        """Open the tracker called `name`. `stored` is what `trackers.json` has of it: empty before the first start.

        Raises:
            TrackerError: The tracker refuses to start, for example because nobody is logged in.
        """
        self.name, self.step, self.id = name, int(stored.get("step", -1)), stored.get("id")
        self.finished = bool(stored.get("finished", False))
        PartialState()  # accelerate's trackers write to its log, which needs it
        with self._starting():
            self._tracker = _created(name, folder, config, self.step, self.id)
            self._tracker.start()
        if name == "mlflow":
            self.id = self._tracker.tracker.info.run_id

    def stored(self) -> Stored:
        """Return what a resumed run needs to continue the series."""
        fields = {"step": self.step, "id": self.id, "finished": self.finished}
        return {key: value for key, value in fields.items() if value is not None}

    def set_parameters(self, values: dict[str, bool | int | float | str]) -> None:
        """Store the hyper-parameters of the run. Raises TrackerError."""
        with self._starting():
            self._tracker.store_init_configuration(values)

    def log(self, values: dict[str, float], step: int) -> None:
        """Add a value to each series at a step."""
        self._tracker.log(values, step=step)
        self.step = step

    def attach(self, page: Path) -> None:
        """Store the report page, if the tracker stores files (Weights & Biases and MLflow)."""
        if self.name == "wandb":
            self._tracker.tracker.log_artifact(str(page), name=f"report-{self._tracker.tracker.id}", type="report")
        elif self.name == "mlflow":
            self._tracker.log_artifact(str(page))

    def close(self) -> None:
        """Send what has not been sent yet, and end the tracker's session."""
        self._tracker.finish()

    @contextmanager
    def _starting(self) -> Iterator[None]:
        """Raise TrackerError for any error in the block."""
        try:
            yield
        except Exception as error:  # each package has errors of its own
            raise TrackerError(
                f"run.trackers: {self.name} does not start: {error}; see its settings in docs/tracking.md (offline "
                "mode, log-in), or remove it from run.trackers"
            ) from error


def _created(name: str, folder: RunFolder, config: Config, step: int, stored_id: str | None) -> GeneralTracker:
    """Return a tracker that is not started. Each continues the series of the run after `step` if it has any."""
    run_id, run_name = str(folder.about["id"]), config.run.name
    if name == "tensorboard":
        # Event files of an interrupted round are hidden from the step on at which this session begins.
        purge = {} if step < 0 else {"purge_step": step + 1}
        return TensorBoardTracker("tensorboard", logging_dir=folder.path, **purge)
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return WandBTracker(project, id=run_id, name=run_name, group=config.method_name, resume="allow")
    if name == "trackio":
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        return TrackioTracker(project, name=f"{run_name}-{run_id[:8]}", resume="allow")
    return MLflowTracker(PROJECT, run_id=stored_id, run_name=run_name)
