"""Check of the messages that clients push through the gateway: each must be one reply of the client to the server.

The SuperLink checks that `node.node_id` of a call belongs to the key that signed it
(flwr/superlink/routers/fleet/node_auth.py). It does not compare the message inside with that node: it would store a
message from any node to any node, and the recipient would take it for an order of the server.
"""

import math

from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

MAX_OBJECTS = 16_384
"""Maximum number of objects of one message. Flower splits arrays into objects of 5 MiB, so this allows for 80 GiB."""


def push_fault(body: bytes) -> str | None:
    """Return what is wrong with the body of a push-messages call; None for a valid reply.

    A reply is exactly one message with one object tree, from the calling node, to the SuperLink, in reply to a named
    message.
    """
    request = PushMessagesRequest()
    try:
        request.ParseFromString(body)
    except DecodeError:
        return "it is not a PushMessagesRequest"
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        return "it does not hold exactly one message with its object tree"
    metadata = request.messages_list[0].metadata
    if not request.node.node_id or metadata.src_node_id != request.node.node_id:
        return "its message has another node as its source"
    if metadata.dst_node_id != SUPERLINK_NODE_ID:
        return "its message is for another node than the SuperLink"
    if not metadata.reply_to_message_id:
        return "its message is not a reply"
    if len(request.clientapp_runtime_list) > 1 or not all(
        math.isfinite(seconds) and seconds >= 0 for seconds in request.clientapp_runtime_list
    ):
        return "its running time is not a number of seconds"
    if _count_objects(request.message_object_trees[0]) > MAX_OBJECTS:
        return f"its message has more than {MAX_OBJECTS} objects"
    return None


def _count_objects(root: ObjectTree) -> int:
    """Return the number of objects of a tree; counting stops just above the limit."""
    count, waiting = 0, [root]
    while waiting and count <= MAX_OBJECTS:
        tree = waiting.pop()
        count += 1
        waiting.extend(tree.children)
    return count
