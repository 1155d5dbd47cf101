"""Fetches the clients' replies concurrently: a client that sends an incomplete reply delays only itself.

Flower's own grid fetches replies sequentially, waits up to two hours for objects that a client has announced but does
not send, and fails for all replies if one is damaged. Here each reply is fetched separately, object by object as they
arrive, and verified before it is assembled. No thread waits for an object.
"""

import logging
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
from flwr.app import Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import get_object_id, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.superlink.grid.http_grid import HttpGrid

from fedamole.deployment.flower.content import MAX_MESSAGE_BYTES, MAX_OBJECTS, failure_of, read_content

log = logging.getLogger(__name__)

MAX_FETCHES = 16
"""Maximum number of concurrent fetches."""
FETCH_RETRY_S = 0.2
"""Seconds between checks for a missing object."""
FETCH_TIMEOUT_S = 600.0
"""Seconds after which an incomplete reply counts as lost."""
FORGET_S = 24 * 3600.0
"""Seconds after which a reply that nobody has requested is discarded."""


@dataclass
class _PendingReply:
    """A reply that is incomplete or has not been returned yet."""

    run: int
    message: str
    tree: ObjectTree
    started: float
    last_requested: float
    """Time of the last request for it."""
    next_check: float = 0.0
    """Time of the next check for missing objects."""
    objects: dict[str, bytes] = field(default_factory=dict)
    fetch: "Future[bytes | str | None] | None" = None
    """The running fetch; None between fetches."""


class Inbox:
    """Fetches replies over the grid that Flower passes to a ServerApp."""

    def __init__(self, grid: HttpGrid) -> None:
        """Use the grid's connection to the SuperLink."""
        self.grid = grid
        self.pool = ThreadPoolExecutor(MAX_FETCHES, thread_name_prefix="answer")
        self.pending: dict[str, _PendingReply] = {}

    def receive(self, tickets: Collection[str]) -> dict[str, bytes | str]:
        """Return the replies that have arrived for these tickets, as bytes or failure code; each once.

        Tickets that are not requested now stay valid: their announced replies are fetched when they are requested
        again.
        """
        now, replies = time.monotonic(), self._announced(tickets)
        for ticket in [ticket for ticket in tickets if ticket in self.pending]:
            reply = self.pending[ticket]
            reply.last_requested = now
            if reply.fetch is None:
                if now >= reply.next_check:
                    reply.fetch = self.pool.submit(self._fetch, reply)
                continue
            if not reply.fetch.done():
                continue
            content, reply.fetch, reply.next_check = reply.fetch.result(), None, now + FETCH_RETRY_S
            if content is None and now - reply.started > FETCH_TIMEOUT_S:
                content = "lost"
            if content is not None:
                replies[ticket] = content
                del self.pending[ticket]
        expired = [
            ticket
            for ticket, reply in self.pending.items()
            if reply.fetch is None and now - reply.last_requested > FORGET_S
        ]
        for ticket in expired:
            del self.pending[ticket]
        return replies

    def _announced(self, tickets: Collection[str]) -> dict[str, bytes | str]:
        """Query which replies have arrived; return the failed ones."""
        new_tickets, failed = [ticket for ticket in tickets if ticket not in self.pending], dict[str, bytes | str]()
        if not new_tickets:
            return failed
        response = self.grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=new_tickets))
        now = time.monotonic()
        for message, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            metadata = message.metadata
            if message.HasField("error"):
                failed[metadata.reply_to_message_id] = failure_of(message.error.code)
                continue
            self.pending[metadata.reply_to_message_id] = _PendingReply(
                metadata.run_id, metadata.message_id, tree, now, now
            )
        return failed

    def _fetch(self, reply: _PendingReply) -> bytes | str | None:
        """Fetch the available objects of a reply; return its content, None if it is incomplete, or a failure code."""
        try:
            object_ids = list(dict.fromkeys(part.object_id for part in iterate_object_tree(reply.tree)))
            if len(object_ids) > MAX_OBJECTS:
                raise ValueError("too many objects")
            for object_id in object_ids:
                if object_id in reply.objects:
                    continue
                request = PullObjectRequest(node=self.grid.node, run_id=reply.run, object_id=object_id)
                response = self.grid._runtime_client.PullObject(request)
                if not response.object_found:
                    return "lost"  # its sender has withdrawn it
                if not response.object_available:
                    return None
                reply.objects[object_id] = bytes(response.object_content)
                if (
                    get_object_id(reply.objects[object_id]) != object_id
                    or sum(map(len, reply.objects.values())) > MAX_MESSAGE_BYTES
                ):
                    raise ValueError("a damaged object, or too many bytes")
            self.grid._runtime_client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=self.grid.node, run_id=reply.run, message_object_id=reply.message)
            )
            message: Any = inflate_object_from_contents(reply.tree.object_id, reply.objects)
            if not isinstance(message, Message):
                raise ValueError("not a message")
            return read_content(message)
        except httpx.HTTPError:
            return "lost"
        except Exception as error:  # Flower's classes raise many exception types for untrusted bytes
            log.warning("a reply cannot be read (%s)", type(error).__name__)
            return "bad_reply"
