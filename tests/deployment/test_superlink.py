"""The token check of Flower's SuperLink, and the commands that Flower's processes may start."""

import os
import subprocess
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor.types import ExecutionSpec

from fedamole.deployment.flower.command_allowlist import KNOWN, SERVERAPP, allow_only
from fedamole.deployment.flower.executor import arguments
from fedamole.deployment.flower.superlink import TokenCheck


async def reached(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"reached"})


def status(path: str, headers: list[tuple[str, str]], gateway: bytes | None = b"gate") -> int:
    """Status of a call through the check; 200 if it passes."""
    import asyncio

    async def ask() -> int:
        transport = httpx.ASGITransport(TokenCheck(reached, b"secret", gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://superlink") as client:
            return (await client.post(path, headers=headers)).status_code

    return asyncio.run(ask())


CONTROL, GATEWAY = "x-fedamole-control", "x-fedamole-gateway"


@pytest.mark.parametrize(
    ("path", "headers", "code"),
    [
        ("/v1/control/start-run", [], 401),
        ("/v1/control/start-run", [(CONTROL, "wrong")], 401),
        ("/v1/control/start-run", [(CONTROL, "")], 401),
        ("/v1/control/start-run", [(GATEWAY, "gate")], 401),
        ("/v1/control/start-run", [(CONTROL, "secret"), (CONTROL, "wrong")], 401),
        ("/v1/control/start-run", [(CONTROL, "secret")], 200),
        ("/v1/fleet/pull-messages", [], 401),
        ("/v1/fleet/pull-messages", [(CONTROL, "secret")], 401),
        ("/v1/fleet/pull-messages", [(GATEWAY, "gate")], 200),
        ("/v1/runtime/pull-task-input", [], 200),
        ("/docs", [(CONTROL, "secret")], 404),
        ("/openapi.json", [], 404),
        ("/v1/controlx", [(CONTROL, "secret")], 404),
        ("/V1/control/start-run", [], 404),
    ],
)
def test_who_passes(path: str, headers: list[tuple[str, str]], code: int) -> None:
    assert status(path, headers) == code


def test_without_a_gateway_clients_come_by_themselves() -> None:
    assert status("/v1/fleet/pull-messages", [], gateway=None) == 200
    assert status("/v1/control/start-run", [], gateway=None) == 401


@pytest.mark.parametrize("kind", list(TaskType))
def test_the_executor_starts_the_runs_process_alone(kind: TaskType, tmp_path: Path) -> None:
    spec = ExecutionSpec(kind, "127.0.0.1:1", "the token", True, None, False, None, False, 7)
    command = arguments(spec, tmp_path)
    if kind != TaskType.SERVER_APP:
        assert command is None
        return
    assert command is not None
    assert command[0] == SERVERAPP
    assert "the token" not in " ".join(command)
    token = Path(command[command.index("--token-file") + 1])
    assert token.read_text() == "the token"
    assert token.stat().st_mode & 0o777 == 0o600


def test_every_command_of_flower_is_known() -> None:
    """Fails if another version of Flower has more commands: check what they start, then add them."""
    commands = {entry.name for entry in distribution("flwr").entry_points if entry.group == "console_scripts"}
    assert commands == KNOWN


def test_one_command_is_real_and_all_others_refuse_loudly(tmp_path: Path) -> None:
    folder = allow_only(SERVERAPP, tmp_path / "commands")
    assert {path.name for path in folder.iterdir()} == KNOWN
    path = f"{folder}{os.pathsep}{os.defpath}"
    real = subprocess.run([SERVERAPP, "--help"], env={"PATH": path}, capture_output=True, text=True, check=False)
    assert "Run a Flower ServerApp" in real.stdout
    for name in sorted(KNOWN - {SERVERAPP}):
        completed = subprocess.run(
            [name, "--token", "x"], env={"PATH": path}, capture_output=True, text=True, check=False
        )
        assert completed.returncode == 1
        assert f"refused: fedamole never uses Flower's command {name}" in completed.stderr
