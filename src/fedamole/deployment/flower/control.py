"""The coordinator's calls to the Control API of its own SuperLink, with a token that only it can read."""

import hashlib
import logging
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError

from fedamole.deployment.flower.superlink import CONTROL_HEADER
from fedamole.deployment.security.tls import client_context
from fedamole.errors import RunError

log = logging.getLogger(__name__)

GONE = "unregistered"
APP = Path(__file__).parent / "app"
"""The app that the SuperLink runs; it only names modules of this package."""


class _Token:
    """Adds the token to every call."""

    def __init__(self, token: str) -> None:
        self.token = token

    def intercept(self, context: Any, call_next: Any) -> Any:
        context.request.headers[CONTROL_HEADER.decode()] = self.token
        return call_next(context)


class Control:
    """The Control API of a SuperLink on loopback."""

    def __init__(self, port: int, ca: Path | None, token: str) -> None:
        """Connect to a port of this machine, over TLS if a CA is given."""
        verify: ssl.SSLContext | bool = False if ca is None else client_context(ca)
        scheme = "http" if ca is None else "https"
        self.client = ControlHttpClient(f"{scheme}://127.0.0.1:{port}", interceptors=[_Token(token)], verify=verify)

    def nodes(self) -> dict[int, tuple[str, bytes]]:
        """Return name and public key (PEM) of every registered node, by node id."""
        response = self._call(self.client.ListNodes, ListNodesRequest(), "list its clients")
        return {node.node_id: (node.name, node.public_key) for node in response.nodes_info if node.status != GONE}

    def register(self, name: str, public_key: bytes) -> None:
        """Register a client's public key (PEM) under a name."""
        self._call(
            self.client.RegisterNode, RegisterNodeRequest(public_key=public_key, name=name), f"register {name}'s key"
        )

    def unregister(self, node: int) -> None:
        """Unregister a client."""
        self._call(self.client.UnregisterNode, UnregisterNodeRequest(node_id=node), "remove a client's key")

    def start_run(self, config: Mapping[str, str]) -> None:
        """Start the run's process."""
        app = build_fab_from_disk(APP)
        request = StartRunRequest(
            fab=Fab(hash_str=hashlib.sha256(app).hexdigest(), content=app),
            override_config=user_config_to_proto(dict(config)),
        )
        response = self._call(self.client.StartRun, request, "start the run")
        if not response.HasField("run_id"):
            raise RunError("Flower's SuperLink could not start the run")

    def _call(self, call: Any, request: Any, what: str) -> Any:
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            flower_error = FlowerError.from_json(error.response.text)
            reason = flower_error.message if flower_error else f"status {error.response.status_code}"
            raise RunError(f"Flower's SuperLink did not {what}: {reason}") from error
        except (httpx.HTTPError, ValueError) as error:
            raise RunError(
                f"the request to {what} did not reach Flower's SuperLink ({type(error).__name__})"
            ) from error
