"""Admits clients on other machines to a run, and knows which of them are online."""

import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fedamole.engine import link as timing
from fedamole.engine.link import Link
from fedamole.engine.messages import FAILURES, JOIN, RETRIABLE, Request
from fedamole.engine.replies import ReplyReader
from fedamole.errors import RunError
from fedamole.federation.evaluator import Scores
from fedamole.federation.method import ClientInfo
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import pack
from fedamole.federation.settings import DeploymentSettings
from fedamole.runs.run_files import BASE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """A client that has joined."""

    node: int
    info: ClientInfo
    base_scores: Scores
    """Scores of the untuned base on its validation split."""


@dataclass(frozen=True)
class OpenJoin:
    """A request to join that has not been answered yet."""

    node: int
    resend_at: float
    """Monotonic time from which the node may be sent another request."""
    expires_at: float
    """Monotonic time after which no answer to this one can arrive."""


class Membership:
    """The clients of a run: those of the roster, those that have joined, and those that are online."""

    def __init__(
        self,
        link: Link,
        reader: ReplyReader,
        run: str,
        tables: Mapping[str, Any],
        settings: DeploymentSettings,
        listener: ProgressListener,
    ) -> None:
        """Admit the clients in `settings.clients`; `tables` is the part of the config that all clients receive."""
        self.link, self.reader, self.run, self.tables = link, reader, run, dict(tables)
        self.settings, self.listener = settings, listener
        self.members: dict[str, Member] = {}
        self.gathering = True
        """Whether the first round has not started, so that the run waits a while for all clients."""
        self._infos: dict[str, ClientInfo] = {}
        self._open_joins: dict[str, OpenJoin] = {}
        self._refused_until: dict[int, float] = {}
        self._started = time.monotonic()

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        """The roster, sorted by name; a client that has never joined has 0 examples."""
        return tuple(self._infos.get(name, ClientInfo(name, 0)) for name in sorted(self.settings.clients))

    def restore(self, examples: Mapping[str, int]) -> None:
        """Restore the numbers of training examples of clients that joined before."""
        self._infos |= {name: ClientInfo(name, count) for name, count in examples.items() if count}

    def remove(self, name: str) -> None:
        """Forget that a client has joined, so that it is asked to join again."""
        self.members.pop(name)

    def wait(self) -> list[str]:
        """Wait for `min_clients`, or for a while for all before the first round; return the names of those online.

        Raises RunError after `deployment.max_wait` seconds.
        """
        started, reported = time.monotonic(), -1
        while True:
            names = self.online()
            for_all = self.gathering and time.monotonic() - self._started < self.settings.gathering
            needed = len(self.settings.clients) if for_all else self.settings.min_clients
            if len(names) >= needed:
                self.listener.present(names, 0)
                return names
            if len(names) != reported:
                reported = len(names)
                self.listener.present(names, needed - reported)
            if time.monotonic() - started > max(self.settings.max_wait, self.settings.gathering):
                raise RunError(
                    f"waited {self.settings.max_wait:.0f} s (deployment.max_wait) for "
                    f"{needed - len(names)} more clients; here are: {', '.join(names) or 'none'}. "
                    "Nothing is lost: `fedamole server --resume FOLDER` goes on from the last finished round"
                )
            time.sleep(timing.POLL_SECONDS)

    def online(self) -> list[str]:
        """Ask new nodes to join, admit those that have answered, and return the names of all members online."""
        nodes, now = dict(self.link.nodes()), time.monotonic()
        request, seconds = Request(self.run, -1, JOIN, settings=self.tables), self.settings.deadline
        resend_at = now + min(seconds, max(timing.REFUSED_SECONDS, timing.RESEND_AFTER * seconds))
        for node in sorted(set(nodes) - self._not_to_ask(nodes, now)):
            ticket = self.link.send(node, pack(request), -1, seconds)
            self._open_joins[ticket] = OpenJoin(node, resend_at, now + seconds)
        for ticket, content in self.link.receive(list(self._open_joins)).items():
            if ticket not in self._open_joins:
                continue  # another answer received in this call has admitted the node
            node = self._open_joins.pop(ticket).node
            self._refused_until[node] = now + self._admit(node, nodes, request, content)
            if any(member.node == node for member in self.members.values()):
                self._open_joins = {other: join for other, join in self._open_joins.items() if join.node != node}
        return sorted(name for name, member in self.members.items() if member.node in nodes)

    def _not_to_ask(self, nodes: Collection[int], now: float) -> set[int]:
        """Forget requests to join that can no longer be answered; return the nodes that get no further one now.

        A request stays open until its own deadline even if another one has been sent, and the answer to either counts.
        So a client that takes longer than the interval between two requests can still join.
        """
        self._open_joins = {
            ticket: join for ticket, join in self._open_joins.items() if join.node in nodes and join.expires_at > now
        }
        count, busy = Counter(join.node for join in self._open_joins.values()), set[int]()
        for join in self._open_joins.values():
            if join.resend_at > now or count[join.node] >= timing.MAX_OPEN_JOINS:
                busy.add(join.node)
        refused = {node for node, until in self._refused_until.items() if until > now}
        return busy | refused | {member.node for member in self.members.values()}

    def _admit(self, node: int, nodes: Mapping[int, str], request: Request, content: bytes | str) -> float:
        """Admit a node as a client, or log why not; return the seconds after which it may be asked again."""
        label = nodes[node] or f"node {node}"
        reply = self.reader.read(request, nodes[node] or None, content, timing.OVERHEAD_BYTES)
        if reply.failed is not None:
            log.warning("%s did not join: %s", label, FAILURES[reply.failed])
            return timing.RETRY_SECONDS if reply.failed in RETRIABLE else timing.REFUSED_SECONDS
        name = reply.client
        if name not in self.settings.clients:
            reason = "its name is not one of deployment.clients"
        elif name in self.members and self.members[name].node in nodes:
            reason = f"there is another {name}, which is online"
        elif reply.report.get("base") != self.tables["identity"]:
            reason = "it has another base model"
        else:
            self._infos[name] = self._checked_info(name, reply.report["examples"]["train"])
            self.members[name] = Member(node, self._infos[name], reply.scores[BASE])
            self.listener.joined(name, reply.report)
            return 0.0
        log.warning("%s is refused: %s", label, reason)
        return timing.REFUSED_SECONDS

    def _checked_info(self, name: str, examples: int) -> ClientInfo:
        """Return a client with the number of examples of its first join, which is its weight throughout the run."""
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
