"""The coordinator's side of a deployed run: the common training loop, with clients connected over a link."""

import json
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w
import torch
from typing_extensions import override

from fedamole.config import load_config, load_run_config
from fedamole.data.manifest import TableRecord, table_record
from fedamole.deployment.shared_config import agreed_hash, shared_tables
from fedamole.engine.link import Link
from fedamole.engine.remote import Remote
from fedamole.experiment import (
    check_length,
    loop_of,
    public_rows,
    refuse_missing_base,
    second_base,
    server_of,
    variants_of,
)
from fedamole.federation.progress import ProgressListener
from fedamole.files import write_atomic
from fedamole.model.bank import Bank
from fedamole.model.base import load_base, resolve_device
from fedamole.planning import exposure
from fedamole.runs.identity import Identity
from fedamole.runs.run_folder import CLIENTS, MANIFEST, RUN, SERVER, RunFolder
from fedamole.tracking.tracked import tracked
from fedamole.tracking.trackers import check_trackers

log = logging.getLogger(__name__)

SETTINGS, PROGRESS, OUTCOME, LOG = "config.toml", "progress.jsonl", "outcome.json", "run.log"
"""Files in the server's own folder."""
TICKET = "ticket"
"""File in the server's own folder: the current submission. Flower may still start an earlier one, which then stops."""


OnProgress = Callable[[dict[str, Any]], None]
"""Called with every event of a run, a line of progress.jsonl."""


class ProgressLogHandler(logging.Handler):
    """Adds warnings to the progress events, so that the operator sees why a client is left out."""

    def __init__(self, progress: "ProgressFile") -> None:
        """Write to a run's progress file."""
        super().__init__(logging.WARNING)
        self.progress = progress

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self.progress.say("warning", text=record.getMessage())


class ProgressFile(ProgressListener):
    """Writes progress as lines of JSON, for the process that displays it."""

    def __init__(self, folder: RunFolder, on_progress: OnProgress | None = None) -> None:
        """Append to progress.jsonl in the server's folder; `on_progress` is also called with every event."""
        self.folder, self.on_progress = folder, on_progress
        self.path = folder.path / SERVER / PROGRESS
        self.say("started", pid=os.getpid())

    def say(self, kind: str, **fields: Any) -> None:
        """Write an event."""
        line = {"what": kind, "time": time.time(), **fields}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.on_progress is not None:
            self.on_progress(line)

    @override
    def joined(self, name: str, about: Mapping[str, Any]) -> None:
        path = self.folder.path / CLIENTS
        clients = self.folder.read_json(CLIENTS) if path.exists() else {}
        write_atomic(path, json.dumps({**clients, name: dict(about)}, indent=1, sort_keys=True) + "\n")
        self.say("joined", client=name)

    @override
    def present(self, names: Collection[str], waiting_for: int) -> None:
        self.say("present", clients=sorted(names), waiting_for=waiting_for)

    @override
    def round_started(self, round_: int, rounds: int, cohort: Sequence[str]) -> None:
        self.say("round", round=round_, rounds=rounds, cohort=list(cohort))

    @override
    def group_started(self, round_: int, names: Sequence[str]) -> None:
        self.say("asked", round=round_, clients=list(names))

    @override
    def client_done(self, round_: int, name: str, report: Mapping[str, Any]) -> None:
        fields = {key: report[key] for key in ("loss", "seconds", "failed") if key in report}
        self.say("answered", round=round_, client=name, **fields)

    @override
    def stopped(self, text: str) -> None:
        self.say("stopped", text=text)

    @override
    def stage(self, text: str) -> None:
        self.say("stage", text=text)

    @override
    def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
        self.say("done", round=round_, validation=dict(validation))


def _stored_public(folder: RunFolder) -> TableRecord | None:
    """Return the record of the public prompts that a run was started with; None if it has none."""
    stored = folder.read_json(MANIFEST).get("public")
    return None if stored is None else table_record(stored)


def coordinate(link: Link, path: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Start or resume the run prepared in a folder; return its summary. `on_progress` is called with every event.

    Errors: ConfigError, BaseModelError, RunError. A run that ended with an error continues from its last round when
    called again.
    """
    config = load_config(path / SERVER / SETTINGS, stored=True)
    check_trackers(config)
    torch.set_num_threads(config.run.threads)
    names = sorted(config.deployment.clients)
    config.method.check(len(names))
    variants = variants_of(config)
    existing = RunFolder.open(path) if (path / RUN).exists() else None
    # If the base has moved, the run's folder records where it is. Clients are still sent the settings of the config.
    located = config if existing is None else load_run_config(existing)
    refuse_missing_base(located, path)
    keeps_base = config.method.trains_at_server
    device = resolve_device(config.run.device) if keeps_base else torch.device("cpu")
    base = load_base(located.base, device, Path.cwd())
    check_length(config, base)
    public = public_rows(located, base, None if existing is None else _stored_public(existing))
    second = second_base(located, base, None if existing is None else existing.second_base)
    if existing is not None:
        base.identity.check(Identity(**existing.about["base"]), f"the run in {path}")
        folder = existing
    else:
        manifest = json.dumps({"clients": names, **({} if public is None else {"public": asdict(public.record)})})
        folder = RunFolder.create(
            path,
            tomli_w.dumps(config.tables()),
            manifest,
            config.method_name,
            base.identity,
            "server",
            second=None if second is None else second.identity,
        )
    if folder.finished:
        return folder.read_json("summary.json")
    bank, rows = Bank(base) if keeps_base else None, () if public is None else public.rows
    server, tables = server_of(config, base, (), bank, rows, second), shared_tables(config, base.identity)
    del base, bank
    with folder.locked(), folder.session():
        listener = ProgressFile(folder, on_progress)
        handler = ProgressLogHandler(listener)
        logging.getLogger("fedamole").addHandler(handler)
        listener.say("agreed", hash=agreed_hash(tables))
        for sentence in exposure(config, len(names), (), server.shapes):
            listener.say("exposure", text=sentence)
        engine = Remote(link, config.method, variants, server, folder.about["id"], tables, config.deployment, listener)
        with tracked(config, folder, listener) as followed:
            return loop_of(config, engine, server, folder, followed).run()
