"""A link over Flower's grid: sends bytes to nodes and receives their replies."""

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
    """Sends and receives over a grid; a temporarily unavailable SuperLink is retried."""

    def __init__(self, grid: Grid, inbox: Inbox | None = None) -> None:
        """Use the grid that Flower passes to a ServerApp; without an inbox (simulation) the grid fetches replies."""
        self.grid, self.inbox = grid, inbox
        self._known: dict[int, str] = {}

    def nodes(self) -> Mapping[int, str]:
        """Return the nodes that are online, with their registered names; empty if none is known."""
        try:
            self._known = {node.node_id: node.name for node in self.grid.get_nodes() if node.status == ONLINE}
        except (httpx.HTTPError, OSError) as error:
            log.warning("the SuperLink does not answer (%s); retrying", type(error).__name__)
        return self._known

    def send(self, node: int, payload: bytes, round_: int, seconds: float) -> str:
        """Send bytes to a node that has `seconds` to reply; return a ticket for the reply."""
        message = Message(
            RecordDict({"request": to_array_record(payload)}),
            dst_node_id=node,
            message_type="query",
            group_id=str(round_),
            ttl=seconds,
        )
        try:
            (ticket,) = self.grid.push_messages([message])
        except (
            httpx.HTTPError,
            OSError,
            ObjectPushError,
        ) as error:  # ObjectPushError: wrong receipts of a client can cause it
            log.warning("cannot send a request (%s)", type(error).__name__)
            return f"{UNSENT}{uuid.uuid4().hex}"
        return ticket

    def receive(self, tickets: Collection[str]) -> Mapping[str, bytes | str]:
        """Return the replies that have arrived for these tickets, as bytes or failure code; each ticket once."""
        replies: dict[str, bytes | str] = {ticket: "lost" for ticket in tickets if ticket.startswith(UNSENT)}
        sent = [ticket for ticket in tickets if ticket not in replies]
        if not sent:
            return replies
        try:
            if self.inbox is not None:
                return replies | self.inbox.receive(sent)
            messages = list(self.grid.pull_messages(sent))
        except (httpx.HTTPError, OSError) as error:
            log.warning("the SuperLink does not answer (%s); retrying", type(error).__name__)
            return replies
        for message in messages:
            replies[message.metadata.reply_to_message_id] = read_content(message)
        return replies
