"""The client side of a deployed run: carries out the server's requests on the client's own data, each exactly once.

Private state stays in the client's own run folder. A repeated request gets the stored reply. Work of rounds that did
not count is discarded. When a request reports a new best round, the current model is saved as the best.
"""

import hashlib
import json
import logging
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
from fedamole.deployment.run_session import ClientSettings, RunSession, StoredReply, check_disk, count_labels
from fedamole.deployment.security.audit_log import AuditLog
from fedamole.deployment.security.policy import (
    PolicyCheck,
    PolicyError,
    enforce,
    refuse_small_update,
    row_checks,
    settings_checks,
)
from fedamole.deployment.shared_config import agreed_hash, own_tables
from fedamole.engine.messages import EVALUATE, JOIN, TEST, UPDATE, Reply, Request, failure, read_request
from fedamole.errors import BaseModelError, ConfigError, DataError, RunError
from fedamole.experiment import check_length, resolved, worker_of
from fedamole.federation.client_data import ClientData, client_data
from fedamole.federation.evaluator import Scores
from fedamole.federation.objective import check_objective
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import PayloadError, bytes_as_tensor, pack, tensor_as_bytes
from fedamole.federation.summary import summarise
from fedamole.files import new_folder, write_atomic
from fedamole.model.bank import Bank
from fedamole.model.base import load_base, named_base
from fedamole.model.memory import out_of_memory, release_memory
from fedamole.planning import exposure
from fedamole.received.names import as_name
from fedamole.reporting.card import write_cards
from fedamole.runs.checkpoint import latest_state
from fedamole.runs.identity import Identity
from fedamole.runs.run_files import BASE, MAJORITY, SPLITS
from fedamole.runs.run_folder import MANIFEST, METRICS, RUN, RunFolder
from fedamole.terminal import printable

log = logging.getLogger(__name__)

KEPT_ROUNDS = 3
"""Rounds whose private state and reply are kept on disk, as a server may go back by two rounds."""

SHARED_SETTINGS = "agreement.json"
"""File in the client's run folder: the settings that the coordinator sent when the client joined."""
AGREED_RUNS = "agreed.json"
"""File in the client's home: the id of the first run for each hash of agreed settings."""

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
"""The code that the server gets for an exception; nothing else about it is sent."""


class ClientHandler:
    """Handles the requests of a server, one at a time."""

    def __init__(self, settings: ClientSettings, listener: ProgressListener) -> None:
        """Set up one client; base and data are loaded when it joins a run."""
        self.settings, self.listener, self.name = settings, listener, settings.name or settings.source.name
        self.session: RunSession | None = None
        self.audit = AuditLog(Path(settings.audit) if settings.audit else None)

    def answer(self, payload: bytes) -> bytes:
        """Carry out a packed request and return the packed reply; errors are logged here and sent as one of FAILURES.

        Request and reply are written to the audit log before this returns. AuditError if that fails; then there is no
        reply.
        """
        try:
            request = read_request(payload)
        except Exception as error:  # no message may end the worker
            self.audit.received(payload, None)
            log.error("request: %s", printable(error))
            request = Request("", -1, "")
            return self._pack_and_log(failure(request, self.name, "bad_request"), request, printable(error))
        self.audit.received(payload, request)
        reply, reason = self._handle_safely(request)
        return self._pack_and_log(reply, request, reason)

    def _pack_and_log(self, reply: Reply, request: Request, reason: str) -> bytes:
        """Pack a reply after writing it to the audit log."""
        packed = pack(reply)
        self.audit.answered(packed, reply, request.variant, reason)
        return packed

    def _handle_safely(self, request: Request) -> tuple[Reply, str]:
        """Return the reply, and the reason if it is a refusal by the policy."""
        reason = ""
        try:
            return self._handle(request), reason
        except Exception as error:
            # Exceptions may neither reach the server in detail nor end the worker.
            code = next((code for error_class, code in ERROR_CODES if isinstance(error, error_class)), "internal")
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
        check_disk(self.settings, self.name, len(tensor_as_bytes(request.message) or b""))
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
        """Start or resume the session of a run, and report what the server needs to know."""
        settings: Table = request.settings or {}
        session = self._find_session(request.run)
        if session is None:
            session = self._open_session(request.run, settings)
        elif settings.get("identity") != session.folder.about["base"]:
            raise BaseModelError(f"{session.folder.path}: the server's base differs from the one this run began with")
        elif agreed_hash(settings) != agreed_hash(self._shared_settings(session.folder)):
            raise PolicyError(
                f"{session.folder.path}: the coordinator's settings differ from those this run began with"
            )
        self.listener.stage("scoring the untuned base on validation")
        report = {
            "examples": self._row_counts(session.data),
            "base": session.folder.about["base"],
            "device": session.config.run.device,
        }
        labels = {"labels": session.labels} if session.labels else {}
        base_scores = session.worker.evaluator.score_base([session.data], "validation")[session.name]
        if all(line["round"] >= 0 for line in session.folder.lines(METRICS)):
            session.log([{"round": -1, "split": "validation", "method": BASE, **base_scores}])
        return Reply(
            request.run, request.round, JOIN, self.name, report={**report, **labels}, scores={BASE: base_scores}
        )

    def _find_session(self, run: str) -> RunSession | None:
        """Return the session of a run, resumed from disk after a restart; None if there is none."""
        if self.session is not None and not self._folder_exists(self.session.folder):
            log.warning("%s is missing or incomplete; the run starts over on this client", self.session.folder.path)
            self._close_session()
        if self.session is not None and self.session.folder.about["id"] == run:
            return self.session
        for path in sorted(Path(self.settings.folder).glob(f"*/{RUN}")):
            try:
                folder = RunFolder.open(path.parent)
                matches = folder.about["id"] == run and folder.kind == "client" and self._folder_exists(folder)
            except (RunError, KeyError, TypeError) as error:
                log.warning("%s is ignored, as it is not a usable run folder: %s", path.parent, error)
                continue
            if matches:
                config, base = load_run_config(folder), self.settings.base
                return self._resume_session(config if base is None else config.on_base(named_base(base)), folder)
        return None

    def _folder_exists(self, folder: RunFolder) -> bool:
        return (folder.path / RUN).exists() and folder.client(self.name).exists()

    def _close_session(self) -> None:
        """Close the session and unlock its run folder."""
        if self.session is not None:
            self.session.lock.close()
            self.session = None

    def _open_session(self, run: str, settings: Table) -> RunSession:
        """Check the settings of a new run against the policy, and create its run folder."""
        self._check_agreed_hash(settings)
        self._record_agreed_run(run)
        machine = {"device": self.settings.device, "threads": self.settings.threads, "group": 1}
        config = to_config(own_tables(settings, plain(self.settings.source), machine, self.settings.base))
        # The server chose the run's name: it must not point outside the client's folder.
        name = as_name(config.run.name)
        config = replace(config, data=replace(config.data, manifest=self.settings.manifest))
        checks = settings_checks(config, self.settings.source, self.settings.policy, self.settings.base)
        self._show_checks(config, settings, checks)
        enforce(checks)
        federation = load_federation(config.data, Path.cwd())
        check_objective(config.training, federation.shards)
        checks_of_rows = self._shard_row_checks(config, federation.shards[0])
        self._show_checks(config, settings, checks_of_rows)
        enforce(checks_of_rows)
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
        """Load the data, and the base unless given, into a new session; an open session of another run is closed."""
        self._close_session()
        with ExitStack() as lock:
            lock.enter_context(folder.locked())
            shard = load_federation(config.data, Path.cwd(), read_manifest(folder.path / MANIFEST)).shards[0]
            bank = bank or self._load_bank(config)
            check_length(config, bank.base)
            Identity(**folder.about["base"]).check(bank.base.identity, f"the base {config.base.model!r} of this client")
            folder.move_base(config.base.model)
            data = client_data(shard, bank.base.tokenizer, config.training.max_length)
            self._check_session(config, folder, data)
            labels = count_labels(config, data) if self.settings.policy.share_labels else {}
            self.session = RunSession(config, worker_of(config, bank, folder), data, labels, lock.pop_all())
        return self.session

    def _check_session(self, config: Config, folder: RunFolder, data: ClientData) -> None:
        """Enforce the current policy and --agree, which may have changed since the run began."""
        self._check_agreed_hash(self._shared_settings(folder))
        policy, base = self.settings.policy, self.settings.base
        checks = settings_checks(config, self.settings.source, policy, base)
        enforce(checks + row_checks(config, self._row_counts(data), policy))

    def _row_counts(self, data: ClientData) -> dict[str, int]:
        return {split: len(getattr(data, split).rows) for split in SPLITS}

    def _shard_row_checks(self, config: Config, shard: Shard) -> list[PolicyCheck]:
        return row_checks(config, {split: len(getattr(shard, split)) for split in SPLITS}, self.settings.policy)

    def _shared_settings(self, folder: RunFolder) -> Table:
        """Return the settings that the coordinator sent when the client joined the run."""
        return folder.read_json(SHARED_SETTINGS) if (folder.path / SHARED_SETTINGS).exists() else {}

    def _check_agreed_hash(self, settings: Table) -> None:
        """Refuse every run except the one given by --agree."""
        settings_hash = agreed_hash(settings)
        if self.settings.agree not in ("", settings_hash):
            raise PolicyError(
                f"the run's settings have the hash {settings_hash}, but --agree allows only {self.settings.agree}"
            )

    def _record_agreed_run(self, run: str) -> None:
        """With --agree, accept only the first run with the agreed settings, not later ones with the same settings."""
        if not self.settings.agree or not self.settings.audit:
            return
        path = Path(self.settings.audit).with_name(AGREED_RUNS)
        runs_by_hash = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if runs_by_hash.setdefault(self.settings.agree, run) != run:
            raise PolicyError(
                f"this client has already joined a run with the agreed settings ({path} has its id), and --agree "
                "allows one; agree on new settings, such as another seed or name"
            )
        write_atomic(path, json.dumps(runs_by_hash))

    def _show_checks(self, config: Config, settings: Table, checks: Sequence[PolicyCheck]) -> None:
        """Print what is requested and what the policy allows, before the policy is enforced."""
        self.listener.stage(printable(f"run {config.run.name}, settings {agreed_hash(settings)}"))
        for check in checks:
            mark = "ok     " if check.passes else "REFUSED"
            self.listener.stage(
                printable(f"  {mark}  {check.setting}: requested {check.requested}; allowed {check.allowed}")
            )

    def _update(self, session: RunSession, request: Request) -> Reply:
        """Train on the server's message, or return the stored reply if that was done before."""
        message = tensor_as_bytes(request.message) or b""
        if request.exchange >= session.config.method.exchanges():
            raise PayloadError(f"a round of this method has at most {session.config.method.exchanges()} exchanges")
        digest = hashlib.sha256(b"%d %d " % (request.last, request.last_exchange) + message).hexdigest()
        path = session.answer_path(request.round, request.exchange)
        if (stored := session.read_stored(path)) is not None and stored.digest == digest:
            log.info("round %d: repeated request, sending the stored reply", request.round)
            return stored.reply
        session.count_request(UPDATE, self.settings.policy.max_rounds)
        session.discard_after(request)
        if request.last >= 0 and latest_state(session.folder, self.name) is None:
            log.warning("round %d: the state of earlier rounds is missing; training starts over", request.round)
        session.save_best_models(request)
        self.listener.round_started(request.round, session.config.federation.rounds, [self.name])
        self.listener.group_started(request.round, [self.name])
        messages = {self.name: message}
        results = session.worker.update([session.data], request.round, messages, request.exchange, self.listener.step)
        answer = results[self.name]
        self.listener.client_done(request.round, self.name, answer.report)
        exchange = {"exchange": request.exchange} if request.exchange else {}
        line = {"round": request.round, "split": "train", **exchange, "bytes_down": len(message)}
        session.log([{**line, "bytes_up": len(answer.payload or b""), **answer.report}])
        if answer.payload is None:
            return failure(request, self.name, "diverged")
        refuse_small_update(session.config, answer.report["steps"], len(session.data.train.rows), self.settings.policy)
        scores = {}
        evaluator = session.worker.evaluator
        for variant, moment in evaluator.variants.items():
            if moment == "pre_aggregation":
                scores[variant] = evaluator.evaluate([session.data], request.round, variant, {self.name: None})[
                    self.name
                ]
        session.append_validation(request.round, scores, request.exchange)
        reply = Reply(
            request.run,
            request.round,
            UPDATE,
            self.name,
            report=answer.report,
            scores=scores,
            reply=bytes_as_tensor(answer.payload),
            exchange=request.exchange,
        )
        write_atomic(path, pack(StoredReply(digest, reply)))
        session.prune(KEPT_ROUNDS)
        return reply

    def _evaluate(self, session: RunSession, request: Request) -> Reply:
        """Score the model that results from the server's message."""
        variant, evaluator = request.variant or "", session.worker.evaluator
        if evaluator.variants.get(variant) != "post_aggregation":
            raise PayloadError(f"there is no model {variant!r} to score after aggregation")
        session.count_request(EVALUATE, self.settings.policy.max_rounds)
        message = tensor_as_bytes(request.message)
        scores = evaluator.evaluate([session.data], request.round, variant, {self.name: message})[self.name]
        session.append_validation(request.round, {variant: scores})
        return Reply(request.run, request.round, EVALUATE, self.name, scores={variant: scores})

    def _test(self, session: RunSession, request: Request) -> Reply:
        """Score the test split once, write the summary and the model's card; later requests get the stored reply."""
        if (stored := session.read_stored(session.test_reply_path)) is not None:
            log.info("test: repeated request, sending the stored reply")
            return replace(stored.reply, round=request.round)
        group, evaluator, results = [session.data], session.worker.evaluator, dict[str, dict[str, Any]]()
        scores: dict[str, Scores] = {}
        for variant in evaluator.variants:
            self.listener.stage(f"scoring {variant} on test")
            best, last = evaluator.test_best(group, variant), evaluator.test_last(group, variant)
            results[variant] = {"best_round": request.best.get(variant), "best": best, "last": last}
            scores |= {f"{variant}/best": best[self.name], f"{variant}/last": last[self.name]}
        baselines = {BASE: evaluator.score_base(group, "test"), MAJORITY: {self.name: evaluator.majority(session.data)}}
        for name, test_scores in baselines.items():
            results[name] = {"best_round": None, "best": test_scores, "last": test_scores}
            if name != MAJORITY or self.settings.policy.share_majority:
                scores[name] = test_scores[self.name]
        federation = session.config.federation
        # The server asks with its last round, which is an earlier one only if it has run out of patience.
        done = request.round + 1 if federation.patience else federation.rounds
        summarise(session.folder, results, done, federation.stopped(done))
        write_cards(session.folder)
        self.listener.stage(f"done: {session.folder.adapter(self.name, session.config.method_name)}")
        reply = Reply(request.run, request.round, TEST, self.name, scores=scores)
        write_atomic(session.test_reply_path, pack(StoredReply("", reply)))
        return reply
