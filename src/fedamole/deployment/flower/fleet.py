"""A client's connection to the coordinator, over Flower's Fleet API.

This is all that a client needs of Flower: it says that it is there, takes messages, and sends answers. It starts no
process, listens on no port, and knows no way to fetch or run an app. A message is one opaque piece of bytes; anything
else that a server puts into a queue is refused here, before anybody reads it.
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
"""Seconds between two signs of life; the server takes a client for lost when two are missing."""
CALL_S, CONNECT_S = 30.0, 10.0
"""Seconds for one answer of the server, and for a connection."""
MAX_RESPONSE_BYTES = 64 << 20
"""Bytes of the server's answer to one call; Flower's own pieces have 5 MB."""
FETCH_TIMEOUT_S = 600.0
"""Seconds that all pieces of a message may take to come."""
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds before a call that failed on its way is tried again; the last is repeated."""
MAX_SERVER_ERRORS = 20
"""Times that a server may answer one call with a fault of its own; a server that is away is waited for."""
RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses that say nothing about this client and may be gone a moment later."""


class FleetError(Exception):
    """A call that failed: `kind` says why in one word, the text says it to a person.

    Kinds: "key" (the server does not take this key), "busy" (another connection has this key), "certificate", "tls",
    "proxy", "refused" (of this call alone), "stopped" (this client is being ended).
    """

    def __init__(self, kind: str, text: str) -> None:
        """Say why."""
        super().__init__(text)
        self.kind = kind


class UnusableMessageError(Exception):
    """A message that is not one opaque piece of bytes from the server to this client."""


@dataclass(frozen=True)
class Incoming:
    """A message as it came, without its content, and the content."""

    message: Message
    payload: bytes


class _BoundedClient(FleetHttpClient):
    """Flower's client for the Fleet API, with signed calls, bounded answers and no redirects."""

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
        """Make one call; httpx.HTTPError where it fails, also for an answer that is too large or no protobuf."""
        stamp = now().isoformat()
        headers = {
            "content-type": "application/protobuf",
            "accept": "application/protobuf",
            TIMESTAMP_HEADER: stamp,
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(self.key.public_key())).decode(),
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(self.key, stamp.encode("ascii"))).decode(),
        }
        call = self._client.build_request(
            "POST", f"{self._base_url}{path}", content=request.SerializeToString(deterministic=True), headers=headers
        )
        answer = self._client.send(call, stream=True)
        try:
            parts, length = [], 0
            for part in answer.iter_raw():
                length += len(part)
                if length > MAX_RESPONSE_BYTES:
                    raise httpx.DecodingError("an answer of the server is too large", request=call)
                parts.append(part)
        finally:
            answer.close()
        content = b"".join(parts)
        if answer.status_code != 200:
            failed = httpx.Response(answer.status_code, content=content[:65536], request=call)
            raise httpx.HTTPStatusError(f"status {answer.status_code}", request=call, response=failed)
        found: Any = response_type()
        try:
            found.ParseFromString(content)
        except Exception as error:
            raise httpx.DecodingError("an answer of the server is damaged", request=call) from error
        result: T = found
        return result


class Fleet:
    """This process as a node of a Flower federation: it connects, takes messages and sends answers."""

    def __init__(
        self, server: str, ca: Path | None, key: ec.EllipticCurvePrivateKey | None, stop: threading.Event
    ) -> None:
        """Speak to `server` (host:port); without `ca` and `key` it has neither TLS nor a registered key.

        `stop` ends whatever is being waited for, with a FleetError of kind "stopped".
        """
        self.registers = key is None
        self.key = key or generate_key_pairs()[0]
        self.stop = stop
        scheme, verify = ("http", False) if ca is None else ("https", client_context(ca))
        self.client = _BoundedClient(f"{scheme}://{server}", verify, self.key)
        self.node = 0
        self.call_failure: str = ""
        """Why calls are failing just now; empty where they do not."""

    def activate(self, former: int = 0) -> int:
        """Become a node that is online, and return its id.

        `former` is the id that a process of this client, which has ended, had: the server may still take it for alive.
        """
        if former:
            try:
                self._once(self.client.DeactivateNode, DeactivateNodeRequest(node_id=former))
            except (FleetError, httpx.HTTPError):
                log.debug("the former node could not be ended")
        public = public_key_to_bytes(self.key.public_key())
        if self.registers:
            self.key = self.client.key = generate_key_pairs()[0]
            public = public_key_to_bytes(self.key.public_key())
            self._once(self.client.RegisterNode, RegisterNodeFleetRequest(public_key=public))
        request = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_S)
        self.node = self._once(self.client.ActivateNode, request).node_id
        return self.node

    def heartbeat(self) -> bool:
        """Say that this node is alive; False where the server does not know it any more."""
        request = SendNodeHeartbeatRequest(node=Node(node_id=self.node), heartbeat_interval=HEARTBEAT_S)
        return bool(self._once(self.client.SendNodeHeartbeat, request).success)

    def receive(self) -> Incoming | None:
        """Return the next message, or None where there is none; UnusableMessageError for one of another form."""
        found = self._patient(self.client.PullMessages, PullMessagesRequest(node=Node(node_id=self.node)))
        if not found.messages_list:
            return None
        if len(found.messages_list) != 1 or len(found.message_object_trees) != 1:
            raise UnusableMessageError("several messages came where one was asked for")
        try:
            message = message_from_proto(found.messages_list[0])
        except Exception as error:  # whatever Flower's classes make of metadata that are none
            raise UnusableMessageError(f"a message came that cannot be read ({type(error).__name__})") from error
        about = message.metadata
        if about.src_node_id != SUPERLINK_NODE_ID or about.dst_node_id != self.node:
            raise UnusableMessageError("a message came that is not from the server to this client")
        try:
            content = self._content(about.run_id, found.message_object_trees[0])
            record = content.array_records["request"]
            if message.metadata.message_type != "query" or len(content) != 1 or len(record) != 1:
                raise UnusableMessageError("a message came that is no request of fedamole")
            payload = from_array_record(record)
        except (FleetError, UnusableMessageError):
            raise
        except Exception as error:  # whatever Flower's classes make of bytes that are not theirs
            raise UnusableMessageError(f"a message came that cannot be read ({type(error).__name__})") from error
        finally:
            self._confirm(about.run_id, about.message_id)
        return Incoming(message, payload)

    def _content(self, run: int, tree: ObjectTree) -> RecordDict:
        """Fetch the pieces of a message, each checked against its hash, and put them together."""
        names = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
        if len(names) > MAX_OBJECTS:
            raise UnusableMessageError(f"a message came in more than {MAX_OBJECTS} pieces")
        pieces, length, end = dict[str, bytes](), 0, time.monotonic() + FETCH_TIMEOUT_S
        for name in names:
            content = self._piece(run, name, end)
            length += len(content)
            if get_object_id(content) != name:
                raise UnusableMessageError("a piece of a message is damaged")
            if length > MAX_MESSAGE_BYTES:
                raise UnusableMessageError(f"a message came that is larger than {MAX_MESSAGE_BYTES} bytes")
            pieces[name] = content
        whole = inflate_object_from_contents(tree.object_id, pieces)
        if not isinstance(whole, Message):
            raise UnusableMessageError("a message came that is none")
        return whole.content

    def _piece(self, run: int, name: str, end: float) -> bytes:
        """Fetch one piece; a message is announced before the server has all of them, so they are waited for."""
        request = PullObjectRequest(node=Node(node_id=self.node), run_id=run, object_id=name)
        while True:
            found = self._patient(self.client.PullObject, request)
            if not found.object_found:
                raise UnusableMessageError("a piece of a message is missing")
            if found.object_available:
                return bytes(found.object_content)
            if time.monotonic() > end:
                raise UnusableMessageError("a piece of a message does not come")
            self.stop.wait(PAUSES[0])

    def _confirm(self, run: int, message: str) -> None:
        request = ConfirmMessageReceivedRequest(node=Node(node_id=self.node), run_id=run, message_object_id=message)
        try:
            self._patient(self.client.ConfirmMessageReceived, request)
        except FleetError as error:
            if error.kind != "refused":
                raise
            log.debug("the server did not take a receipt: %s", error)

    def reply(self, incoming: Incoming, payload: bytes | None) -> None:
        """Answer a message; None says that the worker is not there. FleetError "refused": nobody waits any more."""
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
        found = self._patient(self.client.PushMessages, request)
        for name in found.objects_to_push:
            if name not in objects:
                raise FleetError("refused", "the server asks for a piece that this answer does not have")
            piece = PushObjectRequest(
                node=Node(node_id=self.node),
                run_id=run,
                object_id=name,
                session_id=found.session_id,
                object_content=objects[name].deflate(),
            )
            if not self._patient(self.client.PushObject, piece).stored:
                raise FleetError("refused", "the server did not store a piece of an answer")

    def close(self) -> None:
        """Say goodbye, where somebody listens, and close all connections."""
        try:
            if self.node:
                self._once(self.client.DeactivateNode, DeactivateNodeRequest(node_id=self.node))
        except (FleetError, httpx.HTTPError):
            log.debug("the server could not be told that this node ends")
        self.client.close()

    def _patient(self, call: Callable[[Any], T], request: Any) -> T:
        """Make a call again and again until it works or is refused; what passes is waited for."""
        tries = 0
        while True:
            if self.stop.is_set():
                raise FleetError("stopped", "this client is being ended")
            try:
                answer = self._once(call, request)
                self.call_failure = ""
                return answer
            except httpx.HTTPError as error:
                self.call_failure = f"the server cannot be reached ({_cause(error)})"
                if isinstance(error, httpx.HTTPStatusError) and tries >= MAX_SERVER_ERRORS:
                    raise FleetError("refused", f"the server fails at this call again and again ({error})") from error
                log.debug("%s; trying again", self.call_failure)
            self.stop.wait(PAUSES[min(tries, len(PAUSES) - 1)])
            tries += 1

    def _once(self, call: Callable[[Any], T], request: Any) -> T:
        """Make a call; FleetError for what does not pass by itself, httpx.HTTPError for what may."""
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            if error.response.status_code in RETRYABLE:
                raise
            raise _refusal(error.response) from error
        except httpx.ProxyError as error:
            raise FleetError("proxy", f"the proxy of HTTPS_PROXY does not let this through ({error})") from error
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
    """What a status that does not pass means; a text of the server's is cut and never interpreted."""
    try:
        found = json.loads(response.content)
        told = found if isinstance(found, dict) else {}
    except (ValueError, RecursionError):
        told = {}
    why, code = str(told.get("error", "")), told.get("code")
    if response.status_code == 401:
        known = why if re.fullmatch(r"[a-z-]{1,40}", why) else "unknown-key"
        return FleetError("key", known)
    if code == 2004:
        return FleetError("busy", "this key is not registered, or is in use")
    if code == 2001:
        return FleetError("key", "no-key")
    return FleetError("refused", f"status {response.status_code}")
