"""The round loop, the same for all methods: select clients, run a round, evaluate, log, write a checkpoint."""

import logging
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

from fedamole.errors import RunError
from fedamole.federation.best import BestRound, VariantProgress
from fedamole.federation.engine import Engine
from fedamole.federation.evaluator import Scores
from fedamole.federation.method import ClientInfo, Evaluates, Method, Server
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import Packed, PayloadError, pack, unpack
from fedamole.federation.robust import BeforeAggregation, Robust
from fedamole.federation.settings import FederationSettings
from fedamole.federation.summary import stopped_early, summarise
from fedamole.federation.worker import UpdateResult
from fedamole.runs import checkpoint
from fedamole.runs.run_files import BASE, MAJORITY
from fedamole.runs.run_folder import ASSIGNMENT, METRICS, RunFolder

log = logging.getLogger(__name__)


class Loop:
    """One run of a method over an engine, written into a run folder."""

    def __init__(
        self,
        method: Method[Any, Any, Any, Any],
        variants: Mapping[str, Evaluates],
        engine: Engine,
        server: Server,
        settings: FederationSettings,
        folder: RunFolder,
        *,
        select: Literal["loss", "score"],
        listener: ProgressListener,
        best_round: BestRound = "mean",
        robust: BeforeAggregation | None = None,
    ) -> None:
        """Set up a run; `run` starts or resumes it.

        `variants` are the scored models of the run, such as fedit and fedit_ft. `select` names the validation value
        that chooses the best round. Replies pass through `robust` before they are aggregated.
        """
        self.method, self.engine, self.settings, self.folder = method, engine, settings, folder
        self.server, self.select, self.listener = server, select, listener
        self.variants = dict(variants)
        self.best_round = best_round
        self.robust: BeforeAggregation = robust or Robust("mean", 1.0, ())
        self.progress: dict[str, VariantProgress] = {}
        self.answered: dict[str, tuple[int, int]] = {}
        """By client: round and exchange of its last update that counted."""

    def run(self) -> dict[str, Any]:
        """Run all rounds that are not done yet and the final test; return the summary."""
        done, state = self._start()
        while done < self.settings.rounds and not self._out_of_patience(done):
            state = self._round(done, state)
            done += 1
            if self.listener.should_stop():
                break
        return self._finish(done)

    def _out_of_patience(self, done: int) -> bool:
        """Whether no model had a new best round for `patience` rounds. All it needs is in the last checkpoint."""
        latest = max(validation.latest_best for validation in self.progress.values())
        return 0 < self.settings.patience <= done - 1 - latest

    def _start(self) -> tuple[int, Any]:
        """Return the next round and the server's state before it: the initial one, or that of the last checkpoint."""
        latest = checkpoint.load_latest(self.folder)
        if latest is not None:
            return self._restore(*latest)
        for name in (METRICS, ASSIGNMENT):
            self.folder.cut(name, lambda line: False)
        self.progress = {variant: VariantProgress({}) for variant in self.variants}
        self._score_new_clients(-1)
        return 0, self.method.init(self.server)

    def _restore(self, saved: checkpoint.Checkpoint, server_state: bytes) -> tuple[int, Any]:
        progress, last = saved.progress, saved.round
        self.progress = {variant: VariantProgress(**values) for variant, values in progress["rows"].items()}
        self.answered = {name: (int(r), int(k)) for name, (r, k) in progress.get("answered", {}).items()}
        self.robust.history = list(progress.get("sizes", []))
        best: dict[str, dict[str, int]] = {}
        for variant, validation in self.progress.items():
            for name, round_ in validation.best_rounds(client.name for client in self.engine.clients).items():
                best.setdefault(name, {})[variant] = round_
        self.engine.restore(best, self.answered, progress.get("examples", {}))
        self.folder.cut(METRICS, lambda line: line["round"] <= last and line["split"] != "test")
        self.folder.cut(ASSIGNMENT, lambda line: line["round"] <= last)
        return last + 1, unpack(self.method.records.state, server_state)

    def _score_new_clients(self, round_: int) -> Collection[str]:
        """Score the untuned base at clients that join for the first time; return the names of the available clients.

        Counts the untuned base as a new client's model in earlier rounds.
        """
        available = self.engine.wait_for_clients()
        self.server = replace(self.server, clients=self.engine.clients)
        known = next(iter(self.progress.values())).latest
        new = [name for name in available if name not in known]
        if not new:
            return available
        self.listener.stage("scoring the untuned base on validation")
        base_scores = dict(self.engine.score_base("validation", new))
        self._log(
            [self._line(round_, name, "validation", method=BASE, **scores) for name, scores in base_scores.items()]
        )
        for validation in self.progress.values():
            validation.add_clients(base_scores, {name: self._choice(scores) for name, scores in base_scores.items()})
        return available

    def _round(self, round_: int, state: Any) -> Any:
        available = self._score_new_clients(round_)
        server = replace(self.server, round=round_)
        cohort = self._cohort(server, state, available)
        started = time.perf_counter()
        self.listener.round_started(round_, self.settings.rounds, [client.name for client in cohort])
        self.folder.append(ASSIGNMENT, ({"round": round_, **line} for line in self.method.assignment_log(state)))
        exchanges = Exchanges(self, round_, [client.name for client in cohort])
        state = self.method.round(server, state, cohort, exchanges)
        updated = time.perf_counter()
        for variant in self.variants:
            self._evaluate(round_, variant, state, exchanges.answered)
        evaluated = time.perf_counter()
        seconds = {"seconds_update": updated - started, "seconds_evaluate": evaluated - updated}
        self._log(
            [
                *([] if server.work is None else [self._line(round_, None, "server", **server.work.report())]),
                self._line(round_, None, "round", cohort=[client.name for client in cohort], **seconds),
            ]
        )
        self.answered |= {name: (round_, exchange) for name, exchange in exchanges.answered.items()}
        progress = {
            "rows": {variant: asdict(validation) for variant, validation in self.progress.items()},
            "answered": self.answered,
            "sizes": self.robust.history,
            "examples": {client.name: client.examples for client in self.server.clients},
        }
        # Committing comes last, so a resumed run never writes the lines of a committed round again.
        checkpoint.save(self.folder, round_, pack(state), [client.name for client in self.server.clients], progress)
        self.listener.round_done(round_, {variant: self._mean(variant) for variant in self.variants})
        return state

    def _cohort(self, server: Server, state: Any, available: Collection[str]) -> list[ClientInfo]:
        """Let the method select the clients of a round; RunError if its selection is not allowed."""
        clients = [client for client in server.clients if client.name in available]
        count = min(len(clients), max(1, round(self.settings.cohort * len(server.clients))))
        names = list(self.method.select(server, state, clients, count))
        method, unknown = type(self.method).__name__, sorted(set(names) - {client.name for client in clients})
        if unknown:
            raise RunError(f"{method}.select: not available in round {server.round}: {', '.join(unknown)}")
        if len(set(names)) < len(names):
            raise RunError(f"{method}.select: round {server.round}: a client is selected twice: {', '.join(names)}")
        if not 1 <= len(names) <= count:
            raise RunError(f"{method}.select: {len(names)} clients in round {server.round}, not 1 to {count}")
        return [client for client in clients if client.name in names]

    def update(self, round_: int, exchange: int, messages: Mapping[str, Any]) -> dict[str, Any]:
        """Send a message to each client; return the replies, clipped if the run does that, and log every update."""
        packed = Packed(messages)
        results = dict(self.engine.update(round_, packed, exchange))
        replies, lines = dict[str, Any](), dict[str, dict[str, Any]]()
        index = {"exchange": exchange} if exchange else {}
        for name in sorted(packed):
            result = results.pop(name, UpdateResult(None, {"failed": "no answer in time"}))
            size = len(result.payload or b"")
            if result.payload is not None:
                try:
                    replies[name] = unpack(self.method.records.reply, result.payload)
                except PayloadError as error:
                    log.warning("client %s, round %d: %s; left out of this round", name, round_, error)
                    result.report["failed"] = str(error)
            traffic = {"bytes_down": packed.sizes[name], "bytes_up": size}
            lines[name] = self._line(round_, name, "train", **index, **result.report, **traffic)
        if messages and not replies:
            log.warning("round %d: no client answered; the server's state stays as it was", round_)
        replies, clipped = self.robust(round_, packed.records, replies, exchange)
        for name, factors in clipped.items():
            lines[name]["clipped"] = factors
        self._log([*lines.values()])
        return replies

    def _evaluate(self, round_: int, variant: str, state: Any, answered: Collection[str]) -> None:
        """Score the models that this round changed, and save those for which it is the best round so far."""
        validation = self.progress[variant]
        self.listener.stage(f"scoring {variant} on validation")
        messages: Mapping[str, bytes | None] = dict.fromkeys(sorted(answered))
        sizes = dict.fromkeys(messages, 0)
        if self.variants[variant] == "post_aggregation":
            messages = Packed({client.name: self.method.message(state, client) for client in self.server.clients})
            sizes = messages.sizes
        scores = self.engine.evaluate(round_, variant, messages)
        validation.latest.update(scores)
        self._log(
            [
                self._line(round_, name, "validation", method=variant, bytes_down=sizes[name], **values)
                for name, values in sorted(scores.items())
            ]
        )
        if self.best_round == "client":
            names = validation.update_clients(round_, {name: self._choice(values) for name, values in scores.items()})
        else:
            better = validation.update_mean(round_, self._choice({self.select: self._mean(variant)}))
            names = [client.name for client in self.server.clients] if better else []
        if names:
            self.engine.save_best(variant, round_, names)

    def _choice(self, scores: Scores) -> float:
        """Return the value that chooses the best round; lower is better, NaN counts as infinity."""
        value = float(-scores["score"] if self.select == "score" else scores["loss"])
        return math.inf if math.isnan(value) else value

    def _mean(self, variant: str) -> float:
        """Return the mean over all clients of the validation value that chooses the best round."""
        latest = self.progress[variant].latest
        return sum(latest[name][self.select] for name in sorted(latest)) / len(latest)

    def _finish(self, done: int) -> dict[str, Any]:
        """Score on test, once for the best round and once for the last of `done`, and write the summary."""
        last, names = done - 1, [client.name for client in self.server.clients]
        stopped = self.settings.stopped(done)
        if stopped is not None:
            self.listener.stopped(stopped_early({"rounds": done, "stopped": stopped}))
        results: dict[str, dict[str, Any]] = {}
        for variant, validation in self.progress.items():
            self.listener.stage(f"scoring {variant} on test")
            best = dict(self.engine.test(variant, best=True))
            rounds = validation.best_rounds(names)
            same = all(rounds.get(name) == last for name in names)
            final = best if same else dict(self.engine.test(variant, best=False))
            chosen: Any = rounds if self.best_round == "client" else validation.best_round
            results[variant] = {"best_round": chosen, "best": best, "last": final}
            self._log_test(variant, rounds, best, "best")
            self._log_test(variant, dict.fromkeys(final, last), final, "last")
        available = self.engine.wait_for_clients()
        for row, scores in ((BASE, self.engine.score_base("test", available)), (MAJORITY, self.engine.majority())):
            self.listener.stage(f"scoring {row} on test")
            results[row] = {"best_round": None, "best": dict(scores), "last": dict(scores)}
            self._log_test(row, {}, scores, "best")
        return summarise(self.folder, results, done, stopped)

    def _log_test(self, row: str, rounds: Mapping[str, int], scores: Mapping[str, Scores], which: str) -> None:
        self._log(
            [
                self._line(rounds.get(name, -1), name, "test", method=row, which=which, **values)
                for name, values in sorted(scores.items())
            ]
        )

    def _line(self, round_: int, client: str | None, split: str, **fields: Any) -> dict[str, Any]:
        name = {} if client is None else {"client": client}
        return {"round": round_, **name, "split": split, **fields}

    def _log(self, lines: list[dict[str, Any]]) -> None:
        self.folder.append(METRICS, lines)


class Exchanges:
    """The `exchange` of one round: called with messages by client, it returns the replies by client."""

    def __init__(self, loop: Loop, round_: int, cohort: Collection[str]) -> None:
        """Exchange messages with the clients of a cohort."""
        self.loop, self.round, self.cohort, self.count = loop, round_, frozenset(cohort), 0
        self.answered: dict[str, int] = {}
        """By client: index of the last exchange that it answered."""

    def __call__(self, messages: Mapping[str, Any]) -> Mapping[str, Any]:
        """Run the next exchange of the round; clients that fail or do not answer in time are missing."""
        method, name = self.loop.method, type(self.loop.method).__name__
        if self.count >= method.exchanges():
            raise RunError(f"{name}.round: more than the {method.exchanges()} exchanges that {name}.exchanges declares")
        if unknown := sorted(set(messages) - self.cohort):
            raise RunError(f"{name}.round: messages to clients outside the cohort: {', '.join(unknown)}")
        exchange, self.count = self.count, self.count + 1
        replies = self.loop.update(self.round, exchange, messages)
        self.answered |= dict.fromkeys(replies, exchange)
        return replies
