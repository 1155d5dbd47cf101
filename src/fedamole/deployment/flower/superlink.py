"""Flower's SuperLink, restricted to the processes of one coordinator.

`python -m fedamole.deployment.flower.superlink TOKENS ...`, where TOKENS is a folder with the files `control` and,
behind a gateway, `gateway`, followed by options of `flower-superlink`. Flower serves three APIs on one port. The
Control API starts code and registers keys without authentication: here it requires the token in the file `control`. The
Fleet API requires the gateway's token. The Runtime API has Flower's own secrets. All other paths of Flower are
disabled. Therefore another account of the coordinator's machine, which can reach the loopback port but cannot read the
files, has no access. TLS is 1.3.
"""

import hmac
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from flwr.superlink import extensions
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from fedamole.deployment.security.tls import require_tls_1_3
from fedamole.errors import FedamoleError

CONTROL, GATEWAY = "control", "gateway"
"""Names of the token files, after the processes that present them."""
CONTROL_HEADER, GATEWAY_HEADER = b"x-fedamole-control", b"x-fedamole-gateway"
RUNTIME, FLEET, CONTROLS = "/v1/runtime/", "/v1/fleet/", "/v1/control/"


class TokenCheck:
    """ASGI middleware in front of Flower: 401 for a call without its token, 404 for any other path."""

    def __init__(self, app: ASGIApp, control: bytes, gateway: bytes | None) -> None:
        """Guard an application; without a token for the gateway (--insecure) clients connect directly."""
        self.app, self.control, self.gateway = app, control, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a call, or refuse it without a body."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        status = self._refusal(scope) if scope["type"] == "http" else 404
        if status == 0:
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    def _refusal(self, scope: Scope) -> int:
        path, headers = scope["path"], scope["headers"]
        if path.startswith(CONTROLS):
            return 0 if _has_token(headers, CONTROL_HEADER, self.control) else 401
        if path.startswith(FLEET):
            return 0 if self.gateway is None or _has_token(headers, GATEWAY_HEADER, self.gateway) else 401
        return 0 if path.startswith(RUNTIME) else 404


def _has_token(headers: list[tuple[bytes, bytes]], name: bytes, token: bytes) -> bool:
    values = [value for header, value in headers if header.lower() == name]
    return len(values) == 1 and hmac.compare_digest(values[0], token)


def _run_uvicorn(**options: Any) -> None:
    """Replacement of `uvicorn.run` in Flower's command that requires TLS 1.3."""
    options.pop("workers"), options.pop("reload")
    config = uvicorn.Config(**options)
    config.load()
    if config.ssl is not None:
        require_tls_1_3(config.ssl)
    uvicorn.Server(config).run()


def main() -> None:
    """Run Flower's command with the token check; an unsupported version of Flower is refused."""
    tokens = Path(sys.argv.pop(1))
    control = (tokens / CONTROL).read_bytes()
    gateway = (tokens / GATEWAY).read_bytes() if (tokens / GATEWAY).exists() else None
    flower_superlink = importlib.import_module("flwr.superlink.cli.flower_superlink")
    if not hasattr(extensions, "get_middleware") or getattr(flower_superlink, "uvicorn", None) is not uvicorn:
        raise FedamoleError("unsupported version of flwr: install the version required in pyproject.toml")
    check = Middleware(TokenCheck, control=control, gateway=gateway)
    extensions.get_middleware = lambda: (check,)
    flower_superlink.uvicorn = SimpleNamespace(run=_run_uvicorn)  # type: ignore[attr-defined]
    sys.argv[0] = "flower-superlink"
    flower_superlink.flower_superlink()


if __name__ == "__main__":
    main()
