"""Trials of a comparison: each is an ordinary run folder, written by a process of its own."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import tomli_w

from fedamole.config import Config, Table, load_config, to_config
from fedamole.errors import FedamoleError, RunError, describe_os_error
from fedamole.experiment import resume, start
from fedamole.federation.progress import ProgressListener
from fedamole.files import write_atomic
from fedamole.model.base import resolve_device
from fedamole.received.files import read_toml
from fedamole.runs.run_folder import CONFIG, MANIFEST, RUN, SUMMARY, RunFolder

MAY_DIFFER = ("run.folder", "run.device", "run.threads", "run.group")
"""Settings in which a stored trial may differ from the comparison: its folder and the device it ran on."""
PRELOADED = ["fedamole.experiment", "peft", "rouge_score.rouge_scorer"]
"""Modules that the fork server imports once for all trials on a CPU. None of them may start Python threads, which do
not survive a fork."""
LOCK = ".lock"
"""File in a folder of trials; the process that runs them locks it."""
STOP_TIMEOUT = 10.0
"""Seconds to wait for a process to end after SIGTERM, before it is killed."""

State = Literal["new", "unfinished", "failed", "finished"]


@dataclass(frozen=True)
class Trial:
    """One run of a comparison."""

    name: str
    """Path below the comparison's folder, such as snli/fedit-s0."""
    path: Path
    scenario: str
    seed: int
    variants: Mapping[str, str]
    """For each method of the comparison that this run scores, the variant in its summary (fedit and fedit_ft may
    share a run)."""
    config: Config

    @property
    def failure(self) -> Path:
        """File with the reason why the last attempt failed."""
        return self.path.with_name(self.path.name + ".failed.json")

    @property
    def log(self) -> Path:
        """Output of the trial's process; exists only if there was any."""
        return self.path.with_name(self.path.name + ".log")

    @property
    def state(self) -> State:
        """Progress of the trial, read from its files."""
        if (self.path / SUMMARY).exists():
            return "finished"
        if self.failure.exists():
            return "failed"
        return "unfinished" if (self.path / RUN).exists() else "new"

    @property
    def error(self) -> str:
        """Reason why the last attempt failed, in one line."""
        return str(json.loads(self.failure.read_text(encoding="utf-8"))["error"])

    def refuse_other_config(self, asked_by: str, may_differ: Sequence[str] = MAY_DIFFER) -> None:
        """Raise RunError if the folder holds a run with other settings; names the first key that differs."""
        if not (self.path / RUN).exists():
            return
        stored, current = (flat(used_tables(it)) for it in (load_config(self.path / CONFIG, stored=True), self.config))
        for key in sorted(stored.keys() | current.keys()):
            if key not in may_differ and stored.get(key) != current.get(key):
                raise RunError(
                    f"{self.path}: the stored run has {key} = {stored.get(key)!r}, but {asked_by} now has "
                    f"{current.get(key)!r}; nothing is overwritten: restore the setting, move the folder away, or "
                    "choose another folder"
                )


def used_tables(config: Config) -> dict[str, Any]:
    """Return the tables of a config without the public prompts that its method does not read."""
    if not config.method.needs_public_prompts:
        config = replace(config, data=replace(config.data, public=None))
    return config.tables()


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested tables and lists to one level: data.source[0].limit = 5."""
    if isinstance(value, Mapping):
        items = [(f"{name}.{key}".lstrip("."), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and value:
        items = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {name: value}
    return {key: leaf for inner, item in items for key, leaf in flat(item, inner).items()}


def reuse_run(trial: Trial, source: Path) -> None:
    """Copy a finished run with the same settings to the trial's folder, instead of running it again."""
    if trial.path.exists():
        return
    trial.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = trial.path.with_name(f".{trial.path.name}.copying")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(".lock"))
    tables = read_toml(temporary / CONFIG)
    tables["run"]["folder"] = str(trial.path.resolve())
    write_atomic(temporary / CONFIG, tomli_w.dumps(tables))
    os.rename(temporary, trial.path)


class TrialListener:
    """Receives the progress of the trials; this base class ignores it."""

    def trials_started(self, trials: int, finished: int) -> None:
        """Called before a batch of `trials` runs; `finished` more were finished earlier."""

    def trial_done(self, trial: Trial, seconds: float, summary: Mapping[str, Any]) -> None:
        """Called when a trial has finished."""

    def trial_failed(self, trial: Trial, seconds: float, error: str) -> None:
        """Called when a trial has failed; the others continue."""


@dataclass(frozen=True)
class _RunningTrial:
    """A trial and its process."""

    trial: Trial
    process: BaseProcess
    errors: Connection
    """Receives the error that ended the process, if any."""
    started: float
    """Value of time.perf_counter() at the start."""


def run_trials(trials: Sequence[Trial], workers: int, listener: TrialListener) -> None:
    """Run all unfinished trials, at most `workers` at the same time.

    A failed trial is recorded in its `.failed.json` and does not stop the others. When this call ends, by an interrupt
    too, all processes are stopped; their runs can be resumed.
    """
    waiting = deque(trial for trial in trials if trial.state != "finished")
    listener.trials_started(len(waiting), len(trials) - len(waiting))
    running: dict[int, _RunningTrial] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                _launch(waiting.popleft(), running)
            for sentinel in wait(list(running)):
                if isinstance(sentinel, int):
                    _record_end(running[sentinel], listener)
                    del running[sentinel]
    finally:
        _stop([left.process for left in running.values()])


def _stop(processes: Sequence[BaseProcess]) -> None:
    """Terminate processes and wait for them; kill those that do not end in time, which damages no run."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(STOP_TIMEOUT)
        process.kill()
        process.join()


def _launch(trial: Trial, running: dict[int, _RunningTrial]) -> None:
    """Start a trial's process and add it to `running`. SIGINT is blocked in the process, so only the parent gets it."""
    trial.path.parent.mkdir(parents=True, exist_ok=True)
    # A fork server that has imported everything once saves some seconds per trial. CUDA does not survive its forks.
    on_cpu = resolve_device(trial.config.run.device).type == "cpu"
    context: Any = multiprocessing.get_context("forkserver" if on_cpu else "spawn")
    if on_cpu:
        context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    tables = trial.config.tables()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process = context.Process(target=_work, args=(tables, str(trial.path), str(trial.log), sender))
        process.start()
        running[process.sentinel] = _RunningTrial(trial, process, receiver, time.perf_counter())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    sender.close()


def _record_end(ended: _RunningTrial, listener: TrialListener) -> None:
    """Report the end of a trial's process to the listener, and write the reason of a failure to `.failed.json`."""
    ended.process.join()
    seconds = time.perf_counter() - ended.started
    trial, report = ended.trial, _error_report(ended)
    ended.errors.close()
    if trial.log.exists() and not trial.log.stat().st_size:
        trial.log.unlink()
    if not report and trial.state == "finished":
        trial.failure.unlink(missing_ok=True)
        listener.trial_done(trial, seconds, RunFolder(trial.path).read_json(SUMMARY))
        return
    error = " ".join(report.get("error", _exit_reason(ended.process.exitcode, trial)).split())
    record = {"trial": trial.name, "error": error, "seconds": seconds, "traceback": report.get("traceback", "")}
    write_atomic(trial.failure, json.dumps(record, indent=1) + "\n")
    listener.trial_failed(trial, seconds, error)


def _error_report(ended: _RunningTrial) -> dict[str, str]:
    """Return the error that the process sent; empty if it sent none."""
    try:
        return dict(ended.errors.recv()) if ended.errors.poll() else {}
    except EOFError:
        return {}


def _exit_reason(code: int | None, trial: Trial) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; the memory may have run out: set fewer workers or a smaller run.group" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with exit code {code}; see {trial.log}"


def _work(tables: Table, folder: str, log: str, errors: Connection) -> None:
    """Run or resume one trial; the main function of a trial's process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # lets Python release its semaphores
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    path = Path(folder)
    try:
        start_or_resume(to_config(tables), path, ProgressListener())
    except FedamoleError as error:
        errors.send({"error": str(error)})
    except OSError as error:
        errors.send({"error": describe_os_error(error), "traceback": traceback.format_exc()[-8000:]})
    except Exception as error:
        # Truncated: a pipe holds 64 KiB, and `send` must not wait for a reader.
        errors.send({"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()[-8000:]})


def start_or_resume(config: Config, path: Path, listener: ProgressListener) -> None:
    """Run a config in a folder, or continue the run that was interrupted there.

    The caller has to make sure that no other process does the same.
    """
    _remove_stub(path)
    if (path / RUN).exists():
        resume(path, listener)
    else:
        start(config, path, listener)


def _remove_stub(path: Path) -> None:
    """Remove the folder of a run that was killed before run.json was written: it holds no results."""
    if not path.is_dir() or (path / RUN).exists():
        return
    written_first = {file for name in (CONFIG, MANIFEST, RUN) for file in (name, f".{name}.writing")}
    if {file.name for file in path.iterdir()} <= written_first:
        shutil.rmtree(path)


def _end_with_parent() -> None:
    """Exit when the parent process dies."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
