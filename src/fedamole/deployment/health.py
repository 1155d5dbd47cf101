"""Whether a coordinator or a client works now, for a container's health check or a monitor."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from fedamole.deployment.connection_check import check_connection
from fedamole.errors import RunError
from fedamole.files import write_atomic

HEALTH_FILE = "health.json"
"""In a client's home, FOLDER/.client-NAME: what the client last wrote of itself."""
ConnectionState = Literal["connecting", "connected", "stopped"]
CLOCK_SKEW_S = 60.0
"""Seconds that a time in the file may lie in the future: clocks are set."""
_MAX_BYTES = 4096


@dataclass(frozen=True)
class ClientHealth:
    """What a client writes of itself; times are seconds since 1970."""

    state: ConnectionState
    since: float
    """When this state began."""
    last_contact: float | None = None
    """When the coordinator last answered; None before the first answer."""
    last_order: float | None = None
    """When the coordinator last asked for work; None before the first order."""

    def write(self, home: Path) -> None:
        """Write HOME/health.json, atomically."""
        write_atomic(home / HEALTH_FILE, json.dumps(asdict(self)) + "\n")


@dataclass(frozen=True)
class HealthStatus:
    """Whether something works, and why."""

    healthy: bool
    text: str


def read_health(path: Path) -> ClientHealth:
    """Read a client's health.json; RunError where it is missing or is none."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        found = json.loads(text) if len(text) <= _MAX_BYTES else None
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}): start the client, or correct the folder") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not a health file of `fedamole client`") from error
    names = ("state", "since", "last_contact", "last_order")
    if not isinstance(found, dict) or set(found) != set(names) or found["state"] not in get_args(ConnectionState):
        raise RunError(f"{path} is not a health file of `fedamole client`")
    for name in names[1:]:
        value = found[name]
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number and (value is not None or name == "since"):
            raise RunError(f"{path}: {name} must be a time in seconds since 1970")
    return ClientHealth(**found)


def client_health(place: Path, within: float) -> HealthStatus:
    """Judge a client by its home (FOLDER/.client-NAME) or its health.json.

    Healthy is a client that is connected and has heard from its coordinator in the last `within` seconds. A client that
    was killed writes nothing more, so it becomes unhealthy after that time.
    """
    try:
        found = read_health(place / HEALTH_FILE if place.is_dir() else place)
    except RunError as error:
        return HealthStatus(False, str(error))
    now = time.time()
    times = [value for value in (found.since, found.last_contact, found.last_order) if value is not None]
    if max(times) > now + CLOCK_SKEW_S:
        return HealthStatus(False, f"{place}: a time lies {max(times) - now:.0f} s in the future; set this clock right")
    told = f"{found.state} since {_utc(found.since)}"
    if found.last_contact is not None:
        told += f", last contact {max(0.0, now - found.last_contact):.0f} s ago"
    if found.last_order is not None:
        told += f", last order {max(0.0, now - found.last_order):.0f} s ago"
    if found.state != "connected":
        return HealthStatus(False, told)
    if found.last_contact is None or now - found.last_contact > within:
        return HealthStatus(False, f"{told}; more than {within:.0f} s without contact")
    return HealthStatus(True, told)


def coordinator_health(server: str, certs: Path) -> HealthStatus:
    """Ask a coordinator's gateway at HOST:PORT for its health, with TLS against `certs`/ca.crt."""
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
