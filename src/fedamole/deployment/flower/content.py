"""Encoding of bytes in Flower's messages: one opaque array that is never interpreted."""

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

MAX_OBJECTS = 4096
"""Maximum number of objects of a message; Flower's objects have 5 MB."""
MAX_MESSAGE_BYTES = 4 << 30
"""Maximum size of a message in bytes; larger messages are not fetched."""
CODES = {3: "no_answer", 5: "lost", 8: "worker"}
"""Meaning of Flower's error codes, as codes of FAILURES; any other is an unexpected error of the client."""


def to_array_record(payload: bytes) -> ArrayRecord:
    """Wrap bytes in Flower's container, which it splits into objects for the transfer."""
    return ArrayRecord({"payload": Array("uint8", (len(payload),), "bytes", payload)})


def from_array_record(record: ArrayRecord) -> bytes:
    """Return the bytes of a container."""
    return bytes(record["payload"].data)


def reply_content(payload: bytes | None) -> RecordDict:
    """Return the content of a reply; None means that the client's worker is not running."""
    if payload is None:
        return RecordDict({"failed": ConfigRecord({"by": "worker"})})
    return RecordDict({"reply": to_array_record(payload)})


def read_content(message: Message) -> bytes | str:
    """Return the bytes of a reply, or the code of its failure."""
    if message.has_error():
        return failure_of(message.error.code)
    content = message.content
    return from_array_record(content.array_records["reply"]) if "reply" in content.array_records else "worker"


def failure_of(code: int) -> str:
    """Return the code of FAILURES for one of Flower's error codes."""
    return CODES.get(code, "internal")
