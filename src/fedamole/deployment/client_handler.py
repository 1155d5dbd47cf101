"""The client's side of a deployment: it does what a server asks, on its own data, and each thing once.

Everything private stays in the client's own run folder. A request that comes again gets the answer it got before; what
was done in a round that did not count is undone; what a round made the best model is kept when the next request tells.
"""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w
import torch

from fedamole.config import Config, Table, load_run_config, plain, to_config
from fedamole.data.examples import Shard
from fedamole.data.manifest import load_federation, read_manifest
from fedamole.deployment.run_session import ClientSettings, RunSession, StoredReply, count_labels
from fedamole.deployment.security.audit_log import AuditLog
from fedamole.deployment.security.policy import PolicyCheck, PolicyError, asked, enforce, row_checks
from fedamole.deployment.shared_config import agreed_hash, own_tables
from fedamole.engine.messages import EVALUATE, JOIN, TEST, UPDATE, Reply, Request, failure, read_request
from fedamole.errors import BaseModelError, ConfigError, DataError, RunError
from fedamole.experiment import check_length, resolved, worker_of
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import PayloadError, bytes_as_tensor, pack, tensor_as_bytes
from fedamole.federation.summary import summarise
from fedamole.federation.worker import ClientData, Scores, client_data
from fedamole.files import new_folder, write_atomic
from fedamole.model.bank import Bank
from fedamole.model.base import load_base
from fedamole.model.memory import out_of_memory, release_memory
from fedamole.planning import exposure
from fedamole.reporting.card import write_cards
from fedamole.runs.checkpoint import latest_state
from fedamole.runs.identity import Identity
from fedamole.runs.run_files import BASE, MAJORITY, SPLITS
from fedamole.runs.run_folder import MANIFEST, METRICS, RUN, RunFolder
from fedamole.terminal import printable

log = logging.getLogger(__name__)

KEPT_ROUNDS = 3
"""Private states and answers on disk: those of the last rounds, as a server may go back by two."""

SHARED_SETTINGS = "agreement.json"
"""In the client's run folder: all that the coordinator told of the run's settings when the client joined."""
AGREED_RUNS = "agreed.json"
"""In the client's home: which run was the first with settings that were agreed on, by their hash."""
DISK_COPIES = 4
"""Times that a message, or what comes of it, lies on the client's disk: answer, state, model, and one being written."""

ERROR_CODES = (
    (PolicyError, "policy"),
    (PayloadError, "bad_request"),
    (ConfigError, "config"),
    (RunError, "config"),
    (DataError, "data"),
    (BaseModelError, "base"),
    (OSError, "disk"),
    (MemoryError, "out_of_memory"),
)
"""What a server is told of an error: its kind and nothing else."""


class ClientHandler:
    """Answers the requests of a server, one after the other."""

    def __init__(self, settings: ClientSettings, listener: ProgressListener) -> None:
        """Serve one client; base and data are loaded when it joins a run."""
        self.settings, self.listener, self.name = settings, listener, settings.name or settings.source.name
        self.session: RunSession | None = None
        self.audit = AuditLog(Path(settings.audit) if settings.audit else None)

    def answer(self, payload: bytes) -> bytes:
        """Do what is asked and return the packed reply; whatever goes wrong is one of FAILURES, told in full here.

        Both messages are in the audit log before this returns. Errors: AuditError where that cannot be written; then
        there is no answer at all.
        """
        try:
            request = read_request(payload)
        except Exception as error:  # nothing that comes may end the worker
            self.audit.received(payload, None)
            log.error("request: %s", printable(error))
            request = Request("", -1, "")
            return self._pack_and_log(failure(request, self.name, "bad_request"), request, printable(error))
        self.audit.received(payload, request)
        reply, reason = self._handle_safely(request)
        return self._pack_and_log(reply, request, reason)

    def _pack_and_log(self, reply: Reply, request: Request, reason: str) -> bytes:
        """Pack a reply once its line is in the audit log."""
        packed = pack(reply)
        self.audit.answered(packed, reply, request.row, reason)
        return packed

    def _handle_safely(self, request: Request) -> tuple[Reply, str]:
        """What a request came to, and the reason where that is a refusal by the policy."""
        reason = ""
        try:
            return self._handle(request), reason
        except Exception as error:
            # Nothing of an unforeseen error may travel, and none may end the worker.
            code = next((code for kind, code in ERROR_CODES if isinstance(error, kind)), "internal")
            if isinstance(error, RuntimeError) and out_of_memory(error):
                code = "out_of_memory"
            log.error(
                "%s, round %d: %s",
                request.operation,
                request.round,
                printable(error),
                exc_info=error if code == "internal" else None,
            )
            if isinstance(error, PolicyError):
                reason = printable(error)
        if code == "out_of_memory" and self.session is not None:
            release_memory(self.session.worker.bank.base.device)
        return failure(request, self.name, code), reason

    def _handle(self, request: Request) -> Reply:
        self._check_disk(len(tensor_as_bytes(request.message) or b""))
        if request.operation == JOIN:
            return self._join(request)
        session = self._find_session(request.run)
        if session is None:
            return failure(request, self.name, "not_joined")
        if request.round >= session.config.federation.rounds:
            raise PayloadError(f"the run has only {session.config.federation.rounds} rounds")
        if request.operation == UPDATE:
            return self._update(session, request)
        session.discard_after(request)
        session.save_best_models(request)
        if request.operation == EVALUATE:
            return self._evaluate(session, request)
        assert request.operation == TEST
        return self._test(session, request)

    def _join(self, request: Request) -> Reply:
        """Take a seat in a run, and tell what the server has to know."""
        settings: Table = request.settings or {}
        session = self._find_session(request.run)
        if session is None:
            session = self._open_session(request.run, settings)
        elif settings.get("identity") != session.folder.about["base"]:
            raise BaseModelError(f"{session.folder.path}: the server now has another base than when this run began")
        elif agreed_hash(settings) != agreed_hash(self._shared_settings(session.folder)):
            raise PolicyError(
                f"{session.folder.path}: the coordinator now tells other settings than those that this run began with"
            )
        self.listener.stage("scoring the untuned base on validation")
        about = {
            "examples": self._row_counts(session.data),
            "base": session.folder.about["base"],
            "device": session.config.run.device,
        }
        labels = {"labels": session.labels} if session.labels else {}
        bare = session.worker.score_base([session.data], "validation")[session.name]
        if all(line["round"] >= 0 for line in session.folder.lines(METRICS)):
            session.log([{"round": -1, "split": "validation", "method": BASE, **bare}])
        return Reply(request.run, request.round, JOIN, self.name, report={**about, **labels}, scores={BASE: bare})

    def _find_session(self, run: str) -> RunSession | None:
        """The seat in a run: the one taken, or one on disk after a restart; None where there is neither."""
        if self.session is not None and not self._folder_exists(self.session.folder):
            log.warning("%s is gone, or a part of it; the run begins anew here", self.session.folder.path)
            self._close_session()
        if self.session is not None and self.session.folder.about["id"] == run:
            return self.session
        for path in sorted(Path(self.settings.folder).glob(f"*/{RUN}")):
            try:
                folder = RunFolder.open(path.parent)
                mine = folder.about["id"] == run and folder.kind == "client" and self._folder_exists(folder)
            except (RunError, KeyError, TypeError) as error:
                log.warning("%s is left alone, it is no usable run folder: %s", path.parent, error)
                continue
            if mine:
                return self._resume_session(load_run_config(folder), folder)
        return None

    def _folder_exists(self, folder: RunFolder) -> bool:
        return (folder.path / RUN).exists() and folder.client(self.name).exists()

    def _close_session(self) -> None:
        """Give the seat up, and its folder to whoever wants it."""
        if self.session is not None:
            self.session.lock.close()
            self.session = None

    def _open_session(self, run: str, settings: Table) -> RunSession:
        """Begin a run folder of one's own for a run."""
        self._check_agreed_hash(settings)
        self._record_agreed_run(run)
        machine = {"device": self.settings.device, "threads": self.settings.threads, "group": 1}
        config = to_config(own_tables(settings, plain(self.settings.source), machine, self.settings.base))
        # The run's name is the server's: it must not lead out of the client's folder.
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", config.run.name).strip(".-")[:64] or "run"
        config = replace(config, data=replace(config.data, manifest=self.settings.manifest))
        checks = asked(config, self.settings.source, self.settings.policy, self.settings.base)
        self._show_items(config, settings, checks)
        enforce(checks)
        federation = load_federation(config.data, Path.cwd())
        of_rows = self._row_items(config, federation.shards[0])
        self._show_items(config, settings, of_rows)
        enforce(of_rows)
        with new_folder(Path(self.settings.folder) / f"{name}-{self.name}", numbered=True) as path:
            config = resolved(config, path.resolve())
            identity = Identity(**settings["identity"])
            self._close_session()
            bank = self._load_bank(config)
            identity.check(bank.base.identity, f"the base {config.base.model!r} of this client")
            folder = RunFolder.create(
                path,
                tomli_w.dumps(config.tables()),
                federation.manifest.to_json(),
                config.method_name,
                identity,
                "client",
                run,
            )
            write_atomic(folder.path / SHARED_SETTINGS, json.dumps(settings, indent=1, sort_keys=True) + "\n")
            folder.client(self.name).mkdir(parents=True)
            session = self._resume_session(config, folder, bank)
            for sentence in exposure(
                config, None, [{"client": self.name, **self._row_counts(session.data)}], bank.base.shapes
            ):
                self.listener.stage(printable(f"  {sentence}"))
            return session

    def _load_bank(self, config: Config) -> Bank:
        self.listener.stage(f"loading {config.base.model}")
        torch.set_num_threads(config.run.threads)
        return Bank(load_base(config.base, torch.device(config.run.device), Path.cwd()))

    def _resume_session(self, config: Config, folder: RunFolder, bank: Bank | None = None) -> RunSession:
        """Load data, and the base unless it is given, and put a worker on them; another run's seat is given up."""
        self._close_session()
        with ExitStack() as lock:
            lock.enter_context(folder.locked())
            shard = load_federation(config.data, Path.cwd(), read_manifest(folder.path / MANIFEST)).shards[0]
            bank = bank or self._load_bank(config)
            check_length(config, bank.base)
            named = f"the base {config.base.model!r} of this client"
            Identity(**folder.about["base"]).check(bank.base.identity, named)
            data = client_data(shard, bank.base.tokenizer, config.training.max_length)
            self._check_session(config, folder, data)
            labels = count_labels(config, data) if self.settings.policy.share_labels else {}
            self.session = RunSession(config, worker_of(config, bank, folder), data, labels, lock.pop_all())
        return self.session

    def _check_session(self, config: Config, folder: RunFolder, data: ClientData) -> None:
        """Refuse what the policy or --agree forbid now, whatever they allowed when the run began."""
        self._check_agreed_hash(self._shared_settings(folder))
        policy, checks = self.settings.policy, self.settings.base
        items = asked(config, self.settings.source, policy, checks) + row_checks(config, self._row_counts(data), policy)
        enforce(items)

    def _row_counts(self, data: ClientData) -> dict[str, int]:
        return {split: len(getattr(data, split).rows) for split in SPLITS}

    def _row_items(self, config: Config, shard: Shard) -> list[PolicyCheck]:
        return row_checks(config, {split: len(getattr(shard, split)) for split in SPLITS}, self.settings.policy)

    def _shared_settings(self, folder: RunFolder) -> Table:
        """What the coordinator told of a run's settings when the client joined it."""
        return folder.read_json(SHARED_SETTINGS) if (folder.path / SHARED_SETTINGS).exists() else {}

    def _check_agreed_hash(self, told: Table) -> None:
        """Refuse any run but the one that --agree names."""
        found = agreed_hash(told)
        if self.settings.agree not in ("", found):
            raise PolicyError(
                f"the run's settings have the hash {found}, and --agree {self.settings.agree} allows another run only"
            )

    def _record_agreed_run(self, run: str) -> None:
        """With --agree, take part in the first run that has the agreed settings, and in no other that has them too."""
        if not self.settings.agree or not self.settings.audit:
            return
        path = Path(self.settings.audit).with_name(AGREED_RUNS)
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if known.setdefault(self.settings.agree, run) != run:
            raise PolicyError(
                f"another run with the agreed settings was joined before ({path} has its id), and --agree allows one; "
                "agree anew on other settings, such as another seed or name"
            )
        write_atomic(path, json.dumps(known))

    def _check_disk(self, message: int) -> None:
        """Refuse work for which the client's run folders would take more than the policy allows."""
        limit = self.settings.policy.max_disk_mib
        mine = [path.parent for path in Path(self.settings.folder).glob(f"*/clients/{self.name}")]
        taken = sum(path.stat().st_size for one in mine for path in one.parent.rglob("*") if path.is_file())
        if taken + DISK_COPIES * message > limit * 2**20:
            raise PolicyError(
                f"the client's run folders in {self.settings.folder} take {taken / 2**20:.0f} MiB, and the message "
                f"{message / 2**20:.0f}; the policy allows {limit} MiB (max_disk_mib): remove old runs or raise it"
            )

    def _show_items(self, config: Config, settings: Table, items: Sequence[PolicyCheck]) -> None:
        """Show what is asked beside what the policy allows, before it is compared."""
        self.listener.stage(printable(f"run {config.run.name}, settings {agreed_hash(settings)}"))
        for item in items:
            sign = "ok     " if item.passes else "REFUSED"
            self.listener.stage(printable(f"  {sign}  {item.setting}: asked {item.asked}; allowed {item.allowed}"))

    def _update(self, session: RunSession, request: Request) -> Reply:
        """Train on the server's message, unless that was done already: then the answer is the one given before."""
        message = tensor_as_bytes(request.message) or b""
        digest = hashlib.sha256(b"%d " % request.last + message).hexdigest()
        path = session.answer_path(request.round)
        if (found := session.read_stored(path)) is not None and found.digest == digest:
            log.info("round %d: asked again, answered as before", request.round)
            return found.reply
        session.count_request(UPDATE, self.settings.policy.max_rounds)
        session.discard_after(request)
        if request.last >= 0 and latest_state(session.folder, self.name) is None:
            log.warning("round %d: what was kept from earlier rounds is gone; training begins anew", request.round)
        session.save_best_models(request)
        self.listener.round_started(request.round, session.config.federation.rounds, [self.name])
        self.listener.group_started(request.round, [self.name])
        answer = session.worker.update([session.data], request.round, {self.name: message}, self.listener.step)[
            self.name
        ]
        self.listener.client_done(request.round, self.name, answer.report)
        line = {"round": request.round, "split": "train", "bytes_down": len(message)}
        session.log([{**line, "bytes_up": len(answer.payload or b""), **answer.report}])
        if answer.payload is None:
            return failure(request, self.name, "diverged")
        scores = {}
        for row, kind in session.worker.rows.items():
            if kind == "pre_aggregation":
                scores[row] = session.worker.evaluate([session.data], request.round, row, {self.name: None})[self.name]
        session.append_validation(request.round, scores)
        reply = Reply(
            request.run,
            request.round,
            UPDATE,
            self.name,
            report=answer.report,
            scores=scores,
            reply=bytes_as_tensor(answer.payload),
        )
        write_atomic(path, pack(StoredReply(digest, reply)))
        for round_files in session.round_files():
            for old in round_files[:-KEPT_ROUNDS]:
                old.unlink()
        return reply

    def _evaluate(self, session: RunSession, request: Request) -> Reply:
        """Score a model that the server's message makes."""
        row = request.row or ""
        if session.worker.rows.get(row) != "post_aggregation":
            raise PayloadError(f"there is no model {row!r} to be scored after the aggregation")
        session.count_request(EVALUATE, self.settings.policy.max_rounds)
        message = tensor_as_bytes(request.message)
        found = session.worker.evaluate([session.data], request.round, row, {self.name: message})
        session.append_validation(request.round, {row: found[self.name]})
        return Reply(request.run, request.round, EVALUATE, self.name, scores={row: found[self.name]})

    def _test(self, session: RunSession, request: Request) -> Reply:
        """Read the test split once, sum the run up, and write the model's card; later the first answer is repeated."""
        if (found := session.read_stored(session.test_reply_path)) is not None:
            log.info("test: asked again, answered as before")
            return replace(found.reply, round=request.round)
        group, worker, results = [session.data], session.worker, dict[str, dict[str, Any]]()
        scores: dict[str, Scores] = {}
        for row in worker.rows:
            self.listener.stage(f"scoring {row} on test")
            best, last = worker.test_best(group, row), worker.test_last(group, row)
            results[row] = {"best_round": request.best.get(row), "best": best, "last": last}
            scores |= {f"{row}/best": best[self.name], f"{row}/last": last[self.name]}
        plain = {BASE: worker.score_base(group, "test"), MAJORITY: {self.name: worker.majority(session.data)}}
        for row, told in plain.items():
            results[row] = {"best_round": None, "best": told, "last": told}
            if row != MAJORITY or self.settings.policy.share_majority:
                scores[row] = told[self.name]
        summarise(session.folder, results, session.config.federation.rounds)
        write_cards(session.folder)
        self.listener.stage(f"done: {session.folder.adapter(self.name, session.config.method_name)}")
        reply = Reply(request.run, request.round, TEST, self.name, scores=scores)
        write_atomic(session.test_reply_path, pack(StoredReply("", reply)))
        return reply
