"""The client's side of a deployment: it does what a server asks, on its own data, and each thing once.

Everything private stays in the client's own run folder. A request that comes again gets the answer it got before; what
was done in a round that did not count is undone; what a round made the best model is kept when the next request tells.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import tomli_w
import torch

from fedamole.config import Config, Table, load_config, plain, to_config
from fedamole.data.manifest import load_federation, read_manifest
from fedamole.data.settings import SourceSettings
from fedamole.deployment.agreement import own_tables
from fedamole.engine.wire import (
    EVALUATE,
    JOIN,
    LONGEST_LABEL,
    MOST_LABELS,
    TEST,
    UPDATE,
    Reply,
    Request,
    failure,
    read_request,
    unpacked,
)
from fedamole.errors import BaseModelError, ConfigError, DataError, RunError
from fedamole.evaluation.personal import score_name
from fedamole.experiment import check_length, free_path, resolved, worker_of
from fedamole.federation.checkpoint import latest_state, state_path
from fedamole.federation.loop import BASE, MAJORITY, Watcher
from fedamole.federation.record import PayloadError, boxed, pack, unboxed
from fedamole.federation.run_folder import CONFIG, MANIFEST, METRICS, RUN, RunFolder
from fedamole.federation.summary import summarise
from fedamole.federation.worker import ClientData, Scores, Worker, client_data
from fedamole.files import write_atomic
from fedamole.model.bank import Bank
from fedamole.model.base import Identity, load_base
from fedamole.model.memory import out_of_memory, release_memory
from fedamole.reporting.card import write_cards

log = logging.getLogger(__name__)

KEPT = 3
"""Private states and answers on disk: those of the last rounds, as a server may go back by two."""

CAUSES = (
    (PayloadError, "bad_request"), (ConfigError, "config"), (RunError, "config"), (DataError, "data"),
    (BaseModelError, "base"), (OSError, "disk"), (MemoryError, "out_of_memory"),
)  # fmt: skip
"""What a server is told of an error: its kind and nothing else."""


@dataclass(frozen=True)
class ClientSettings:
    """What an organisation decides for itself."""

    source: SourceSettings
    """Its data; the source's name is the client's, unless it is a part of a source alone."""
    folder: str = "runs"
    """Where its run folders are written."""
    base: str | None = None
    """Its own copy of the base model, a folder or hub id; unset: what the server names."""
    device: str = "auto"
    threads: int = 0
    share_labels: bool = False
    """Tell the server how often each answer occurs, where answers are chosen from a limited number of options."""
    name: str = ""
    """Name of a client that is a part of a source; then `manifest` says which."""
    manifest: str | None = None
    """A stored partition of the source: the file that names this client's rows."""


@dataclass(frozen=True)
class Stored:
    """An answer on disk, and the hash of what it answers: the message, and the round that counted before."""

    digest: str
    reply: Reply


@dataclass
class Seat:
    """A client's place in one run."""

    config: Config
    worker: Worker
    data: ClientData
    labels: dict[str, int]
    hold: ExitStack = field(default_factory=ExitStack)
    """Holds the run folder for this process."""

    @property
    def folder(self) -> RunFolder:
        """The client's own run folder."""
        return self.worker.folder

    @property
    def name(self) -> str:
        """The client's name."""
        return self.data.info.name


class Host:
    """Answers the requests of a server, one after the other."""

    def __init__(self, settings: ClientSettings, watcher: Watcher) -> None:
        """Serve one client; base and data are loaded when it joins a run."""
        self.settings, self.watcher, self.name = settings, watcher, settings.name or settings.source.name
        self.seat: Seat | None = None

    def answer(self, payload: bytes) -> bytes:
        """Do what is asked and return the packed reply; whatever goes wrong is one of FAILURES, told in full here."""
        request = Request("", -1, "")
        try:
            request = read_request(payload)
            return pack(self._do(request))
        except Exception as error:
            # Nothing of an unforeseen error may travel, and none may end the worker.
            code = next((code for kind, code in CAUSES if isinstance(error, kind)), "internal")
            if isinstance(error, RuntimeError) and out_of_memory(error):
                code = "out_of_memory"
            log.error("%s, round %d: %s", request.operation or "request", request.round, error,
                      exc_info=error if code == "internal" else None)  # fmt: skip
        if code == "out_of_memory" and self.seat is not None:
            release_memory(self.seat.worker.bank.base.device)
        return pack(failure(request, self.name, code))

    def _do(self, request: Request) -> Reply:
        if request.operation == JOIN:
            return self._join(request)
        seat = self._seat(request.run)
        if seat is None:
            return failure(request, self.name, "not_joined")
        if request.round >= seat.config.federation.rounds:
            raise PayloadError(f"the run has only {seat.config.federation.rounds} rounds")
        if request.operation == UPDATE:
            return self._update(seat, request)
        self._undo(seat, request)
        self._keep(seat, request)
        if request.operation == EVALUATE:
            return self._evaluate(seat, request)
        assert request.operation == TEST
        return self._test(seat, request)

    def _join(self, request: Request) -> Reply:
        """Take a seat in a run, and tell what the server has to know."""
        settings: Table = request.settings or {}
        seat = self._seat(request.run)
        if seat is None:
            seat = self._sit_down(request.run, settings)
        elif settings.get("identity") != seat.folder.about["base"]:
            raise BaseModelError(f"{seat.folder.path}: the server now has another base than when this run began")
        self.watcher.stage("scoring the untuned base on validation")
        splits = {split: len(getattr(seat.data, split).rows) for split in ("train", "embedding", "validation", "test")}
        about = {"examples": splits, "base": seat.folder.about["base"], "device": seat.config.run.device}
        labels = {"labels": seat.labels} if seat.labels else {}
        bare = seat.worker.bare([seat.data], "validation")[seat.name]
        if all(line["round"] >= 0 for line in seat.folder.lines(METRICS)):
            self._log(seat, [{"round": -1, "split": "validation", "method": BASE, **bare}])
        return Reply(request.run, request.round, JOIN, self.name, report={**about, **labels}, scores={BASE: bare})

    def _seat(self, run: str) -> Seat | None:
        """The seat in a run: the one taken, or one on disk after a restart; None where there is neither."""
        if self.seat is not None and not self._there(self.seat.folder):
            log.warning("%s is gone, or a part of it; the run begins anew here", self.seat.folder.path)
            self._stand_up()
        if self.seat is not None and self.seat.folder.about["id"] == run:
            return self.seat
        for path in sorted(Path(self.settings.folder).glob(f"*/{RUN}")):
            try:
                folder = RunFolder.open(path.parent)
                mine = folder.about["id"] == run and folder.kind == "client" and self._there(folder)
            except (RunError, KeyError, TypeError) as error:
                log.warning("%s is left alone, it is no usable run folder: %s", path.parent, error)
                continue
            if mine:
                return self._take(load_config(folder.path / CONFIG), folder)
        return None

    def _there(self, folder: RunFolder) -> bool:
        return (folder.path / RUN).exists() and folder.client(self.name).exists()

    def _stand_up(self) -> None:
        """Give the seat up, and its folder to whoever wants it."""
        if self.seat is not None:
            self.seat.hold.close()
            self.seat = None

    def _sit_down(self, run: str, settings: Table) -> Seat:
        """Begin a run folder of one's own for a run."""
        own = {"device": self.settings.device, "threads": self.settings.threads, "group": 1}
        config = to_config(own_tables(settings, plain(self.settings.source), own, self.settings.base))
        # The run's name is the server's: it must not lead out of the client's folder.
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", config.run.name).strip(".-")[:64] or "run"
        path = free_path(Path(self.settings.folder) / f"{name}-{self.name}")
        config = replace(config, data=replace(config.data, manifest=self.settings.manifest))
        federation = load_federation(config.data, Path.cwd())
        config = resolved(config, path.resolve())
        identity = Identity(**settings["identity"])
        self._stand_up()
        bank = self._bank(config)
        identity.check(bank.base.identity, f"the base {config.base.model!r} of this client")
        folder = RunFolder.create(
            path, tomli_w.dumps(config.tables()), federation.manifest.to_json(), config.method_name, identity,
            "client", run,
        )
        folder.client(self.name).mkdir(parents=True)
        return self._take(config, folder, bank)

    def _bank(self, config: Config) -> Bank:
        self.watcher.stage(f"loading {config.base.model}")
        torch.set_num_threads(config.run.threads)
        return Bank(load_base(config.base, torch.device(config.run.device), Path.cwd()))

    def _take(self, config: Config, folder: RunFolder, bank: Bank | None = None) -> Seat:
        """Load data, and the base unless it is given, and put a worker on them; another run's seat is given up."""
        self._stand_up()
        with ExitStack() as hold:
            hold.enter_context(folder.locked())
            shard = load_federation(config.data, Path.cwd(), read_manifest(folder.path / MANIFEST)).shards[0]
            bank = bank or self._bank(config)
            check_length(config, bank.base)
            named = f"the base {config.base.model!r} of this client"
            Identity(**folder.about["base"]).check(bank.base.identity, named)
            data = client_data(shard, bank.base.tokenizer, config.training.max_length)
            labels = self._labels(config, data)
            self.seat = Seat(config, worker_of(config, bank, folder), data, labels, hold.pop_all())
        return self.seat

    def _labels(self, config: Config, data: ClientData) -> dict[str, int]:
        """How often each answer occurs, where that may be told; texts of all kinds are no labels."""
        examples = data.train.examples
        if not self.settings.share_labels or score_name(examples[0], config.evaluation) != "accuracy":
            return {}
        labels = Counter(example.answer for example in examples)
        if len(labels) > MOST_LABELS or max(map(len, labels)) > LONGEST_LABEL:
            log.warning("labels are not shared: there are more than %d, or some are very long", MOST_LABELS)
            return {}
        return dict(labels)

    def _update(self, seat: Seat, request: Request) -> Reply:
        """Train on the server's message, unless that was done already: then the answer is the one given before."""
        message = unboxed(request.message) or b""
        digest = hashlib.sha256(b"%d " % request.last + message).hexdigest()
        path = self._answer_path(seat, request.round)
        if (found := self._stored(path)) is not None and found.digest == digest:
            log.info("round %d: asked again, answered as before", request.round)
            return found.reply
        self._undo(seat, request)
        if request.last >= 0 and latest_state(seat.folder, self.name) is None:
            log.warning("round %d: what was kept from earlier rounds is gone; training begins anew", request.round)
        self._keep(seat, request)
        self.watcher.round_started(request.round, seat.config.federation.rounds, [self.name])
        self.watcher.group_started(request.round, [self.name])
        answer = seat.worker.update([seat.data], request.round, {self.name: message}, self.watcher.step)[self.name]
        self.watcher.client_done(request.round, self.name, answer.report)
        line = {"round": request.round, "split": "train", "bytes_down": len(message)}
        self._log(seat, [{**line, "bytes_up": len(answer.payload or b""), **answer.report}])
        if answer.payload is None:
            return failure(request, self.name, "diverged")
        scores = {}
        for row, kind in seat.worker.rows.items():
            if kind == "trained":
                scores[row] = seat.worker.evaluate([seat.data], request.round, row, {self.name: None})[self.name]
        self._log_validation(seat, request.round, scores)
        reply = Reply(
            request.run, request.round, UPDATE, self.name, report=answer.report, scores=scores,
            reply=boxed(answer.payload),
        )
        write_atomic(path, pack(Stored(digest, reply)))
        for done in self._done(seat):
            for old in done[:-KEPT]:
                old.unlink()
        return reply

    def _stored(self, path: Path) -> Stored | None:
        """The answer in a file, if there is one that can be read."""
        try:
            return unpacked(Stored, path.read_bytes()) if path.exists() else None
        except PayloadError as error:
            log.warning("%s is damaged (%s); that round is done again", path, error)
            return None

    def _evaluate(self, seat: Seat, request: Request) -> Reply:
        """Score a model that the server's message makes."""
        row = request.row or ""
        if seat.worker.rows.get(row) != "aggregated":
            raise PayloadError(f"there is no model {row!r} to be scored after the aggregation")
        message = unboxed(request.message)
        found = seat.worker.evaluate([seat.data], request.round, row, {self.name: message})
        self._log_validation(seat, request.round, {row: found[self.name]})
        return Reply(request.run, request.round, EVALUATE, self.name, scores={row: found[self.name]})

    def _test(self, seat: Seat, request: Request) -> Reply:
        """Read the test split, sum the run up, and write the model's card."""
        group, worker, results = [seat.data], seat.worker, dict[str, dict[str, Any]]()
        scores: dict[str, Scores] = {}
        for row in worker.rows:
            self.watcher.stage(f"scoring {row} on test")
            best, last = worker.test_best(group, row), worker.test_last(group, row)
            results[row] = {"best_round": request.best.get(row), "best": best, "last": last}
            scores |= {f"{row}/best": best[self.name], f"{row}/last": last[self.name]}
        plain = {BASE: worker.bare(group, "test"), MAJORITY: {self.name: worker.majority(seat.data)}}
        for row, found in plain.items():
            results[row] = {"best_round": None, "best": found, "last": found}
            scores[row] = found[self.name]
        summarise(seat.folder, results, seat.config.federation.rounds)
        write_cards(seat.folder)
        self.watcher.stage(f"done: {seat.folder.adapter(self.name, seat.config.method_name)}")
        return Reply(request.run, request.round, TEST, self.name, scores=scores)

    def _undo(self, seat: Seat, request: Request) -> None:
        """Forget what was done in rounds after the last one that counted."""
        for path in chain(*self._done(seat)):
            if int(path.stem.removeprefix("round-")) > request.last:
                log.info("%s is undone: that round did not count", path.name)
                path.unlink()

        def counts(line: dict[str, Any]) -> bool:
            if line["split"] == "validation" and seat.worker.rows.get(line["method"]) == "aggregated":
                return (line["round"], line["method"] == request.row) < (request.round, True)
            return bool(line["round"] <= request.last)

        seat.folder.cut(METRICS, counts)

    def _keep(self, seat: Seat, request: Request) -> None:
        """Save the present model of every row whose best round is a new one."""
        path = seat.folder.client(self.name) / "best.json"
        kept = seat.folder.read_json(str(path.relative_to(seat.folder.path))) if path.exists() else {}
        for row, round_ in request.best.items():
            if row in seat.worker.rows and kept.get(row) != round_:
                seat.worker.keep(seat.data, row)
                kept[row] = round_
                write_atomic(path, json.dumps(kept))

    def _done(self, seat: Seat) -> tuple[list[Path], list[Path]]:
        """Files of private states and of answers, each by round."""
        states, answers = state_path(seat.folder, self.name, 0).parent, self._answer_path(seat, 0).parent
        return sorted(states.glob("round-*.safetensors")), sorted(answers.glob("round-*.safetensors"))

    def _answer_path(self, seat: Seat, round_: int) -> Path:
        return seat.folder.client(self.name) / "answers" / f"round-{round_:04d}.safetensors"

    def _log(self, seat: Seat, lines: list[dict[str, Any]]) -> None:
        seat.folder.append(METRICS, ({"round": line.pop("round"), "client": self.name, **line} for line in lines))

    def _log_validation(self, seat: Seat, round_: int, scores: dict[str, Scores]) -> None:
        self._log(seat, [{"round": round_, "split": "validation", "method": row, **one} for row, one in scores.items()])
