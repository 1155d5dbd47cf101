"""The engine of a deployment: clients run on other machines, may be offline, and are not trusted.

The engine sends requests over a `Link` (Flower's, or one in a test), waits for answers until the deadline, and checks
every answer before it is used. Requests are idempotent: a client that gets a request again repeats its answer.
"""

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from fedamole.engine import link as timing
from fedamole.engine.link import Link
from fedamole.engine.membership import Membership
from fedamole.engine.messages import (
    EVALUATE,
    FAILURES,
    RETRIABLE,
    TEST,
    UPDATE,
    Reply,
    Request,
    failure,
    unpacked,
)
from fedamole.engine.replies import ReplyReader
from fedamole.engine.reply_template import check_reply, dry_run
from fedamole.errors import RunError
from fedamole.federation.engine import Answered
from fedamole.federation.evaluator import Scores
from fedamole.federation.method import ClientInfo, Evaluates, Method, Server
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import PayloadError, bytes_as_tensor, pack, tensor_as_bytes, unpack
from fedamole.federation.settings import DeploymentSettings
from fedamole.federation.worker import UpdateResult
from fedamole.runs.run_files import BASE, MAJORITY

log = logging.getLogger(__name__)

ABSENT = "it is absent"
RETRY_AT_ONCE = RETRIABLE - {"no_answer"}
"""Failures that may pass and are known before the deadline."""


class Remote:
    """Runs the clients of a roster, as far as they are online."""

    deployed = True

    def __init__(
        self,
        link: Link,
        method: Method[Any, Any, Any, Any],
        variants: Mapping[str, Evaluates],
        server: Server,
        run: str,
        tables: Mapping[str, Any],
        settings: DeploymentSettings,
        listener: ProgressListener,
    ) -> None:
        """Reach clients over `link`; `run` is the run's id, `tables` the part of the config that all clients get."""
        self.link, self.method, self.variants, self.server, self.run = link, method, variants, server, run
        self.settings, self.listener = settings, listener
        self.reader = ReplyReader(variants, tables["config"]["evaluation"]["select"])
        self.membership = Membership(link, self.reader, run, tables, settings, listener)
        self.best: dict[str, dict[str, int]] = {}
        self.answered: dict[str, tuple[int, int]] = {}
        self._scores_after_training: dict[str, dict[str, Scores]] = {}
        self._test_scores: dict[str, dict[str, Scores]] = {}

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        """The roster, sorted by name; a client that has never joined has 0 examples."""
        return self.membership.clients

    def wait_for_clients(self) -> Collection[str]:
        """Wait for `min_clients`, or for a while for all before the first round; return those that are online."""
        return self.membership.wait()

    def update(self, round_: int, messages: Mapping[str, bytes], exchange: int = 0) -> Mapping[str, UpdateResult]:
        """Train clients, each on its own message.

        While fewer than `min_clients` have succeeded, those whose failure may pass are asked again. Raises RunError if
        none of them can be asked, or if none comes back within `deployment.max_wait` seconds.
        """
        self.membership.gathering = False
        self.server = replace(self.server, round=round_, clients=self.clients)
        self.listener.group_started(round_, sorted(messages))
        results, failed = dict[str, UpdateResult](), dict.fromkeys(messages, "lost")
        succeeded, needed, end = -1, min(self.settings.min_clients, len(messages)), 0.0
        while True:
            online = self.membership.online()
            waiting = {name: messages[name] for name in failed if name in online}
            for name, reply, template in self._update_replies(round_, exchange, waiting):
                results[name], code = self._checked_result(round_, exchange, name, reply, template)
                failed.pop(name)
                if code in RETRIABLE:
                    failed[name] = code
            before, succeeded = succeeded, sum(result.payload is not None for result in results.values())
            if succeeded >= needed:
                return results
            if not failed:
                raise RunError(
                    f"round {round_}: {succeeded} clients could train, and deployment.min_clients = "
                    f"{self.settings.min_clients}; mend the others or lower it, then `fedamole server --resume FOLDER`"
                )
            if succeeded > before:  # max_wait counts from the last success
                end = time.monotonic() + self.settings.max_wait
            self._wait_for_one_of(set(failed), f"round {round_}: {succeeded} of {needed} answers", end)

    def _wait_for_one_of(self, names: Collection[str], situation: str, end: float) -> None:
        """Wait until one of these clients is online, at least RETRY_SECONDS; RunError at the time `end`."""
        log.warning("%s; waiting for one of: %s", situation, ", ".join(sorted(names)))
        time.sleep(timing.RETRY_SECONDS)
        while time.monotonic() > end or not set(self.membership.online()) & set(names):
            if time.monotonic() > end:
                raise RunError(
                    f"{situation}, and no other came in {self.settings.max_wait:.0f} s (deployment.max_wait). Nothing "
                    "is lost: `fedamole server --resume FOLDER` goes on from the last finished round"
                )
            time.sleep(timing.POLL_SECONDS)

    def _update_replies(
        self, round_: int, exchange: int, messages: Mapping[str, bytes]
    ) -> list[tuple[str, Reply, Any]]:
        """Send messages; return (client, reply, template of the reply) for each."""
        requests, templates = dict[str, Request](), dict[str, Any]()
        for name in sorted(messages):
            payload = messages[name]
            requests[name] = replace(self._request(name, round_, UPDATE, payload=payload), exchange=exchange)
            message = unpack(self.method.records.message, payload)
            templates[name] = dry_run(self.method, self.server, self.membership.members[name].info, message)
        limits = {name: len(pack(template)) + timing.OVERHEAD_BYTES for name, template in templates.items()}
        replies = self._send_and_wait(requests, limits)
        return [(name, reply, templates[name]) for name, reply in replies.items()]

    def _request(
        self, name: str, round_: int, operation: str, variant: str | None = None, payload: bytes | None = None
    ) -> Request:
        last, last_exchange = self.answered.get(name, (-1, 0))
        best, message = self.best.get(name, {}), bytes_as_tensor(payload)
        return Request(self.run, round_, operation, variant, best, last, last_exchange, message=message)

    def _checked_result(
        self, round_: int, exchange: int, name: str, reply: Reply, template: Any
    ) -> tuple[UpdateResult, str | None]:
        """Check a client's reply to an update; return the result, and the code of its failure."""
        report, payload, failed = {"seconds": 0.0, **reply.report}, None, reply.failed
        if failed is not None:
            log.warning("client %s, round %d, update: %s", name, round_, FAILURES[failed])
        else:
            try:
                payload = tensor_as_bytes(reply.reply) or b""
                check_reply(self.method, template, unpacked(self.method.records.reply, payload), self.settings.max_norm)
            except PayloadError as error:
                log.warning("client %s, round %d, update: refused: %s", name, round_, error)
                payload, failed = None, "bad_reply"
        if failed is None:
            self.answered[name] = round_, exchange
            for variant, scores in reply.scores.items():
                self._scores_after_training.setdefault(variant, {})[name] = scores
        else:
            report["failed"] = FAILURES[failed]
        self.listener.client_done(round_, name, report)
        return UpdateResult(payload, report), failed

    def evaluate(self, round_: int, variant: str, messages: Mapping[str, bytes | None]) -> dict[str, Scores]:
        """Score current models on validation; scores of a pre-aggregation variant came with the update."""
        if self.variants[variant] == "pre_aggregation":
            scores = self._scores_after_training.pop(variant, {})
            return {name: scores[name] for name in sorted(messages) if name in scores}
        online = set(self.membership.online())
        requests = {
            name: self._request(name, round_, EVALUATE, variant, messages[name])
            for name in sorted(messages)
            if name in online
        }
        replies = self._send_and_wait(requests, dict.fromkeys(requests, timing.OVERHEAD_BYTES))
        for name, reply in replies.items():
            if reply.failed is not None:
                log.warning("client %s, round %d, evaluate: %s; its score stays", name, round_, FAILURES[reply.failed])
        return {name: reply.scores[variant] for name, reply in replies.items() if reply.failed is None}

    def save_best(self, variant: str, round_: int, names: Collection[str]) -> None:
        """Let clients save their current model as their best so far; they learn it with the next request."""
        self.best |= {name: {**self.best.get(name, {}), variant: round_} for name in names}

    def restore(self, best: Mapping[str, Mapping[str, int]], answered: Answered, examples: Mapping[str, int]) -> None:
        """Restore engine state on resume."""
        self.best, self.answered = {name: dict(rounds) for name, rounds in best.items()}, dict(answered)
        self.membership.restore(examples)

    def score_base(self, split: str, names: Collection[str]) -> dict[str, Scores]:
        """Return the scores of the untuned base, which clients send when they join and with the test scores."""
        if split == "test":
            return self._test(BASE)
        return {name: self.membership.members[name].base_scores for name in sorted(names)}

    def majority(self) -> dict[str, Scores]:
        """Score the most frequent training answer on test; {} unless the policy of every client allows that."""
        return self._test(MAJORITY)

    def test(self, variant: str, best: bool) -> dict[str, Scores]:
        """Score the models of the best round, or of the last round, on the clients' test splits."""
        return self._test(f"{variant}/{'best' if best else 'last'}")

    def _test(self, model: str) -> dict[str, Scores]:
        """Return the test scores of one model; the first call requests those of all models."""
        if not self._test_scores:
            self._request_test_scores()
        majority = self._test_scores.get(MAJORITY, {})
        if model == MAJORITY and self._test_scores and majority.keys() != self._test_scores[BASE].keys():
            return {}
        if model not in self._test_scores:
            raise RunError(f"no client could be tested ({model}); `fedamole server --resume FOLDER` tries again")
        return dict(sorted(self._test_scores[model].items()))

    def _request_test_scores(self) -> None:
        online: Collection[str] = self.wait_for_clients()
        missing = dict.fromkeys(sorted(self.settings.clients), ABSENT)
        last_round = max((round_ for round_, _ in self.answered.values()), default=0)
        for _ in range(timing.TEST_ATTEMPTS):
            names = [name for name, code in missing.items() if name in online and code in (ABSENT, *RETRY_AT_ONCE)]
            requests = {name: self._request(name, last_round, TEST) for name in names}
            replies = self._send_and_wait(requests, dict.fromkeys(requests, timing.OVERHEAD_BYTES))
            for name, reply in replies.items():
                missing[name] = reply.failed or ""
                for model, scores in reply.scores.items():
                    self._test_scores.setdefault(model, {})[name] = scores
            if not RETRY_AT_ONCE & set(missing.values()):
                break
            time.sleep(timing.RETRY_SECONDS)
            online = self.membership.online()
        for name, code in missing.items():
            if code:
                log.warning("client %s, test: %s; its scores are missing", name, FAILURES.get(code, code))

    def _send_and_wait(self, requests: Mapping[str, Request], limits: Mapping[str, int]) -> dict[str, Reply]:
        """Send requests and wait for all replies or the deadline; a client that does not answer gets a failure.

        `limits` is the maximum size of each answer in bytes.
        """
        tickets, replies = dict[str, str](), dict[str, Reply]()
        started, deadline, late = time.monotonic(), self.settings.deadline, False

        def send(names: Collection[str], seconds: float) -> None:
            for name in names:
                node = self.membership.members[name].node
                tickets[self.link.send(node, pack(requests[name]), requests[name].round, seconds)] = name

        send(requests, deadline)
        resent = False
        while len(replies) < len(requests) and not late:
            passed = time.monotonic() - started
            late = passed >= deadline  # received once more below, even if the last call took long
            for ticket, content in self.link.receive(list(tickets)).items():
                name = tickets.pop(ticket)
                if name not in replies:
                    replies[name] = self.reader.read(requests[name], name, content, limits[name])
            missing = sorted(set(requests) - set(replies))
            tickets = {ticket: name for ticket, name in tickets.items() if name in missing}
            if not resent and not late and passed >= timing.RESEND_AFTER * deadline:
                resent = True
                send(missing, deadline - passed)
            time.sleep(timing.POLL_SECONDS if missing and not late else 0)
        for name in set(requests) - set(replies):
            replies[name] = failure(requests[name], name, "no_answer")
        for name, reply in replies.items():
            if reply.failed == "not_joined":
                self.membership.remove(name)
        return dict(sorted(replies.items()))
