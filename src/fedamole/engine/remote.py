"""The engine of a deployment: clients are elsewhere, come and go, and nothing they send is trusted.

It asks over a `Link` (Flower's, or one in a test), waits no longer than the deadline, checks every answer before it is
used, and asks again when too few answered: requests are idempotent, a client that has done one repeats its answer.
"""

import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fedamole.engine.messages import (
    EVALUATE,
    FAILURES,
    JOIN,
    TEST,
    UPDATE,
    Reply,
    Request,
    failure,
    read_reply,
    unpacked,
)
from fedamole.engine.reply_template import check_reply, dry_run
from fedamole.errors import RunError
from fedamole.federation.method import ClientInfo, Evaluates, Method, Server
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import PayloadError, bytes_as_tensor, pack, tensor_as_bytes, unpack
from fedamole.federation.settings import DeploymentSettings
from fedamole.federation.worker import Scores, UpdateResult
from fedamole.runs.run_files import BASE, MAJORITY

log = logging.getLogger(__name__)

PAUSE = 0.1
"""Seconds between two looks for answers."""
SLACK = 1 << 20
"""Bytes that an answer may have beyond the method's reply."""
SOON, LATER = 3.0, 60.0
"""Seconds until somebody is asked again: who may be ready by then, and who was refused."""
REPEAT = 0.1
"""Share of the deadline after which a request is sent once more, as it may have been lost on its way: whoever has done
it, or is at it, answers once."""
JOINS = 4
"""Most requests to join that one node has not answered yet, so that a slow client is not flooded with them."""
TRIES = 3
"""How often a client is asked for its test scores."""
TRY_AGAIN = frozenset({"worker", "lost", "no_answer", "not_joined"})
"""Failures that may be gone when a client is asked again."""
BACK_SOON = TRY_AGAIN - {"no_answer"}
"""Those of them that are known at once, not after the deadline."""
ABSENT = "it is absent"


class Link(Protocol):
    """A way to nodes that are elsewhere."""

    def nodes(self) -> Mapping[int, str]:
        """Nodes that are online, with the name each is registered by; empty where none is known."""

    def send(self, node: int, payload: bytes, round_: int, seconds: float) -> str:
        """Send bytes to a node that has so many seconds to answer; return a ticket for the answer."""

    def receive(self, tickets: Collection[str]) -> Mapping[str, bytes | str]:
        """What has come of these tickets: bytes, or one of FAILURES; each ticket once."""


@dataclass(frozen=True)
class Member:
    """A client that has joined."""

    node: int
    info: ClientInfo
    bare: Scores
    """Scores of the untuned base on its validation split."""


@dataclass(frozen=True)
class Joining:
    """A request to join that is not answered yet."""

    node: int
    again: float
    """Time after which the node may be sent another, as this one may be lost."""
    end: float
    """Time after which no answer can come any more."""


class Remote:
    """Serves the clients of a roster, as far as they are there."""

    deployed = True

    def __init__(
        self,
        link: Link,
        method: Method[Any, Any, Any, Any],
        rows: Mapping[str, Evaluates],
        server: Server,
        run: str,
        tables: Mapping[str, Any],
        settings: DeploymentSettings,
        listener: ProgressListener,
    ) -> None:
        """Put an engine on a link. `tables` is what every client is told of the config, `run` the run's id."""
        self.link, self.method, self.rows, self.server, self.run = link, method, rows, server, run
        self.tables, self.settings, self.listener = dict(tables), settings, listener
        self.select: str = tables["config"]["evaluation"]["select"]
        self.members: dict[str, Member] = {}
        self.best: dict[str, dict[str, int]] = {}
        self.answered: dict[str, int] = {}
        self._infos: dict[str, ClientInfo] = {}
        self._joining: dict[str, Joining] = {}
        self._refused: dict[int, float] = {}
        self._trained: dict[str, dict[str, Scores]] = {}
        self._tested: dict[str, dict[str, Scores]] = {}
        self._started, self._begun = time.monotonic(), False

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        """The roster, in the order of its names; whoever has not come yet has no examples."""
        return tuple(self._infos.get(name, ClientInfo(name, 0)) for name in sorted(self.settings.clients))

    def wait_for_clients(self) -> Collection[str]:
        """Clients that have joined and are online; waits for `min_clients`, and at first a while for all."""
        started, told = time.monotonic(), -1
        while True:
            names = self._online()
            gathering = time.monotonic() - self._started < self.settings.gathering and not self._begun
            needed = len(self.settings.clients) if gathering else self.settings.min_clients
            if len(names) >= needed:
                self.listener.present(names, 0)
                return names
            if len(names) != told:
                told = len(names)
                self.listener.present(names, needed - told)
            if time.monotonic() - started > max(self.settings.patience, self.settings.gathering):
                raise RunError(
                    f"waited {self.settings.patience:.0f} s (deployment.patience) for "
                    f"{needed - len(names)} more clients; here are: {', '.join(names) or 'none'}. "
                    "Nothing is lost: `fedamole server --resume FOLDER` goes on from the last finished round"
                )
            time.sleep(PAUSE)

    def _online(self) -> list[str]:
        """Let nodes that are new join, and return the names of those that have."""
        nodes, now = dict(self.link.nodes()), time.monotonic()
        request, seconds = Request(self.run, -1, JOIN, settings=self.tables), self.settings.deadline
        again = now + min(seconds, max(LATER, REPEAT * seconds))
        for node in sorted(set(nodes) - self._not_to_be_asked(nodes, now)):
            self._joining[self.link.send(node, pack(request), -1, seconds)] = Joining(node, again, now + seconds)
        for ticket, content in self.link.receive(list(self._joining)).items():
            if ticket not in self._joining:
                continue  # the node has joined by another answer of this look
            node = self._joining.pop(ticket).node
            self._refused[node] = now + self._admit(node, nodes, request, content)
            if any(member.node == node for member in self.members.values()):
                self._joining = {other: one for other, one in self._joining.items() if one.node != node}
        return sorted(name for name, member in self.members.items() if member.node in nodes)

    def _not_to_be_asked(self, nodes: Collection[int], now: float) -> set[int]:
        """Forget requests to join that cannot be answered any more; return the nodes that are sent no other now.

        A request stays open until its own deadline, also when another has been sent: the answer to either counts. So a
        client that takes longer than the pause between two requests joins all the same.
        """
        self._joining = {ticket: one for ticket, one in self._joining.items() if one.node in nodes and one.end > now}
        open_, busy = Counter(one.node for one in self._joining.values()), set[int]()
        for one in self._joining.values():
            if one.again > now or open_[one.node] >= JOINS:
                busy.add(one.node)
        refused = {node for node, until in self._refused.items() if until > now}
        return busy | refused | {member.node for member in self.members.values()}

    def _admit(self, node: int, nodes: Mapping[int, str], request: Request, content: bytes | str) -> float:
        """Take a node in as a client, or say why not; return the seconds after which to ask it again."""
        who = nodes[node] or f"node {node}"
        reply = self._read(request, nodes[node] or None, content, SLACK)
        if reply.failed is not None:
            log.warning("%s did not join: %s", who, FAILURES[reply.failed])
            return SOON if reply.failed in TRY_AGAIN else LATER
        name = reply.client
        if name not in self.settings.clients:
            why = "its name is not one of deployment.clients"
        elif name in self.members and self.members[name].node in nodes:
            why = f"there is another {name}, which is online"
        elif reply.report.get("base") != self.tables["identity"]:
            why = "it has another base model"
        else:
            self._infos[name] = self._counted(name, reply.report["examples"]["train"])
            self.members[name] = Member(node, self._infos[name], reply.scores[BASE])
            self.listener.joined(name, reply.report)
            return 0.0
        log.warning("%s is refused: %s", who, why)
        return LATER

    def _counted(self, name: str, examples: int) -> ClientInfo:
        """A client with the number of examples that it told first in this run, which is its weight throughout."""
        known = self._infos.get(name)
        if known is None or known.examples == 0:
            return ClientInfo(name, examples)
        if known.examples != examples:
            log.warning(
                "%s now says that it has %d training examples; the %d of its first join count in this run",
                name,
                examples,
                known.examples,
            )
        return known

    def update(self, round_: int, messages: Mapping[str, bytes]) -> Mapping[str, UpdateResult]:
        """Train a cohort, each on its own message; ask again those who may yet answer while there are too few."""
        self._begun = True
        self.server = replace(self.server, round=round_, clients=self.clients)
        self.listener.group_started(round_, sorted(messages))
        answers, failed = dict[str, UpdateResult](), dict.fromkeys(messages, "lost")
        good, needed, end = -1, min(self.settings.min_clients, len(messages)), 0.0
        while True:
            there = self._online()
            for name, reply, wanted in self._asked(round_, {name: messages[name] for name in failed if name in there}):
                answers[name], code = self._answer(round_, name, reply, wanted)
                failed.pop(name)
                if code in TRY_AGAIN:
                    failed[name] = code
            before, good = good, sum(answer.payload is not None for answer in answers.values())
            if good >= needed:
                return answers
            if not failed:
                raise RunError(
                    f"round {round_}: {good} clients could train, and deployment.min_clients = "
                    f"{self.settings.min_clients}; mend the others or lower it, then `fedamole server --resume FOLDER`"
                )
            if good > before:  # patience is for a time in which nothing moves
                end = time.monotonic() + self.settings.patience
            self._wait_for(set(failed), f"round {round_}: {good} of {needed} answers", end)

    def _wait_for(self, names: Collection[str], why: str, end: float) -> None:
        """Wait until one of these clients is online; those that are have just failed and are given a moment."""
        log.warning("%s; waiting for one of: %s", why, ", ".join(sorted(names)))
        time.sleep(SOON)
        while time.monotonic() > end or not set(self._online()) & set(names):
            if time.monotonic() > end:
                raise RunError(
                    f"{why}, and no other came in {self.settings.patience:.0f} s (deployment.patience). Nothing is "
                    "lost: `fedamole server --resume FOLDER` goes on from the last finished round"
                )
            time.sleep(PAUSE)

    def _asked(self, round_: int, messages: Mapping[str, bytes]) -> list[tuple[str, Reply, Any]]:
        """Send messages; return each client's reply beside the one that was rehearsed."""
        requests, wanted = dict[str, Request](), dict[str, Any]()
        for name in sorted(messages):
            payload = messages[name]
            requests[name] = self._request(name, round_, UPDATE, payload=payload)
            message = unpack(self.method.records.message, payload)
            wanted[name] = dry_run(self.method, self.server, self.members[name].info, message)
        replies = self._exchange(requests, {name: len(pack(reply)) + SLACK for name, reply in wanted.items()})
        return [(name, reply, wanted[name]) for name, reply in replies.items()]

    def _request(
        self, name: str, round_: int, operation: str, row: str | None = None, payload: bytes | None = None
    ) -> Request:
        last = self.answered.get(name, -1)
        return Request(
            self.run, round_, operation, row, self.best.get(name, {}), last, message=bytes_as_tensor(payload)
        )

    def _answer(self, round_: int, name: str, reply: Reply, wanted: Any) -> tuple[UpdateResult, str | None]:
        """Check what a client's training came to; return it, and the code of its failure."""
        report, payload, failed = {"seconds": 0.0, **reply.report}, None, reply.failed
        if failed is not None:
            log.warning("client %s, round %d, update: %s", name, round_, FAILURES[failed])
        else:
            try:
                payload = tensor_as_bytes(reply.reply) or b""
                check_reply(self.method, wanted, unpacked(self.method.records.reply, payload), self.settings.max_norm)
            except PayloadError as error:
                log.warning("client %s, round %d, update: refused: %s", name, round_, error)
                payload, failed = None, "bad_reply"
        if failed is None:
            self.answered[name] = round_
            for row, scores in reply.scores.items():
                self._trained.setdefault(row, {})[name] = scores
        else:
            report["failed"] = FAILURES[failed]
        self.listener.client_done(round_, name, report)
        return UpdateResult(payload, report), failed

    def evaluate(self, round_: int, row: str, messages: Mapping[str, bytes | None]) -> dict[str, Scores]:
        """Scores of some clients' present models on validation; those right after training came with the update."""
        if self.rows[row] == "pre_aggregation":
            scores = self._trained.pop(row, {})
            return {name: scores[name] for name in sorted(messages) if name in scores}
        there = set(self._online())
        requests = {
            name: self._request(name, round_, EVALUATE, row, messages[name])
            for name in sorted(messages)
            if name in there
        }
        replies = self._exchange(requests, dict.fromkeys(requests, SLACK))
        for name, reply in replies.items():
            if reply.failed is not None:
                log.warning("client %s, round %d, evaluate: %s; its score stays", name, round_, FAILURES[reply.failed])
        return {name: reply.scores[row] for name, reply in replies.items() if reply.failed is None}

    def save_best(self, row: str, round_: int, names: Collection[str]) -> None:
        """Have clients save their present model as their best so far: each is told with the next request."""
        self.best |= {name: {**self.best.get(name, {}), row: round_} for name in names}

    def restore(
        self, best: Mapping[str, Mapping[str, int]], answered: Mapping[str, int], examples: Mapping[str, int]
    ) -> None:
        """Go on from these best rounds and last answers, and with the numbers of examples that were told first."""
        self.best, self.answered = {name: dict(rounds) for name, rounds in best.items()}, dict(answered)
        self._infos = {**self._infos, **{name: ClientInfo(name, count) for name, count in examples.items() if count}}

    def score_base(self, split: str, names: Collection[str]) -> dict[str, Scores]:
        """Scores of the untuned base, which clients told when they joined, or with the test."""
        if split == "test":
            return self._test(BASE)
        return {name: self.members[name].bare for name in sorted(names)}

    def majority(self) -> dict[str, Scores]:
        """Scores of a constant answer on the clients' test splits; {} unless every client's policy lets them out."""
        return self._test(MAJORITY)

    def test(self, row: str, best: bool) -> dict[str, Scores]:
        """Scores on the clients' test splits of the best round's models, or of the last round's."""
        return self._test(f"{row}/{'best' if best else 'last'}")

    def _test(self, what: str) -> dict[str, Scores]:
        """Scores on the test split, of which all are asked for at once, the first time."""
        if not self._tested:
            there: Collection[str] = self.wait_for_clients()
            missing = dict.fromkeys(sorted(self.settings.clients), ABSENT)
            last = max(self.answered.values(), default=0)
            for _ in range(TRIES):
                asked = [name for name, code in missing.items() if name in there and code in (ABSENT, *BACK_SOON)]
                requests = {name: self._request(name, last, TEST) for name in asked}
                for name, reply in self._exchange(requests, dict.fromkeys(requests, SLACK)).items():
                    missing[name] = reply.failed or ""
                    for key, scores in reply.scores.items():
                        self._tested.setdefault(key, {})[name] = scores
                if not BACK_SOON & set(missing.values()):
                    break
                time.sleep(SOON)
                there = self._online()
            for name, code in missing.items():
                if code:
                    log.warning("client %s, test: %s; its scores are missing", name, FAILURES.get(code, code))
        if what == MAJORITY and self._tested and self._tested.get(MAJORITY, {}).keys() != self._tested[BASE].keys():
            return {}
        if what not in self._tested:
            raise RunError(f"no client could be tested ({what}); `fedamole server --resume FOLDER` tries again")
        return dict(sorted(self._tested[what].items()))

    def _exchange(self, requests: Mapping[str, Request], limits: Mapping[str, int]) -> dict[str, Reply]:
        """Ask clients, and wait for all of them or the deadline; a failure is a reply too."""
        tickets, replies = dict[str, str](), dict[str, Reply]()
        started, deadline, late = time.monotonic(), self.settings.deadline, False

        def send(names: Collection[str], seconds: float) -> None:
            for name in names:
                request = requests[name]
                tickets[self.link.send(self.members[name].node, pack(request), request.round, seconds)] = name

        send(requests, deadline)
        repeated = False
        while len(replies) < len(requests) and not late:
            passed = time.monotonic() - started
            late = passed >= deadline  # one more look, however long the last one took
            for ticket, content in self.link.receive(list(tickets)).items():
                name = tickets.pop(ticket)
                if name not in replies:
                    replies[name] = self._read(requests[name], name, content, limits[name])
            missing = sorted(set(requests) - set(replies))
            tickets = {ticket: name for ticket, name in tickets.items() if name in missing}
            if not repeated and not late and passed >= REPEAT * deadline:
                repeated = True
                send(missing, deadline - passed)
            time.sleep(PAUSE if missing and not late else 0)
        for name in set(requests) - set(replies):
            replies[name] = failure(requests[name], name, "no_answer")
        for name, reply in replies.items():
            if reply.failed == "not_joined":
                self.members.pop(name)  # so that it is asked to join again
        return dict(sorted(replies.items()))

    def _read(self, request: Request, client: str | None, content: bytes | str, limit: int) -> Reply:
        """Read what came of a request; what cannot be used becomes a failure. `client` None: its name is in there."""
        if isinstance(content, str):
            return failure(request, client or "", content)
        who = f"client {client or '(no registered name)'}, round {request.round}, {request.operation}"
        if len(content) > limit:
            log.warning("%s: %d bytes where at most %d may come", who, len(content), limit)
            return failure(request, client or "", "too_large")
        try:
            return read_reply(content, request, client, self._scored(request), optional=(MAJORITY,))
        except PayloadError as error:
            log.warning("%s: refused: %s", who, error)
            return failure(request, client or "", "bad_reply")

    def _scored(self, request: Request) -> dict[str, tuple[str, ...]]:
        """Models that a reply has to score, and with what."""
        if request.operation == TEST:
            rows = [f"{row}/{which}" for row in self.rows for which in ("best", "last")]
            return {**dict.fromkeys([*rows, BASE], ("loss", "score")), MAJORITY: ("score",)}
        rows = {JOIN: [BASE], EVALUATE: [request.row or ""]}.get(request.operation) or [
            row for row, kind in self.rows.items() if kind == "pre_aggregation"
        ]
        return dict.fromkeys(rows, ("loss",) if self.select == "loss" else ("loss", "score"))
