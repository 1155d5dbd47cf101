"""Flower's grid as a link: bytes to nodes and back."""

import logging
import uuid
from collections.abc import Collection, Mapping

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedamole.deployment.flower.content import read_content, to_array_record
from fedamole.deployment.flower.inbox import Inbox

log = logging.getLogger(__name__)

ONLINE = "online"
UNSENT = "unsent-"


class FlowerLink:
    """Sends and receives over a grid; a SuperLink that is away for a while is waited for."""

    def __init__(self, grid: Grid, inbox: Inbox | None = None) -> None:
        """Use the grid that Flower hands to a ServerApp; without an inbox (a simulation) it fetches answers itself."""
        self.grid, self.inbox = grid, inbox
        self._known: dict[int, str] = {}

    def nodes(self) -> Mapping[int, str]:
        """Nodes that are online, with the name each is registered by; empty where none is known."""
        try:
            self._known = {node.node_id: node.name for node in self.grid.get_nodes() if node.status == ONLINE}
        except (httpx.HTTPError, OSError) as error:
            log.warning("the SuperLink does not answer (%s); trying again", type(error).__name__)
        return self._known

    def send(self, node: int, payload: bytes, round_: int, seconds: float) -> str:
        """Send bytes to a node that has so many seconds to answer; return a ticket for the answer."""
        message = Message(
            RecordDict({"request": to_array_record(payload)}),
            dst_node_id=node,
            message_type="query",
            group_id=str(round_),
            ttl=seconds,
        )
        try:
            (ticket,) = self.grid.push_messages([message])
        except (httpx.HTTPError, OSError, ObjectPushError) as error:  # a client can spoil the last by its receipts
            log.warning("a request could not be sent (%s)", type(error).__name__)
            return f"{UNSENT}{uuid.uuid4().hex}"
        return ticket

    def receive(self, tickets: Collection[str]) -> Mapping[str, bytes | str]:
        """What has come of these tickets: bytes, or why there will be none; each ticket once."""
        found: dict[str, bytes | str] = {ticket: "lost" for ticket in tickets if ticket.startswith(UNSENT)}
        sent = [ticket for ticket in tickets if ticket not in found]
        if not sent:
            return found
        try:
            if self.inbox is not None:
                return found | self.inbox.receive(sent)
            messages = list(self.grid.pull_messages(sent))
        except (httpx.HTTPError, OSError) as error:
            log.warning("the SuperLink does not answer (%s); trying again", type(error).__name__)
            return found
        for message in messages:
            found[message.metadata.reply_to_message_id] = read_content(message)
        return found
