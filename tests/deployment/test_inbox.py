"""Replies are fetched concurrently: an incomplete or damaged reply affects only its sender."""

import time
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from fedamole.deployment.flower import inbox as flower_inbox
from fedamole.deployment.flower.content import reply_content
from fedamole.deployment.flower.inbox import Inbox


class Superlink:
    """A fake grid with replies; tests remove objects that then do not arrive."""

    def __init__(self) -> None:
        self.node, self._runtime_client = Node(node_id=1), self
        self.waiting: list[tuple[Any, Any]] = []
        self.pieces: dict[str, bytes | None] = {}
        self.confirmed: list[str] = []

    def put(self, ticket: str, content: RecordDict | Error) -> list[str]:
        """Store a reply; return the ids of its objects."""
        order = Message(RecordDict(), dst_node_id=7, message_type="query", ttl=100.0)
        order.metadata.__dict__["_message_id"] = ticket
        message = Message(content, reply_to=order)
        message.metadata.__dict__["_message_id"] = message.object_id
        pieces = {name: piece.deflate() for name, piece in get_all_nested_objects(message).items()}
        self.pieces.update(pieces)
        self.waiting.append((message_to_proto(remove_content_from_message(message)), get_object_tree(message)))
        return list(pieces)

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:  # noqa: N802
        ids = set(request.message_ids)
        results = [pair for pair in self.waiting if pair[0].metadata.reply_to_message_id in ids]
        self.waiting = [pair for pair in self.waiting if pair not in results]
        return PullAppMessagesResponse(
            messages_list=[proto for proto, _ in results], message_object_trees=[tree for _, tree in results]
        )

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802
        content = self.pieces.get(request.object_id, b"")
        return PullObjectResponse(
            object_found=request.object_id in self.pieces,
            object_available=content is not None,
            object_content=content or b"",
        )

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        self.confirmed.append(request.message_object_id)


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch) -> Superlink:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 5)
    monkeypatch.setattr(flower_inbox, "FETCH_RETRY_S", 0.01)
    return Superlink()


def received(inbox: Inbox, tickets: list[str], count: int) -> dict[str, bytes | str]:
    """Wait until `count` replies have arrived."""
    replies, end = dict[str, bytes | str](), time.monotonic() + 10
    while len(replies) < count and time.monotonic() < end:
        replies |= inbox.receive([ticket for ticket in tickets if ticket not in replies])
        time.sleep(0.01)
    return replies


def test_an_incomplete_answer_does_not_delay_others_and_times_out(
    superlink: Superlink, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox: Inbox = Inbox(superlink)  # type: ignore[arg-type]
    (*_, last) = superlink.put("half", reply_content(b"h" * 100))
    superlink.pieces[last] = None  # announced, and never sent
    superlink.put("whole", reply_content(b"w" * 100))
    assert received(inbox, ["half", "whole"], 1) == {"whole": b"w" * 100}
    for _ in range(3):
        assert inbox.receive(["half"]) == {}
        time.sleep(0.02)
    free = [inbox.pool.submit(lambda: "free") for _ in range(flower_inbox.MAX_FETCHES)]
    assert [future.result(5) for future in free] == ["free"] * len(free), "no thread waits for the missing piece"
    monkeypatch.setattr(flower_inbox, "FETCH_TIMEOUT_S", 0.0)
    assert received(inbox, ["half"], 1) == {"half": "lost"}
    assert not inbox.pending


def test_tickets_of_one_call_do_not_cost_those_of_another(superlink: Superlink) -> None:
    """A late client joins while others train: both kinds of tickets are polled in turns."""
    inbox: Inbox = Inbox(superlink)  # type: ignore[arg-type]
    superlink.put("join", reply_content(b"j"))
    inbox.receive(["join"])
    superlink.put("train", reply_content(b"t"))
    assert received(inbox, ["train"], 1) == {"train": b"t"}
    assert received(inbox, ["join"], 1) == {"join": b"j"}


def test_a_piece_that_comes_late_completes_an_answer(superlink: Superlink) -> None:
    inbox: Inbox = Inbox(superlink)  # type: ignore[arg-type]
    (*_, last) = superlink.put("late", reply_content(b"x"))
    content, superlink.pieces[last] = superlink.pieces[last], None
    assert inbox.receive(["late"]) == {}
    superlink.pieces[last] = content
    assert received(inbox, ["late"], 1) == {"late": b"x"}
    assert superlink.confirmed


def test_damaged_answers_are_their_senders_alone(superlink: Superlink, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox: Inbox = Inbox(superlink)  # type: ignore[arg-type]
    (*_, last) = superlink.put("changed", reply_content(b"x"))
    superlink.pieces[last] = (superlink.pieces[last] or b"") + b"more"
    (first, *_) = superlink.put("taken back", reply_content(b"a piece that is taken back"))
    del superlink.pieces[first]
    superlink.put("worker", reply_content(None))
    superlink.put("foreign", RecordDict({"other": ConfigRecord({"a": 1})}))
    superlink.put("error", Error(5, "gone"))
    superlink.put("raises", Error(2, "the patient's name"))
    superlink.put("good", reply_content(b"good"))
    tickets = ["changed", "taken back", "worker", "foreign", "error", "raises", "good"]
    assert received(inbox, tickets, len(tickets)) == {
        "changed": "bad_reply",
        "taken back": "lost",
        "worker": "worker",
        "foreign": "worker",
        "error": "lost",
        "raises": "internal",
        "good": b"good",
    }
    monkeypatch.setattr(flower_inbox, "MAX_MESSAGE_BYTES", 50)
    superlink.put("large", reply_content(b"l" * 100))
    assert received(inbox, ["large"], 1) == {"large": "bad_reply"}
    monkeypatch.setattr(flower_inbox, "MAX_OBJECTS", 2)
    superlink.put("many", reply_content(b"m"))
    assert received(inbox, ["many"], 1) == {"many": "bad_reply"}
