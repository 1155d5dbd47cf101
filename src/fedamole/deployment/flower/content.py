"""How bytes travel in Flower's messages: as one opaque array, of which nothing is interpreted."""

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

MAX_OBJECTS = 4096
"""Pieces that a message may consist of; Flower's have 5 MB."""
MAX_MESSAGE_BYTES = 4 << 30
"""Bytes of a message; what is beyond that is not fetched."""
CODES = {3: "no_answer", 5: "lost", 8: "worker"}
"""Flower's error codes that say why nothing came; any other is an unexpected error of the client's."""


def to_array_record(payload: bytes) -> ArrayRecord:
    """Bytes in Flower's own container, which it cuts into pieces for the way."""
    return ArrayRecord({"payload": Array("uint8", (len(payload),), "bytes", payload)})


def from_array_record(record: ArrayRecord) -> bytes:
    """The bytes of a container."""
    return bytes(record["payload"].data)


def reply_content(payload: bytes | None) -> RecordDict:
    """The content of an answer; None says that the client's worker is not there."""
    if payload is None:
        return RecordDict({"failed": ConfigRecord({"by": "worker"})})
    return RecordDict({"reply": to_array_record(payload)})


def read_content(message: Message) -> bytes | str:
    """The bytes of an answer, or why there are none."""
    if message.has_error():
        return failure_of(message.error.code)
    content = message.content
    return from_array_record(content.array_records["reply"]) if "reply" in content.array_records else "worker"


def failure_of(code: int) -> str:
    """What one of Flower's error codes says, as one of FAILURES."""
    return CODES.get(code, "internal")
