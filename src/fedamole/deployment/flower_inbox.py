"""Answers of clients, fetched one beside the other: a client that sends half an answer holds up nobody but itself.

Flower's own grid fetches answers one after the other, waits up to two hours for pieces that a client has announced and
does not send, and fails for all where one is damaged. Here each answer is fetched in a thread of its own, for as long
as somebody waits for it, and is checked before it is put together.
"""

import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
from flwr.app import Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import get_object_id, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.superlink.grid.http_grid import HttpGrid

from fedamole.deployment.flower_content import LARGEST_MESSAGE, MOST_OBJECTS, failure_of, opened

log = logging.getLogger(__name__)

AT_ONCE = 16
"""Answers that are fetched at once."""
LOOK = 0.2
"""Seconds between two looks for a piece that has not come yet."""


class Inbox:
    """Fetches answers over the grid that Flower hands to a ServerApp."""

    def __init__(self, grid: HttpGrid) -> None:
        """Use the grid's own connection to the SuperLink."""
        self.grid = grid
        self.pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="answer")
        self.fetched: dict[str, Future[bytes | str]] = {}
        self.wanted: frozenset[str] = frozenset()

    def receive(self, tickets: Collection[str]) -> dict[str, bytes | str]:
        """What has come of these tickets: bytes, or why there will be none; each once. Others are given up."""
        self.wanted = frozenset(tickets)
        self.fetched = {ticket: future for ticket, future in self.fetched.items() if ticket in self.wanted}
        asked = [ticket for ticket in tickets if ticket not in self.fetched]
        if asked:
            found = self.grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=asked))
            for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                ticket = message.metadata.reply_to_message_id
                if message.HasField("error"):
                    failed: Future[bytes | str] = Future()
                    failed.set_result(failure_of(message.error.code))
                    self.fetched[ticket] = failed
                    continue
                run, name = message.metadata.run_id, message.metadata.message_id
                self.fetched[ticket] = self.pool.submit(self._fetch, ticket, run, name, tree)
        done = {ticket: future.result() for ticket, future in self.fetched.items() if future.done()}
        for ticket in done:
            del self.fetched[ticket]
        return done

    def _fetch(self, ticket: str, run: int, message: str, tree: ObjectTree) -> bytes | str:
        """Return the content of one answer; "lost" where nobody waits any more, "bad_reply" where it is damaged."""
        try:
            return content_of(tree, self._piece_of(ticket, run), lambda: self._confirm(run, message))
        except (_GivenUpError, httpx.HTTPError):
            return "lost"
        except Exception as error:  # whatever Flower's classes make of bytes that a client made
            log.warning("an answer cannot be read (%s)", type(error).__name__)
            return "bad_reply"

    def _piece_of(self, ticket: str, run: int) -> Callable[[str], bytes]:
        def piece(name: str) -> bytes:
            request = PullObjectRequest(node=self.grid.node, run_id=run, object_id=name)
            while ticket in self.wanted:
                found = self.grid._runtime_client.PullObject(request)
                if not found.object_found:
                    break
                if found.object_available:
                    return bytes(found.object_content)
                time.sleep(LOOK)
            raise _GivenUpError

        return piece

    def _confirm(self, run: int, message: str) -> None:
        self.grid._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.grid.node, run_id=run, message_object_id=message)
        )


class _GivenUpError(Exception):
    """Nobody waits for this answer any more, or its sender has taken it back."""


def content_of(tree: ObjectTree, piece: Callable[[str], bytes], confirm: Callable[[], None]) -> bytes | str:
    """Fetch the pieces of an answer and put them together; ValueError for one that is none."""
    names = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
    if len(names) > MOST_OBJECTS:
        raise ValueError("too many pieces")
    pieces, length = dict[str, bytes](), 0
    for name in names:
        pieces[name] = piece(name)
        length += len(pieces[name])
        if length > LARGEST_MESSAGE or get_object_id(pieces[name]) != name:
            raise ValueError("a damaged piece, or too many bytes")
    confirm()
    whole: Any = inflate_object_from_contents(tree.object_id, pieces)
    if not isinstance(whole, Message):
        raise ValueError("no message")
    return opened(whole)
