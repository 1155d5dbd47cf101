"""A client's connection to the coordinator over Flower's Fleet API.

A client uses nothing else of Flower: it sends heartbeats, receives messages, and sends replies. It starts no process,
listens on no port, and has no code to fetch or run an app. A message is one opaque array of bytes; anything else in the
queue is refused before it is parsed.
"""

import json
import logging
import re
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedamole.deployment.connection_check import is_loopback
from fedamole.deployment.flower.content import MAX_MESSAGE_BYTES, MAX_OBJECTS, from_array_record, reply_content
from fedamole.deployment.security.tls import client_context

log = logging.getLogger(__name__)

T = TypeVar("T")

HEARTBEAT_S = 30.0
"""Seconds between heartbeats; the server considers a client lost when two are missing."""
CALL_S, CONNECT_S = 30.0, 10.0
"""Timeouts in seconds of a response of the server, and of a connection."""
MAX_RESPONSE_BYTES = 64 << 20
"""Maximum size in bytes of the response to one call; Flower's objects have 5 MB."""
FETCH_TIMEOUT_S = 600.0
"""Seconds that all pieces of a message may take to come."""
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds before a failed call is retried; the last value is repeated."""
MAX_SERVER_ERRORS = 20
"""Maximum number of server errors for one call; an unreachable server is retried without limit."""
RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses of temporary errors that do not concern this client."""


class FleetError(Exception):
    """A failed call: `kind` is the reason as one word, the text describes it.

    Kinds: "key" (the server does not accept this key), "busy" (another connection uses this key), "certificate", "tls",
    "proxy", "refused" (only this call), "stopped" (this client is being stopped).
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class UnusableMessageError(Exception):
    """A message that is not one opaque array of bytes from the server to this client."""


@dataclass(frozen=True)
class Incoming:
    """A received message without its content, and the content."""

    message: Message
    payload: bytes


class _BoundedClient(FleetHttpClient):
    """Flower's client for the Fleet API, with signed calls, limited responses and no redirects."""

    def __init__(self, base_url: str, verify: ssl.SSLContext | bool, key: ec.EllipticCurvePrivateKey) -> None:
        super().__init__(base_url, verify=verify)
        self.key = key
        self._client.close()
        host = httpx.URL(base_url).host
        self._client = httpx.Client(
            verify=verify,
            trust_env=not is_loopback(host),
            follow_redirects=False,
            timeout=httpx.Timeout(CALL_S, connect=CONNECT_S),
            headers={"accept-encoding": "identity", "user-agent": "fedamole"},
        )

    def _unary_unary(
        self, *, path: str, rpc_method: str, request: Any, response_type: type[T], timeout: float | None = None
    ) -> T:
        """Make one call; httpx.HTTPError if it fails, or if the response is too large or invalid."""
        timestamp = now().isoformat()
        headers = {
            "content-type": "application/protobuf",
            "accept": "application/protobuf",
            TIMESTAMP_HEADER: timestamp,
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(self.key.public_key())).decode(),
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(self.key, timestamp.encode("ascii"))).decode(),
        }
        call = self._client.build_request(
            "POST", f"{self._base_url}{path}", content=request.SerializeToString(deterministic=True), headers=headers
        )
        response = self._client.send(call, stream=True)
        try:
            chunks, length = [], 0
            for chunk in response.iter_raw():
                length += len(chunk)
                if length > MAX_RESPONSE_BYTES:
                    raise httpx.DecodingError("a response of the server is too large", request=call)
                chunks.append(chunk)
        finally:
            response.close()
        content = b"".join(chunks)
        if response.status_code != 200:
            failed = httpx.Response(response.status_code, content=content[:65536], request=call)
            raise httpx.HTTPStatusError(f"status {response.status_code}", request=call, response=failed)
        message: Any = response_type()
        try:
            message.ParseFromString(content)
        except Exception as error:
            raise httpx.DecodingError("a response of the server is damaged", request=call) from error
        result: T = message
        return result


class Fleet:
    """This process as a node of a Flower federation: it connects, receives messages and sends replies."""

    def __init__(
        self, server: str, ca: Path | None, key: ec.EllipticCurvePrivateKey | None, stop: threading.Event
    ) -> None:
        """Connect to `server` (host:port); without `ca` and `key`, without TLS and with an unregistered key.

        Setting `stop` ends any wait with a FleetError of kind "stopped".
        """
        self.registers = key is None
        self.key = key or generate_key_pairs()[0]
        self.stop = stop
        scheme, verify = ("http", False) if ca is None else ("https", client_context(ca))
        self.client = _BoundedClient(f"{scheme}://{server}", verify, self.key)
        self.node = 0
        self.call_failure: str = ""
        """Why calls currently fail; empty if they do not."""

    def activate(self, former: int = 0) -> int:
        """Register as an online node, and return the node id.

        `former` is the node id of an earlier process of this client, which the server may still consider online.
        """
        if former:
            try:
                self._call(self.client.DeactivateNode, DeactivateNodeRequest(node_id=former))
            except (FleetError, httpx.HTTPError):
                log.debug("cannot deactivate the earlier node")
        public = public_key_to_bytes(self.key.public_key())
        if self.registers:
            self.key = self.client.key = generate_key_pairs()[0]
            public = public_key_to_bytes(self.key.public_key())
            self._call(self.client.RegisterNode, RegisterNodeFleetRequest(public_key=public))
        request = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_S)
        self.node = self._call(self.client.ActivateNode, request).node_id
        return self.node

    def heartbeat(self) -> bool:
        """Send a heartbeat; False if the server no longer knows this node."""
        request = SendNodeHeartbeatRequest(node=Node(node_id=self.node), heartbeat_interval=HEARTBEAT_S)
        return bool(self._call(self.client.SendNodeHeartbeat, request).success)

    def receive(self) -> Incoming | None:
        """Return the next message, or None; UnusableMessageError if it is not a request of fedamole."""
        response = self._call_with_retries(self.client.PullMessages, PullMessagesRequest(node=Node(node_id=self.node)))
        if not response.messages_list:
            return None
        if len(response.messages_list) != 1 or len(response.message_object_trees) != 1:
            raise UnusableMessageError("received several messages instead of one")
        try:
            message = message_from_proto(response.messages_list[0])
        except Exception as error:  # Flower's classes raise many exception types for invalid metadata
            raise UnusableMessageError(f"received a message that cannot be read ({type(error).__name__})") from error
        metadata = message.metadata
        if metadata.src_node_id != SUPERLINK_NODE_ID or metadata.dst_node_id != self.node:
            raise UnusableMessageError("received a message that is not from the server to this client")
        try:
            content = self._content(metadata.run_id, response.message_object_trees[0])
            record = content.array_records["request"]
            if message.metadata.message_type != "query" or len(content) != 1 or len(record) != 1:
                raise UnusableMessageError("received a message that is not a request of fedamole")
            payload = from_array_record(record)
        except (FleetError, UnusableMessageError):
            raise
        except Exception as error:  # Flower's classes raise many exception types for foreign bytes
            raise UnusableMessageError(f"received a message that cannot be read ({type(error).__name__})") from error
        finally:
            self._confirm(metadata.run_id, metadata.message_id)
        return Incoming(message, payload)

    def _content(self, run: int, tree: ObjectTree) -> RecordDict:
        """Fetch the objects of a message, verify each against its hash, and assemble them."""
        object_ids = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
        if len(object_ids) > MAX_OBJECTS:
            raise UnusableMessageError(f"received a message of more than {MAX_OBJECTS} objects")
        objects, length, end = dict[str, bytes](), 0, time.monotonic() + FETCH_TIMEOUT_S
        for object_id in object_ids:
            content = self._fetch_object(run, object_id, end)
            length += len(content)
            if get_object_id(content) != object_id:
                raise UnusableMessageError("an object of a message is damaged")
            if length > MAX_MESSAGE_BYTES:
                raise UnusableMessageError(f"received a message of more than {MAX_MESSAGE_BYTES} bytes")
            objects[object_id] = content
        message = inflate_object_from_contents(tree.object_id, objects)
        if not isinstance(message, Message):
            raise UnusableMessageError("received an object that is not a message")
        return message.content

    def _fetch_object(self, run: int, object_id: str, end: float) -> bytes:
        """Fetch one object; a message is announced before the server has all objects, so missing ones are awaited."""
        request = PullObjectRequest(node=Node(node_id=self.node), run_id=run, object_id=object_id)
        while True:
            response = self._call_with_retries(self.client.PullObject, request)
            if not response.object_found:
                raise UnusableMessageError("an object of a message is missing")
            if response.object_available:
                return bytes(response.object_content)
            if time.monotonic() > end:
                raise UnusableMessageError("an object of a message did not arrive in time")
            self.stop.wait(PAUSES[0])

    def _confirm(self, run: int, message: str) -> None:
        request = ConfirmMessageReceivedRequest(node=Node(node_id=self.node), run_id=run, message_object_id=message)
        try:
            self._call_with_retries(self.client.ConfirmMessageReceived, request)
        except FleetError as error:
            if error.kind != "refused":
                raise
            log.debug("the server did not accept a receipt: %s", error)

    def reply(self, incoming: Incoming, payload: bytes | None) -> None:
        """Reply to a message; None means that the worker is not running.

        Raises FleetError of kind "refused" if the reply is no longer expected.
        """
        message = Message(reply_content(payload), reply_to=incoming.message)
        run = message.metadata.run_id
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            tree, objects = get_object_tree(message), get_all_nested_objects(message)
            proto = message_to_proto(remove_content_from_message(message))
        request = PushMessagesRequest(
            node=Node(node_id=self.node),
            messages_list=[proto],
            message_object_trees=[tree],
            clientapp_runtime_list=[0.0],
        )
        response = self._call_with_retries(self.client.PushMessages, request)
        for object_id in response.objects_to_push:
            if object_id not in objects:
                raise FleetError("refused", "the server requests an object that this reply does not have")
            push = PushObjectRequest(
                node=Node(node_id=self.node),
                run_id=run,
                object_id=object_id,
                session_id=response.session_id,
                object_content=objects[object_id].deflate(),
            )
            if not self._call_with_retries(self.client.PushObject, push).stored:
                raise FleetError("refused", "the server did not store an object of a reply")

    def close(self) -> None:
        """Deactivate the node, if possible, and close all connections."""
        try:
            if self.node:
                self._call(self.client.DeactivateNode, DeactivateNodeRequest(node_id=self.node))
        except (FleetError, httpx.HTTPError):
            log.debug("cannot deactivate the node")
        self.client.close()

    def _call_with_retries(self, call: Callable[[Any], T], request: Any) -> T:
        """Repeat a call until it succeeds or is refused; temporary errors are retried."""
        tries = 0
        while True:
            if self.stop.is_set():
                raise FleetError("stopped", "this client is being stopped")
            try:
                response = self._call(call, request)
                self.call_failure = ""
                return response
            except httpx.HTTPError as error:
                self.call_failure = f"cannot reach the server ({_cause(error)})"
                if isinstance(error, httpx.HTTPStatusError) and tries >= MAX_SERVER_ERRORS:
                    raise FleetError("refused", f"the server keeps failing at this call ({error})") from error
                log.debug("%s; retrying", self.call_failure)
            self.stop.wait(PAUSES[min(tries, len(PAUSES) - 1)])
            tries += 1

    def _call(self, call: Callable[[Any], T], request: Any) -> T:
        """Make a call; FleetError for permanent errors, httpx.HTTPError for temporary ones."""
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            if error.response.status_code in RETRYABLE:
                raise
            raise _refusal(error.response) from error
        except httpx.ProxyError as error:
            raise FleetError("proxy", f"the proxy in HTTPS_PROXY refuses this connection ({error})") from error
        except httpx.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise FleetError("certificate", str(error)) from error
            if any(sign in str(error) for sign in ("WRONG_VERSION", "record layer", "PROTOCOL_VERSION")):
                raise FleetError("tls", str(error)) from error
            raise


def _cause(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}"
    return type(error).__name__


def _refusal(response: httpx.Response) -> FleetError:
    """Return the error for a permanent status; the server's text is shortened and never interpreted."""
    try:
        body = json.loads(response.content)
        fields = body if isinstance(body, dict) else {}
    except (ValueError, RecursionError):
        fields = {}
    word, code = str(fields.get("error", "")), fields.get("code")
    if response.status_code == 401:
        reason = word if re.fullmatch(r"[a-z-]{1,40}", word) else "unknown-key"
        return FleetError("key", reason)
    if code == 2004:
        return FleetError("busy", "this key is not registered, or is in use")
    if code == 2001:
        return FleetError("key", "no-key")
    return FleetError("refused", f"status {response.status_code}")
