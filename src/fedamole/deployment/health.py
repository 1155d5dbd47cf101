"""Health of a coordinator or a client, for container health checks and monitoring."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from fedamole.deployment.connection_check import check_connection
from fedamole.errors import RunError
from fedamole.files import write_atomic
from fedamole.received.files import read_json
from fedamole.received.forms import check_form, choice, either, nothing, number, record

HEALTH_FILE = "health.json"
"""File in a client's home, FOLDER/.client-NAME, with the client's latest state."""
ConnectionState = Literal["connecting", "connected", "stopped"]
CLOCK_SKEW_S = 60.0
"""Seconds that a time in the file may be in the future, as clocks can be adjusted."""
_MAX_BYTES = 4096
_HEALTH = record(
    {
        "state": choice(*get_args(ConnectionState)),
        "since": number(),
        "last_contact": either(nothing, number()),
        "last_order": either(nothing, number()),
    },
    closed=True,
)


@dataclass(frozen=True)
class ClientHealth:
    """The state that a client writes; times are seconds since 1970."""

    state: ConnectionState
    since: float
    """Start of this state."""
    last_contact: float | None = None
    """Last response of the coordinator; None before the first."""
    last_order: float | None = None
    """Last order of the coordinator; None before the first."""

    def write(self, home: Path) -> None:
        """Write HOME/health.json atomically."""
        write_atomic(home / HEALTH_FILE, json.dumps(asdict(self)) + "\n")


@dataclass(frozen=True)
class HealthStatus:
    """Whether a coordinator or client is healthy, and the reason."""

    healthy: bool
    text: str


def read_health(path: Path) -> ClientHealth:
    """Read a client's health.json; RunError if it is missing or invalid."""
    if not path.is_file():
        raise RunError(f"there is no file {path}: start the client, or correct the path")
    values = read_json(path, _MAX_BYTES)
    check_form(values, _HEALTH, path, RunError)
    return ClientHealth(**values)


def client_health(path: Path, within: float) -> HealthStatus:
    """Return a client's health from its home (FOLDER/.client-NAME) or its health.json.

    A client is healthy if it is connected and its last contact with the coordinator was within the last `within`
    seconds. A killed client writes nothing more, so it becomes unhealthy after that time.
    """
    try:
        health = read_health(path / HEALTH_FILE if path.is_dir() else path)
    except RunError as error:
        return HealthStatus(False, str(error))
    now = time.time()
    times = [value for value in (health.since, health.last_contact, health.last_order) if value is not None]
    if max(times) > now + CLOCK_SKEW_S:
        return HealthStatus(
            False, f"{path}: a time is {max(times) - now:.0f} s in the future; correct this machine's clock"
        )
    text = f"{health.state} since {_utc(health.since)}"
    if health.last_contact is not None:
        text += f", last contact {max(0.0, now - health.last_contact):.0f} s ago"
    if health.last_order is not None:
        text += f", last order {max(0.0, now - health.last_order):.0f} s ago"
    if health.state != "connected":
        return HealthStatus(False, text)
    if health.last_contact is None or now - health.last_contact > within:
        return HealthStatus(False, f"{text}; no contact for more than {within:.0f} s")
    return HealthStatus(True, text)


def coordinator_health(server: str, certs: Path) -> HealthStatus:
    """Query the health of the gateway at HOST:PORT over TLS, checked against `certs`/ca.crt."""
    fine, faults = check_connection(server, certs / "ca.crt")
    urgent = [fault for fault in faults if fault.urgent]
    if urgent:
        return HealthStatus(False, "; ".join(f"{fault.text} ({fault.remedy})" for fault in urgent))
    return HealthStatus(True, fine)


def _utc(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g} s after 1970"
