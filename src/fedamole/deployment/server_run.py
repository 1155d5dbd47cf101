"""The coordinator's side of a deployed run: the same loop, over whoever is connected."""

import json
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch

from fedamole.config import load_config
from fedamole.deployment.shared_config import agreed_hash, shared_tables
from fedamole.engine.remote import Link, Remote
from fedamole.experiment import check_length, loop_of, rows_of, server_of
from fedamole.federation.progress import ProgressListener
from fedamole.files import write_atomic
from fedamole.model.base import load_base
from fedamole.planning import exposure
from fedamole.runs.identity import Identity
from fedamole.runs.run_folder import CLIENTS, RUN, SERVER, RunFolder

log = logging.getLogger(__name__)

SETTINGS, PROGRESS, OUTCOME, LOG = "config.toml", "progress.jsonl", "outcome.json", "run.log"
"""Files in the server's own folder."""
TICKET = "ticket"
"""Another: which submission of the run counts, as Flower may yet start one that was given up."""


OnProgress = Callable[[dict[str, Any]], None]
"""Called with every event of a run, a line of progress.jsonl."""


class ProgressLogHandler(logging.Handler):
    """Warnings among the lines of progress, so that whoever watches the run reads why a client is left out."""

    def __init__(self, progress: "ProgressFile") -> None:
        """Write to a run's progress."""
        super().__init__(logging.WARNING)
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a warning on."""
        self.progress.say("warning", text=record.getMessage())


class ProgressFile(ProgressListener):
    """Writes what goes on as lines of JSON, for whoever shows it."""

    def __init__(self, folder: RunFolder, on_progress: OnProgress | None = None) -> None:
        """Append to progress.jsonl of a server's folder; `on_progress` is given every line as well."""
        self.folder, self.on_progress = folder, on_progress
        self.path = folder.path / SERVER / PROGRESS
        self.say("started", pid=os.getpid())

    def say(self, what: str, **fields: Any) -> None:
        """Add a line."""
        line = {"what": what, "time": time.time(), **fields}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.on_progress is not None:
            self.on_progress(line)

    def joined(self, name: str, about: Mapping[str, Any]) -> None:
        """A client has joined; what it told goes into clients.json."""
        path = self.folder.path / CLIENTS
        known = self.folder.read_json(CLIENTS) if path.exists() else {}
        write_atomic(path, json.dumps({**known, name: dict(about)}, indent=1, sort_keys=True) + "\n")
        self.say("joined", client=name)

    def present(self, names: Collection[str], waiting_for: int) -> None:
        """Who is there, and how many more are needed."""
        self.say("present", clients=sorted(names), waiting_for=waiting_for)

    def round_started(self, round_: int, rounds: int, cohort: Sequence[str]) -> None:
        """A round has begun."""
        self.say("round", round=round_, rounds=rounds, cohort=list(cohort))

    def group_started(self, round_: int, names: Sequence[str]) -> None:
        """Clients have been asked to train."""
        self.say("asked", round=round_, clients=list(names))

    def client_done(self, round_: int, name: str, report: Mapping[str, Any]) -> None:
        """A client has answered, or failed."""
        told = {key: report[key] for key in ("loss", "seconds", "failed") if key in report}
        self.say("answered", round=round_, client=name, **told)

    def stage(self, text: str) -> None:
        """Something else has begun."""
        self.say("stage", text=text)

    def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
        """A round has been committed."""
        self.say("done", round=round_, validation=dict(validation))


def coordinate(link: Link, path: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Begin the run that is set up in a folder, or go on with it; return the summary. `on_progress` is told what goes on.

    Errors: ConfigError, BaseModelError, RunError; a run that ended with one goes on from its last round when called
    again.
    """
    config = load_config(path / SERVER / SETTINGS)
    torch.set_num_threads(config.run.threads)
    names = sorted(config.deployment.clients)
    config.method.check(len(names))
    rows = rows_of(config)
    base = load_base(config.base, torch.device("cpu"), Path.cwd())
    check_length(config, base)
    if (path / RUN).exists():
        folder = RunFolder.open(path)
        Identity(**folder.about["base"]).check(base.identity, "the base that base.model names now")
    else:
        manifest = json.dumps({"clients": names})
        folder = RunFolder.create(
            path, tomli_w.dumps(config.tables()), manifest, config.method_name, base.identity, "server"
        )
    if folder.finished:
        return folder.read_json("summary.json")
    server, tables = server_of(config, base), shared_tables(config, base.identity)
    del base
    with folder.locked():
        listener = ProgressFile(folder, on_progress)
        handler = ProgressLogHandler(listener)
        logging.getLogger("fedamole").addHandler(handler)
        listener.say("agreed", hash=agreed_hash(tables))
        for sentence in exposure(config, len(names), (), server.shapes):
            listener.say("exposure", text=sentence)
        engine = Remote(link, config.method, rows, server, folder.about["id"], tables, config.deployment, listener)
        return loop_of(config, engine, server, folder, listener).run()
