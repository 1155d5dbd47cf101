"""Cells of a comparison at work: every one an ordinary run folder, made by a process of its own."""

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
from dataclasses import dataclass
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

FREE = ("run.folder", "run.device", "run.threads", "run.group")
"""Settings that a stored cell may differ in: where it lies and what it ran on."""

PRELOADED = ["fedamole.experiment", "peft", "rouge_score.rouge_scorer"]
"""Modules that every cell on a CPU finds imported; none of them starts threads of Python, which no fork survives."""

LOCK = ".lock"
"""File in a folder of cells; the process that makes them holds it."""

PATIENCE = 10.0
"""Seconds that a process which is told to end may take."""

State = Literal["new", "unfinished", "failed", "finished"]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    name: str
    """Its place under the comparison's folder, such as snli/fedit-s0."""
    path: Path
    scenario: str
    seed: int
    rows: Mapping[str, str]
    """Row of its summary for each method that it answers for: fedit and fedit_ft may be one run."""
    config: Config

    @property
    def failure(self) -> Path:
        """File that says why its last try failed."""
        return self.path.with_name(self.path.name + ".failed.json")

    @property
    def log(self) -> Path:
        """What its process said; there only where it said something."""
        return self.path.with_name(self.path.name + ".log")

    @property
    def state(self) -> State:
        """How far it is, by its files alone."""
        if (self.path / SUMMARY).exists():
            return "finished"
        if self.failure.exists():
            return "failed"
        return "unfinished" if (self.path / RUN).exists() else "new"

    @property
    def error(self) -> str:
        """Why its last try failed, in one line."""
        return str(json.loads(self.failure.read_text(encoding="utf-8"))["error"])

    def refuse_other_config(self, asked_by: str, free: Sequence[str] = FREE) -> None:
        """Raise RunError where the folder holds a run with other settings; names the first key that differs."""
        if not (self.path / RUN).exists():
            return
        stored, asked = flat(load_config(self.path / CONFIG).tables()), flat(self.config.tables())
        for key in sorted(stored.keys() | asked.keys()):
            if key not in free and stored.get(key) != asked.get(key):
                raise RunError(
                    f"{self.path}: {key} = {stored.get(key)!r} there, but {asked_by} now asks for {asked.get(key)!r}; "
                    "nothing is overwritten: put the setting back, move the folder away, or choose another folder"
                )


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Turn nested tables and lists into one level: data.source[0].limit = 5."""
    if isinstance(value, Mapping):
        items = [(f"{name}.{key}".lstrip("."), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and value:
        items = [(f"{name}[{place}]", item) for place, item in enumerate(value)]
    else:
        return {name: value}
    return {key: found for inner, item in items for key, found in flat(item, inner).items()}


def copied(cell: Cell, source: Path) -> None:
    """Make a cell of a finished run with the very same settings, instead of running it again."""
    if cell.path.exists():
        return
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    begun = cell.path.with_name(f".{cell.path.name}.copying")
    shutil.rmtree(begun, ignore_errors=True)
    shutil.copytree(source, begun, ignore=shutil.ignore_patterns(".lock"))
    tables = read_toml(begun / CONFIG)
    tables["run"]["folder"] = str(cell.path.resolve())
    write_atomic(begun / CONFIG, tomli_w.dumps(tables))
    os.rename(begun, cell.path)


class TrialListener:
    """Told what becomes of the cells, to show it; this one shows nothing."""

    def cells_started(self, cells: int, finished: int) -> None:
        """So many cells are to be run, and so many were finished before."""

    def cell_done(self, cell: Cell, seconds: float, summary: Mapping[str, Any]) -> None:
        """A cell has been finished."""

    def cell_failed(self, cell: Cell, seconds: float, error: str) -> None:
        """A cell has failed; the others go on."""


@dataclass(frozen=True)
class _Working:
    """A cell at work."""

    cell: Cell
    process: BaseProcess
    answer: Connection
    started: float


def run_cells(cells: Sequence[Cell], workers: int, listener: TrialListener) -> None:
    """Run all cells that are not finished, so many at once; failures are written down and stop nobody else.

    Whatever ends this call, an interrupt included, ends the processes too; their runs can be resumed.
    """
    waiting = deque(cell for cell in cells if cell.state != "finished")
    listener.cells_started(len(waiting), len(cells) - len(waiting))
    working: dict[int, _Working] = {}
    try:
        while waiting or working:
            while waiting and len(working) < workers:
                _launch(waiting.popleft(), working)
            for sentinel in wait(list(working)):
                if isinstance(sentinel, int):
                    _settle(working[sentinel], listener)
                    del working[sentinel]
    finally:
        _stop([left.process for left in working.values()])


def _stop(processes: Sequence[BaseProcess]) -> None:
    """End processes and wait for them; whoever does not heed is killed, which harms no run."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(PATIENCE)
        process.kill()
        process.join()


def _launch(cell: Cell, working: dict[int, _Working]) -> None:
    """Start a cell's process and note it; an interrupt is for this process alone to answer."""
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    # A server that has imported everything once saves each cell some seconds; CUDA does not survive its forks.
    on_cpu = resolve_device(cell.config.run.device).type == "cpu"
    context: Any = multiprocessing.get_context("forkserver" if on_cpu else "spawn")
    if on_cpu:
        context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    tables = cell.config.tables()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process = context.Process(target=_work, args=(tables, str(cell.path), str(cell.log), sender))
        process.start()
        working[process.sentinel] = _Working(cell, process, receiver, time.perf_counter())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    sender.close()


def _settle(done: _Working, listener: TrialListener) -> None:
    """Say what has become of a cell whose process has ended, and write down why it failed."""
    done.process.join()
    seconds = time.perf_counter() - done.started
    cell, told = done.cell, _told(done)
    done.answer.close()
    if cell.log.exists() and not cell.log.stat().st_size:
        cell.log.unlink()
    if not told and cell.state == "finished":
        cell.failure.unlink(missing_ok=True)
        listener.cell_done(cell, seconds, RunFolder(cell.path).read_json(SUMMARY))
        return
    error = " ".join(told.get("error", _ending(done.process.exitcode, cell)).split())
    record = {"cell": cell.name, "error": error, "seconds": seconds, "traceback": told.get("traceback", "")}
    write_atomic(cell.failure, json.dumps(record, indent=1) + "\n")
    listener.cell_failed(cell, seconds, error)


def _told(done: _Working) -> dict[str, str]:
    """What the process said had gone wrong; empty where it said nothing."""
    try:
        return dict(done.answer.recv()) if done.answer.poll() else {}
    except EOFError:
        return {}


def _ending(code: int | None, cell: Cell) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; often memory ran out: set fewer workers or a smaller run.group" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with exit code {code}; {cell.log} may say why"


def _work(tables: Table, folder: str, log: str, answer: Connection) -> None:
    """Run or resume one cell; this is the whole of a cell's process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of Python, so that semaphores are given back
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    path = Path(folder)
    try:
        start_or_resume(to_config(tables), path, ProgressListener())
    except FedamoleError as error:
        answer.send({"error": str(error)})
    except OSError as error:
        answer.send({"error": describe_os_error(error), "traceback": traceback.format_exc()[-8000:]})
    except Exception as error:
        # Cut, so that sending never waits for a reader: a pipe holds 64 KiB.
        answer.send({"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()[-8000:]})


def start_or_resume(config: Config, path: Path, listener: ProgressListener) -> None:
    """Run a config in a folder, or continue the run that was interrupted there.

    The caller makes sure that no other process does the same.
    """
    _clear_stub(path)
    if (path / RUN).exists():
        resume(path, listener)
    else:
        start(config, path, listener)


def _clear_stub(path: Path) -> None:
    """Remove what a run killed in its first instant leaves: its config, or its manifest too, and nothing done yet."""
    if not path.is_dir() or (path / RUN).exists():
        return
    begun = {file for name in (CONFIG, MANIFEST, RUN) for file in (name, f".{name}.writing")}
    if {file.name for file in path.iterdir()} <= begun:
        shutil.rmtree(path)


def _end_with_parent() -> None:
    """End this process where the one that started it is gone, however that ended: nobody runs on unseen."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
