"""The client's side of a deployment: it does what a server asks, on its own data, and each thing once.

Everything private stays in the client's own run folder. A request that comes again gets the answer it got before; what
was done in a round that did not count is undone; what a round made the best model is kept when the next request tells.
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
from fedamole.deployment.run_session import ClientSettings, Seat, Stored, counted_labels
from fedamole.deployment.security.audit_log import AuditLog
from fedamole.deployment.security.policy import (
    Item,
    PolicyError,
    asked,
    asked_of_rows,
    refuse_breaches,
    refuse_small_update,
)
from fedamole.deployment.shared_config import agreed_hash, own_tables
from fedamole.engine.messages import EVALUATE, JOIN, TEST, UPDATE, Reply, Request, failure, read_request
from fedamole.errors import BaseModelError, ConfigError, DataError, RunError
from fedamole.experiment import check_length, resolved, worker_of
from fedamole.federation.client_data import ClientData, client_data
from fedamole.federation.evaluator import Scores
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

KEPT = 3
"""Private states and answers on disk: those of the last rounds, as a server may go back by two."""

AGREEMENT = "agreement.json"
"""In the client's run folder: all that the coordinator told of the run's settings when the client joined."""
AGREED = "agreed.json"
"""In the client's home: which run was the first with settings that were agreed on, by their hash."""
COPIES = 4
"""Times that a message, or what comes of it, lies on the client's disk: answer, state, model, and one being written."""

CAUSES = (
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


class Host:
    """Answers the requests of a server, one after the other."""

    def __init__(self, settings: ClientSettings, listener: ProgressListener) -> None:
        """Serve one client; base and data are loaded when it joins a run."""
        self.settings, self.listener, self.name = settings, listener, settings.name or settings.source.name
        self.seat: Seat | None = None
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
            return self._logged(failure(request, self.name, "bad_request"), request, printable(error))
        self.audit.received(payload, request)
        reply, reason = self._done(request)
        return self._logged(reply, request, reason)

    def _logged(self, reply: Reply, request: Request, reason: str) -> bytes:
        """Pack a reply once its line is in the audit log."""
        packed = pack(reply)
        self.audit.answered(packed, reply, request.variant, reason)
        return packed

    def _done(self, request: Request) -> tuple[Reply, str]:
        """What a request came to, and the reason where that is a refusal by the policy."""
        reason = ""
        try:
            return self._do(request), reason
        except Exception as error:
            # Nothing of an unforeseen error may travel, and none may end the worker.
            code = next((code for kind, code in CAUSES if isinstance(error, kind)), "internal")
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
        if code == "out_of_memory" and self.seat is not None:
            release_memory(self.seat.worker.bank.base.device)
        return failure(request, self.name, code), reason

    def _do(self, request: Request) -> Reply:
        self._check_disk(len(tensor_as_bytes(request.message) or b""))
        if request.operation == JOIN:
            return self._join(request)
        seat = self._seat(request.run)
        if seat is None:
            return failure(request, self.name, "not_joined")
        if request.round >= seat.config.federation.rounds:
            raise PayloadError(f"the run has only {seat.config.federation.rounds} rounds")
        if request.operation == UPDATE:
            return self._update(seat, request)
        seat.undo(request)
        seat.keep(request)
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
        elif agreed_hash(settings) != agreed_hash(self._told(seat.folder)):
            raise PolicyError(
                f"{seat.folder.path}: the coordinator now tells other settings than those that this run began with"
            )
        self.listener.stage("scoring the untuned base on validation")
        about = {"examples": self._rows(seat.data), "base": seat.folder.about["base"], "device": seat.config.run.device}
        labels = {"labels": seat.labels} if seat.labels else {}
        bare = seat.worker.evaluator.score_base([seat.data], "validation")[seat.name]
        if all(line["round"] >= 0 for line in seat.folder.lines(METRICS)):
            seat.log([{"round": -1, "split": "validation", "method": BASE, **bare}])
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
                config, own = load_run_config(folder), self.settings.base
                return self._take(config if own is None else config.on_base(named_base(own)), folder)
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
        self._check_agreed(settings)
        self._bind(run)
        machine = {"device": self.settings.device, "threads": self.settings.threads, "group": 1}
        config = to_config(own_tables(settings, plain(self.settings.source), machine, self.settings.base))
        # The run's name is the server's: it must not lead out of the client's folder.
        name = as_name(config.run.name)
        config = replace(config, data=replace(config.data, manifest=self.settings.manifest))
        own = asked(config, self.settings.source, self.settings.policy, self.settings.base)
        self._show(config, settings, own)
        refuse_breaches(own)
        federation = load_federation(config.data, Path.cwd())
        of_rows = self._asked_of_rows(config, federation.shards[0])
        self._show(config, settings, of_rows)
        refuse_breaches(of_rows)
        with new_folder(Path(self.settings.folder) / f"{name}-{self.name}", numbered=True) as path:
            config = resolved(config, path.resolve())
            identity = Identity(**settings["identity"])
            self._stand_up()
            bank = self._bank(config)
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
            write_atomic(folder.path / AGREEMENT, json.dumps(settings, indent=1, sort_keys=True) + "\n")
            folder.client(self.name).mkdir(parents=True)
            seat = self._take(config, folder, bank)
            for sentence in exposure(config, None, [{"client": self.name, **self._rows(seat.data)}], bank.base.shapes):
                self.listener.stage(printable(f"  {sentence}"))
            return seat

    def _bank(self, config: Config) -> Bank:
        self.listener.stage(f"loading {config.base.model}")
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
            folder.move_base(config.base.model)
            data = client_data(shard, bank.base.tokenizer, config.training.max_length)
            self._check_seat(config, folder, data)
            labels = counted_labels(config, data) if self.settings.policy.share_labels else {}
            self.seat = Seat(config, worker_of(config, bank, folder), data, labels, hold.pop_all())
        return self.seat

    def _check_seat(self, config: Config, folder: RunFolder, data: ClientData) -> None:
        """Refuse what the policy or --agree forbid now, whatever they allowed when the run began."""
        self._check_agreed(self._told(folder))
        policy, own = self.settings.policy, self.settings.base
        items = asked(config, self.settings.source, policy, own) + asked_of_rows(config, self._rows(data), policy)
        refuse_breaches(items)

    def _rows(self, data: ClientData) -> dict[str, int]:
        return {split: len(getattr(data, split).rows) for split in SPLITS}

    def _asked_of_rows(self, config: Config, shard: Shard) -> list[Item]:
        return asked_of_rows(config, {split: len(getattr(shard, split)) for split in SPLITS}, self.settings.policy)

    def _told(self, folder: RunFolder) -> Table:
        """What the coordinator told of a run's settings when the client joined it."""
        return folder.read_json(AGREEMENT) if (folder.path / AGREEMENT).exists() else {}

    def _check_agreed(self, told: Table) -> None:
        """Refuse any run but the one that --agree names."""
        found = agreed_hash(told)
        if self.settings.agree not in ("", found):
            raise PolicyError(
                f"the run's settings have the hash {found}, and --agree {self.settings.agree} allows another run only"
            )

    def _bind(self, run: str) -> None:
        """With --agree, take part in the first run that has the agreed settings, and in no other that has them too."""
        if not self.settings.agree or not self.settings.audit:
            return
        path = Path(self.settings.audit).with_name(AGREED)
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
        if taken + COPIES * message > limit * 2**20:
            raise PolicyError(
                f"the client's run folders in {self.settings.folder} take {taken / 2**20:.0f} MiB, and the message "
                f"{message / 2**20:.0f}; the policy allows {limit} MiB (max_disk_mib): remove old runs or raise it"
            )

    def _show(self, config: Config, settings: Table, items: Sequence[Item]) -> None:
        """Show what is asked beside what the policy allows, before it is compared."""
        self.listener.stage(printable(f"run {config.run.name}, settings {agreed_hash(settings)}"))
        for item in items:
            sign = "ok     " if item.fits else "REFUSED"
            self.listener.stage(printable(f"  {sign}  {item.setting}: asked {item.asked}; allowed {item.allowed}"))

    def _update(self, seat: Seat, request: Request) -> Reply:
        """Train on the server's message, unless that was done already: then the answer is the one given before."""
        message = tensor_as_bytes(request.message) or b""
        if request.exchange >= seat.config.method.exchanges():
            raise PayloadError(f"a round of this method has at most {seat.config.method.exchanges()} exchanges")
        digest = hashlib.sha256(b"%d %d " % (request.last, request.last_exchange) + message).hexdigest()
        path = seat.answer_path(request.round, request.exchange)
        if (found := seat.stored(path)) is not None and found.digest == digest:
            log.info("round %d: asked again, answered as before", request.round)
            return found.reply
        seat.count(UPDATE, self.settings.policy.max_rounds)
        seat.undo(request)
        if request.last >= 0 and latest_state(seat.folder, self.name) is None:
            log.warning("round %d: what was kept from earlier rounds is gone; training begins anew", request.round)
        seat.keep(request)
        self.listener.round_started(request.round, seat.config.federation.rounds, [self.name])
        self.listener.group_started(request.round, [self.name])
        messages = {self.name: message}
        result = seat.worker.update([seat.data], request.round, messages, request.exchange, self.listener.step)
        answer = result[self.name]
        self.listener.client_done(request.round, self.name, answer.report)
        exchange = {"exchange": request.exchange} if request.exchange else {}
        line = {"round": request.round, "split": "train", **exchange, "bytes_down": len(message)}
        seat.log([{**line, "bytes_up": len(answer.payload or b""), **answer.report}])
        if answer.payload is None:
            return failure(request, self.name, "diverged")
        refuse_small_update(seat.config, answer.report["steps"], len(seat.data.train.rows), self.settings.policy)
        scores = {}
        evaluator = seat.worker.evaluator
        for variant, moment in evaluator.variants.items():
            if moment == "pre_aggregation":
                scores[variant] = evaluator.evaluate([seat.data], request.round, variant, {self.name: None})[self.name]
        seat.log_validation(request.round, scores, request.exchange)
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
        write_atomic(path, pack(Stored(digest, reply)))
        seat.prune(KEPT)
        return reply

    def _evaluate(self, seat: Seat, request: Request) -> Reply:
        """Score a model that the server's message makes."""
        variant, evaluator = request.variant or "", seat.worker.evaluator
        if evaluator.variants.get(variant) != "post_aggregation":
            raise PayloadError(f"there is no model {variant!r} to be scored after the aggregation")
        seat.count(EVALUATE, self.settings.policy.max_rounds)
        message = tensor_as_bytes(request.message)
        scores = evaluator.evaluate([seat.data], request.round, variant, {self.name: message})[self.name]
        seat.log_validation(request.round, {variant: scores})
        return Reply(request.run, request.round, EVALUATE, self.name, scores={variant: scores})

    def _test(self, seat: Seat, request: Request) -> Reply:
        """Read the test split once, sum the run up, and write the model's card; later the first answer is repeated."""
        if (found := seat.stored(seat.tested)) is not None:
            log.info("test: asked again, answered as before")
            return replace(found.reply, round=request.round)
        group, evaluator, results = [seat.data], seat.worker.evaluator, dict[str, dict[str, Any]]()
        scores: dict[str, Scores] = {}
        for variant in evaluator.variants:
            self.listener.stage(f"scoring {variant} on test")
            best, last = evaluator.test_best(group, variant), evaluator.test_last(group, variant)
            results[variant] = {"best_round": request.best.get(variant), "best": best, "last": last}
            scores |= {f"{variant}/best": best[self.name], f"{variant}/last": last[self.name]}
        plain = {BASE: evaluator.score_base(group, "test"), MAJORITY: {self.name: evaluator.majority(seat.data)}}
        for row, told in plain.items():
            results[row] = {"best_round": None, "best": told, "last": told}
            if row != MAJORITY or self.settings.policy.share_majority:
                scores[row] = told[self.name]
        summarise(seat.folder, results, seat.config.federation.rounds)
        write_cards(seat.folder)
        self.listener.stage(f"done: {seat.folder.adapter(self.name, seat.config.method_name)}")
        reply = Reply(request.run, request.round, TEST, self.name, scores=scores)
        write_atomic(seat.tested, pack(Stored("", reply)))
        return reply
