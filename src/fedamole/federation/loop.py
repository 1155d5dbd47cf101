"""The round loop: cohort, round, evaluate, log, checkpoint. It belongs to nobody: all methods run in this one."""

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

from fedamole.federation.best import BestRound, Row
from fedamole.federation.engine import Engine
from fedamole.federation.method import ClientInfo, Evaluates, Method, Server
from fedamole.federation.progress import ProgressListener
from fedamole.federation.randomness import numpy_generator
from fedamole.federation.record import Packed, PayloadError, pack, unpack
from fedamole.federation.robust import Robust
from fedamole.federation.settings import FederationSettings
from fedamole.federation.summary import summarise
from fedamole.federation.worker import Scores, UpdateResult
from fedamole.runs import checkpoint
from fedamole.runs.run_files import BASE, MAJORITY
from fedamole.runs.run_folder import ASSIGNMENT, METRICS, RunFolder

log = logging.getLogger(__name__)

MetricsSink = Callable[[list[dict[str, Any]]], None]


class Loop:
    """One run of a method over an engine, into a folder."""

    def __init__(
        self,
        method: Method[Any, Any, Any, Any],
        rows: Mapping[str, Evaluates],
        engine: Engine,
        server: Server,
        settings: FederationSettings,
        folder: RunFolder,
        *,
        select: Literal["loss", "score"],
        listener: ProgressListener,
        best_round: BestRound = "mean",
        robust: Robust | None = None,
        metrics_sink: MetricsSink | None = None,
    ) -> None:
        """Assemble a run; `run` starts or continues it.

        `robust` is what replies go through before they are aggregated. Every line of
        metrics.jsonl also goes to `metrics_sink`.
        """
        self.method, self.engine, self.settings, self.folder = method, engine, settings, folder
        self.server, self.select, self.listener, self.metrics_sink = server, select, listener, metrics_sink
        self.kinds = dict(rows)
        self.best_round, self.robust = best_round, robust or Robust("mean", 1.0, ())
        self.rows: dict[str, Row] = {}
        self.answered: dict[str, int] = {}

    def run(self) -> dict[str, Any]:
        """Run all rounds that are not done yet and the final test; return the summary."""
        first, state = self._start()
        for round_ in range(first, self.settings.rounds):
            state = self._round(round_, state)
        return self._finish()

    def _start(self) -> tuple[int, Any]:
        found = checkpoint.load_latest(self.folder)
        if found is not None:
            saved, packed = found
            self.rows = {row: Row(**progress) for row, progress in saved.progress["rows"].items()}
            self.answered = dict(saved.progress.get("answered", {}))
            self.robust.history = list(saved.progress.get("sizes", []))
            best: dict[str, dict[str, int]] = {}
            for row, one in self.rows.items():
                for name, round_ in one.best_rounds(client.name for client in self.engine.clients).items():
                    best.setdefault(name, {})[row] = round_
            self.engine.restore(best, self.answered, saved.progress.get("examples", {}))
            last = saved.round
            self.folder.cut(METRICS, lambda line: line["round"] <= last and line["split"] != "test")
            self.folder.cut(ASSIGNMENT, lambda line: line["round"] <= last)
            return last + 1, unpack(self.method.records.state, packed)
        for name in (METRICS, ASSIGNMENT):
            self.folder.cut(name, lambda line: False)
        self.rows = {row: Row({}) for row in self.kinds}
        self._welcome(-1)
        return 0, self.method.init(self.server)

    def _welcome(self, round_: int) -> Collection[str]:
        """Score the bare base at the clients that come for the first time; return the names of all that are present.

        What a row has reached so far counts the bare base for a newcomer, as that was its model then.
        """
        present = self.engine.wait_for_clients()
        self.server = replace(self.server, clients=self.engine.clients)
        known = next(iter(self.rows.values())).latest
        newcomers = [name for name in present if name not in known]
        if not newcomers:
            return present
        self.listener.stage("scoring the untuned base on validation")
        bare = dict(self.engine.score_base("validation", newcomers))
        self._log([self._line(round_, name, "validation", method=BASE, **scores) for name, scores in bare.items()])
        for row in self.rows.values():
            row.welcome(bare, {name: self._low(scores) for name, scores in bare.items()})
        return present

    def _round(self, round_: int, state: Any) -> Any:
        cohort = self._cohort(round_, self._welcome(round_))
        started = time.perf_counter()
        server = replace(self.server, round=round_)
        self.listener.round_started(round_, self.settings.rounds, [client.name for client in cohort])
        self.folder.append(ASSIGNMENT, ({"round": round_, **line} for line in self.method.assignment_log(state)))
        answered: set[str] = set()

        def ask(operation: str, messages: Mapping[str, Any]) -> Mapping[str, Any]:
            if operation != "update":
                raise ValueError(f"operation {operation!r} is not one of: update")
            packed = Packed(messages)
            replies = self._replies(round_, packed, dict(self.engine.update(round_, packed)))
            answered.update(replies)
            return replies

        state = self.method.round(server, state, cohort, ask)
        updated = time.perf_counter()
        for row in self.kinds:
            self._evaluate(round_, row, state, answered)
        evaluated = time.perf_counter()
        seconds = {"seconds_update": updated - started, "seconds_evaluate": evaluated - updated}
        self._log([self._line(round_, None, "round", cohort=[client.name for client in cohort], **seconds)])
        self.answered.update(dict.fromkeys(answered, round_))
        progress = {
            "rows": {row: asdict(progress) for row, progress in self.rows.items()},
            "answered": self.answered,
            "sizes": self.robust.history,
            "examples": {client.name: client.examples for client in self.server.clients},
        }
        # The commit comes last: a resumed run never writes the lines of a committed round again.
        checkpoint.save(self.folder, round_, pack(state), [client.name for client in self.server.clients], progress)
        self.listener.round_done(round_, {row: self._value(row) for row in self.kinds})
        return state

    def _cohort(self, round_: int, present: Collection[str]) -> list[ClientInfo]:
        """Draw the cohort of a round from the clients that are there."""
        there = [client for client in self.server.clients if client.name in present]
        count = min(len(there), max(1, round(self.settings.cohort * len(self.server.clients))))
        rng = numpy_generator(self.server.seed, "cohort", "server", round_)
        chosen = set(rng.choice(len(there), count, replace=False).tolist())
        return [client for place, client in enumerate(there) if place in chosen]

    def _replies(self, round_: int, sent: Packed, answers: dict[str, UpdateResult]) -> dict[str, Any]:
        """Unpack whoever answered, letting go of the payloads, and log what everybody did and what was clipped."""
        replies, lines = dict[str, Any](), dict[str, dict[str, Any]]()
        for name in sorted(sent):
            answer = answers.pop(name, UpdateResult(None, {"failed": "no answer in time"}))
            size = len(answer.payload or b"")
            if answer.payload is not None:
                try:
                    replies[name] = unpack(self.method.records.reply, answer.payload)
                except PayloadError as error:
                    log.warning("client %s, round %d: %s; left out of this round", name, round_, error)
                    answer.report["failed"] = str(error)
            traffic = {"bytes_down": sent.sizes[name], "bytes_up": size}
            lines[name] = self._line(round_, name, "train", **answer.report, **traffic)
        if not replies:
            log.warning("round %d: no client answered; the server's state stays as it was", round_)
        replies, clipped = self.robust(round_, sent.records, replies)
        for name, factors in clipped.items():
            lines[name]["clipped"] = factors
        self._log([*lines.values()])
        return replies

    def _evaluate(self, round_: int, row: str, state: Any, answered: set[str]) -> None:
        """Score the models that this round changed, and keep those whose best round so far it is."""
        progress, kind = self.rows[row], self.kinds[row]
        self.listener.stage(f"scoring {row} on validation")
        messages: Mapping[str, bytes | None] = dict.fromkeys(sorted(answered))
        sizes = dict.fromkeys(messages, 0)
        if kind == "post_aggregation":
            messages = Packed({client.name: self.method.message(state, client) for client in self.server.clients})
            sizes = messages.sizes
        scores = self.engine.evaluate(round_, row, messages)
        progress.latest.update(scores)
        self._log(
            [
                self._line(round_, name, "validation", method=row, bytes_down=sizes[name], **values)
                for name, values in sorted(scores.items())
            ]
        )
        if self.best_round == "client":
            names = progress.best_of_clients(round_, {name: self._low(found) for name, found in scores.items()})
        else:
            better = progress.best_of_all(round_, self._low({self.select: self._value(row)}))
            names = [client.name for client in self.server.clients] if better else []
        if names:
            self.engine.save_best(row, round_, names)

    def _low(self, scores: Scores) -> float:
        """What chooses the best round, as a number of which the lowest is the best."""
        value = float(-scores["score"] if self.select == "score" else scores["loss"])
        return math.inf if math.isnan(value) else value  # beaten by any number, as NaN is not

    def _value(self, row: str) -> float:
        """Mean over all clients of what chooses the best round."""
        latest = self.rows[row].latest
        return sum(latest[name][self.select] for name in sorted(latest)) / len(latest)

    def _finish(self) -> dict[str, Any]:
        """Read the test split: once for the best round, once for the last."""
        last, names = self.settings.rounds - 1, [client.name for client in self.server.clients]
        results: dict[str, dict[str, Any]] = {}
        for row, progress in self.rows.items():
            self.listener.stage(f"scoring {row} on test")
            best = dict(self.engine.test(row, best=True))
            rounds = progress.best_rounds(names)
            same = all(rounds.get(name) == last for name in names)
            final = best if same else dict(self.engine.test(row, best=False))
            chosen: Any = rounds if self.best_round == "client" else progress.best_round
            results[row] = {"best_round": chosen, "best": best, "last": final}
            self._log_test(row, rounds, best, "best")
            self._log_test(row, dict.fromkeys(final, last), final, "last")
        present = self.engine.wait_for_clients()
        for row, scores in ((BASE, self.engine.score_base("test", present)), (MAJORITY, self.engine.majority())):
            self.listener.stage(f"scoring {row} on test")
            results[row] = {"best_round": None, "best": dict(scores), "last": dict(scores)}
            self._log_test(row, {}, scores, "best")
        return summarise(self.folder, results, self.settings.rounds)

    def _log_test(self, row: str, rounds: Mapping[str, int], scores: Mapping[str, Scores], which: str) -> None:
        self._log(
            [
                self._line(rounds.get(name, -1), name, "test", method=row, which=which, **values)
                for name, values in sorted(scores.items())
            ]
        )

    def _line(self, round_: int, client: str | None, split: str, **fields: Any) -> dict[str, Any]:
        who = {} if client is None else {"client": client}
        return {"round": round_, **who, "split": split, **fields}

    def _log(self, lines: list[dict[str, Any]]) -> None:
        self.folder.append(METRICS, lines)
        if self.metrics_sink is not None:
            self.metrics_sink(lines)
