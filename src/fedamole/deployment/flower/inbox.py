"""Answers of clients, fetched one beside the other: a client that sends half an answer holds up nobody but itself.

Flower's own grid fetches answers one after the other, waits up to two hours for pieces that a client has announced and
does not send, and fails for all where one is damaged. Here each answer is fetched by itself, piece by piece as they
come, and is checked before it is put together. No thread waits for a piece.
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
"""Answers that are fetched at once."""
FETCH_RETRY_S = 0.2
"""Seconds between two looks for a piece that has not come yet."""
FETCH_TIMEOUT_S = 600.0
"""Seconds after which an answer whose pieces have not all come is given up."""
FORGET_S = 24 * 3600.0
"""Seconds after which an answer that nobody has asked for is forgotten."""


@dataclass
class _PendingReply:
    """An answer of which not all has come, or been asked for, yet."""

    run: int
    message: str
    tree: ObjectTree
    begun: float
    asked: float
    """When somebody last asked for it."""
    look: float = 0.0
    """When to look for missing pieces again."""
    pieces: dict[str, bytes] = field(default_factory=dict)
    work: "Future[bytes | str | None] | None" = None
    """The fetching under way; None while it waits."""


class Inbox:
    """Fetches answers over the grid that Flower hands to a ServerApp."""

    def __init__(self, grid: HttpGrid) -> None:
        """Use the grid's own connection to the SuperLink."""
        self.grid = grid
        self.pool = ThreadPoolExecutor(MAX_FETCHES, thread_name_prefix="answer")
        self.pending: dict[str, _PendingReply] = {}

    def receive(self, tickets: Collection[str]) -> dict[str, bytes | str]:
        """What has come of these tickets: bytes, or why there will be none; each once.

        Tickets of another call are not given up: what has been announced for them is asked for later.
        """
        now, found = time.monotonic(), self._announced(tickets)
        for ticket in [ticket for ticket in tickets if ticket in self.pending]:
            one = self.pending[ticket]
            one.asked = now
            if one.work is None:
                if now >= one.look:
                    one.work = self.pool.submit(self._fetch, one)
                continue
            if not one.work.done():
                continue
            content, one.work, one.look = one.work.result(), None, now + FETCH_RETRY_S
            if content is None and now - one.begun > FETCH_TIMEOUT_S:
                content = "lost"
            if content is not None:
                found[ticket] = content
                del self.pending[ticket]
        forgotten = [ticket for ticket, one in self.pending.items() if one.work is None and now - one.asked > FORGET_S]
        for ticket in forgotten:
            del self.pending[ticket]
        return found

    def _announced(self, tickets: Collection[str]) -> dict[str, bytes | str]:
        """Ask which answers there are; return those that are errors."""
        asked, failed = [ticket for ticket in tickets if ticket not in self.pending], dict[str, bytes | str]()
        if not asked:
            return failed
        found = self.grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=asked))
        now = time.monotonic()
        for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            about = message.metadata
            if message.HasField("error"):
                failed[about.reply_to_message_id] = failure_of(message.error.code)
                continue
            self.pending[about.reply_to_message_id] = _PendingReply(about.run_id, about.message_id, tree, now, now)
        return failed

    def _fetch(self, one: _PendingReply) -> bytes | str | None:
        """Fetch what there is of an answer; its content, None where pieces are missing, or why there will be none."""
        try:
            names = list(dict.fromkeys(part.object_id for part in iterate_object_tree(one.tree)))
            if len(names) > MAX_OBJECTS:
                raise ValueError("too many pieces")
            for name in names:
                if name in one.pieces:
                    continue
                request = PullObjectRequest(node=self.grid.node, run_id=one.run, object_id=name)
                found = self.grid._runtime_client.PullObject(request)
                if not found.object_found:
                    return "lost"  # its sender has taken it back
                if not found.object_available:
                    return None
                one.pieces[name] = bytes(found.object_content)
                if get_object_id(one.pieces[name]) != name or sum(map(len, one.pieces.values())) > MAX_MESSAGE_BYTES:
                    raise ValueError("a damaged piece, or too many bytes")
            self.grid._runtime_client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=self.grid.node, run_id=one.run, message_object_id=one.message)
            )
            whole: Any = inflate_object_from_contents(one.tree.object_id, one.pieces)
            if not isinstance(whole, Message):
                raise ValueError("no message")
            return read_content(whole)
        except httpx.HTTPError:
            return "lost"
        except Exception as error:  # whatever Flower's classes make of bytes that a client made
            log.warning("an answer cannot be read (%s)", type(error).__name__)
            return "bad_reply"
