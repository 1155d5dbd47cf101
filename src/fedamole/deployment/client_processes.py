"""`fedamole client`: maintains the connection to the coordinator and a worker process.

This process communicates with the coordinator and holds the client's key. It checks that an order is signed for this
client and not yet used, and passes the request in it to the worker, a separate process that holds the base model and
the data. The connection never carries code, and this process starts no program except the worker. Connection and worker
are restarted until the client is stopped.
"""

import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client as WorkerConnection
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from fedamole.deployment.flower.fleet import HEARTBEAT_S, Fleet, FleetError, Incoming, UnusableMessageError
from fedamole.deployment.health import ClientHealth
from fedamole.deployment.processes import LOOPBACK, PrintLine, Process, alive, environment, secret_file
from fedamole.deployment.security.keys import PASSPHRASE, fingerprint, load_private, load_public
from fedamole.deployment.security.orders import OrderCounter, OrderError, open_order
from fedamole.errors import ConfigError, FedamoleError, RunError
from fedamole.files import exclusive, write_atomic

log = logging.getLogger(__name__)

CHECK_S = 0.2
"""Seconds between checks of the worker."""
RESTART_S = 5.0
"""Seconds before a stopped worker or a lost connection is restarted."""
WORKER_START_S = 120.0
"""Seconds to wait for the worker to start. After that the client connects anyway and replies that it has no worker."""
STALE_CONNECTION_S = 120.0
"""Seconds for which a server may still count a killed client as connected."""
MIN_POLL_S, MAX_POLL_S, POLL_FRACTION = 0.3, 3.0, 0.05
"""Polling interval: a fraction of the idle time, between a minimum and a maximum in seconds."""
IDLE_RECONNECT_S = 600.0
"""Seconds without an order after which a client reconnects, as the server may have lost its registration."""
NODE, LAST_ORDER, LOCK = "node", "last-order", "lock"
"""Files in a client's home: its node id at the server, the counter of the last order, and the lock of the running
client."""
CONTACT_WRITE_S = 5.0
"""Minimum seconds between two updates of the last contact in health.json."""

KEY_ERRORS = {
    "expired-key": "this key has expired at the coordinator: ask the coordinator to extend it, or send a new key",
    "clock": "this machine's clock differs from the coordinator's: correct the time",
    "bad-signature": "the coordinator cannot verify this key's signature: ask it to check `fedamole clients list`",
    "no-key": "this server requires a key: give the folder with your key with --certs",
}
UNKNOWN_KEY_ERROR = (
    "the coordinator does not know this key, or has removed it: send it your node.pub (make one with `fedamole certs "
    "--own`), or ask it to check `fedamole clients list`"
)


@dataclass(frozen=True)
class KnownError:
    """A connection failure as shown to the user."""

    text: str
    retry_seconds: float
    """Seconds after which a client that has never connected gives up."""


@dataclass(frozen=True)
class ServerConnection:
    """The server address and credentials of a client."""

    server: str
    """HOST:PORT of the server."""
    certs: Path | None
    """Folder with ca.crt, coordinator.pub, node.key and node.pub; None only with `insecure`."""
    insecure: bool = False

    def __post_init__(self) -> None:
        """Reject insecure combinations and missing files."""
        host = self.server.rpartition(":")[0].strip("[]")
        if ":" not in self.server:
            raise ConfigError(f"--server {self.server}: write host:port, for example fl.example.org:9092")
        if self.insecure and host not in (LOOPBACK, "localhost", "::1"):
            raise ConfigError(f"--insecure is for tests on {LOOPBACK} only, but the server is {host}")
        if self.insecure == (self.certs is not None):
            raise ConfigError("give either --certs FOLDER (from the coordinator) or --insecure on loopback")
        for name in ("ca.crt", "coordinator.pub", "node.key") if self.certs is not None else ():
            assert self.certs is not None
            if not (self.certs / name).exists():
                raise ConfigError(
                    f"{self.certs / name} is missing: --certs is the folder with ca.crt and coordinator.pub from the "
                    "coordinator and with your node.key"
                )

    @property
    def ca(self) -> Path | None:
        """The CA certificate that the server's certificate is checked against."""
        return None if self.certs is None else self.certs / "ca.crt"

    def keys(self, passphrase: bytes | None) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey] | None:
        """Return this client's private key and the coordinator's public key; None with --insecure."""
        if self.certs is None:
            return None
        return load_private(self.certs / "node.key", passphrase), load_public(self.certs / "coordinator.pub")


def socket_folder() -> Path:
    """Create a folder for the worker's socket and secret, with a short path as Unix sockets require.

    Folders of this user's killed clients are removed; the folder name contains the process id.
    """
    temporary = Path(tempfile.gettempdir())
    for folder in temporary.glob("fedamole-*-*"):
        owner = folder.name.split("-")[1]
        with suppress(OSError):  # another client may have removed it meanwhile
            is_own = owner.isascii() and owner.isdigit() and folder.lstat().st_uid == os.getuid()
            if is_own and not folder.is_symlink() and not alive(int(owner)):
                shutil.rmtree(folder)
    return Path(tempfile.mkdtemp(prefix=f"fedamole-{os.getpid()}-"))


class ClientProcesses:
    """One client: its connection to the server and its worker process."""

    def __init__(
        self,
        connection: ServerConnection,
        name: str,
        settings: dict[str, Any],
        home: Path,
        print_line: PrintLine,
        passphrase: bytes | None = None,
    ) -> None:
        """Set up the client; `home` is the folder for logs and state of its processes."""
        self.connection, self.name, self.print_line, self.home = connection, name, print_line, home
        self.keys = connection.keys(passphrase)
        home.mkdir(parents=True, exist_ok=True)
        self.order_counter = OrderCounter(home / LAST_ORDER, "" if self.keys is None else fingerprint(self.keys[1]))
        self.socket_folder = socket_folder()
        self.secret = secret_file(self.socket_folder / "secret")
        self.socket = str(self.socket_folder / "worker")
        worker_settings = json.dumps({"client": settings, "socket": self.socket, "secret": str(self.secret)})
        (home / "worker.json").write_text(worker_settings, encoding="utf-8")
        arguments = [sys.executable, "-m", "fedamole.deployment.warm_worker", str(home / "worker.json")]
        env = {name: value for name, value in environment(home / "flwr").items() if name != PASSPHRASE}
        self.worker = Process("worker", arguments, env, None)
        self.stop = threading.Event()
        self.error: FedamoleError | None = None
        self._accepted = False
        """Whether the server has ever accepted this client."""
        self._failure: tuple[str, float] = ("", 0.0)
        """The error that currently prevents the connection, and when it first occurred."""
        self._restart_due = 0.0
        self._health = ClientHealth("connecting", time.time())

    def run(self) -> None:
        """Serve until a signal arrives; raises ConfigError or RunError if the client cannot continue."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.stop.set()

        previous_handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            refusal = f"another client named {self.name} is running in {self.home.parent}: stop it first"
            with exclusive(self.home / LOCK, refusal):
                self.print_line(f"connecting to {self.connection.server}; stop with Ctrl-C")
                self.worker.start()
                communication = threading.Thread(target=self._communicate, daemon=True)
                communication.start()
                while not self.stop.is_set():
                    self._restart_worker()
                    self.stop.wait(CHECK_S)
                self.print_line("stopping")
                communication.join(RESTART_S)
        finally:
            self.stop.set()
            self.worker.stop()
            self._update_health(state="stopped")
            shutil.rmtree(self.socket_folder, ignore_errors=True)
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)
        if self.error is not None:
            raise self.error

    def _restart_worker(self) -> None:
        """Restart a stopped worker after RESTART_S; raise an error if it cannot start."""
        if self.worker.running:
            self._restart_due = 0.0
            return
        if self.worker.exit_code in (2, 3, 4):
            error = FedamoleError("the worker cannot start; see its error message above")
            error.exit_code = self.worker.exit_code
            raise error
        now = time.monotonic()
        self._restart_due = self._restart_due or now + RESTART_S
        if now >= self._restart_due:
            self.print_line(
                "the worker has stopped; restarting it (the current request is lost, the state on disk is not)"
            )
            self.worker.start()

    def _communicate(self) -> None:
        """Connect and handle orders, and reconnect, until the client is stopped."""
        end = time.monotonic() + WORKER_START_S
        while not (Path(self.socket).exists() or self.stop.is_set() or time.monotonic() > end):
            self.stop.wait(CHECK_S)
        try:
            while not self.stop.is_set():
                try:
                    self._connect_and_serve()
                except FleetError as error:
                    self._report_failure(error.kind, str(error))
                except OSError as error:
                    self._report_failure("disk", f"{self.home} cannot be written ({error.strerror})")
                except httpx.HTTPError as error:
                    self._report_failure("away", f"cannot reach {self.connection.server} ({type(error).__name__})")
                self.stop.wait(RESTART_S)
        except FedamoleError as error:
            self.error = error
        except Exception:  # this thread's exceptions are visible nowhere else
            log.exception("the connection has failed")
            self.error = RunError("unexpected error in the connection; see above")
        finally:
            self.stop.set()

    def _connect_and_serve(self) -> None:
        """Serve one connection until it is lost; FleetError and httpx.HTTPError give the reason."""
        key = None if self.keys is None else self.keys[0]
        fleet = Fleet(self.connection.server, self.connection.ca, key, self.stop)
        node = self.home / NODE
        lost = threading.Event()
        try:
            previous_node = node.read_text(encoding="utf-8") if node.exists() and key is not None else ""
            fleet.activate(int(previous_node) if previous_node.isdigit() else 0)
            write_atomic(node, str(fleet.node))
            self._accepted, self._failure = True, ("", 0.0)
            self.print_line("connected")
            self._update_health(state="connected", since=time.time(), last_contact=time.time())
            threading.Thread(target=self._send_heartbeats, args=(fleet, lost), daemon=True).start()
            self._serve(fleet, lost)
        finally:
            lost.set()
            self._update_health(state="connecting", since=time.time())
            fleet.close()

    def _send_heartbeats(self, fleet: Fleet, lost: threading.Event) -> None:
        """Send heartbeats to the server until the connection is lost."""
        pause = HEARTBEAT_S * 0.7
        while not lost.wait(pause):
            try:
                if not fleet.heartbeat():
                    log.info("the server no longer knows this node")
                    lost.set()
                pause = HEARTBEAT_S * 0.7
                self._update_health(last_contact=time.time())
            except FleetError as error:
                log.info("the server refuses a heartbeat: %s", error)
                lost.set()
            except httpx.HTTPError as error:
                log.debug("a heartbeat was lost (%s)", type(error).__name__)
                pause = RESTART_S

    def _serve(self, fleet: Fleet, lost: threading.Event) -> None:
        """Poll for orders and handle them one at a time."""
        last_order, reported_failure = time.monotonic(), ""
        while not (lost.is_set() or self.stop.is_set()):
            try:
                incoming = fleet.receive()
            except UnusableMessageError as error:
                self.print_line(f"refused: {error}")
                self.stop.wait(RESTART_S)
                continue
            if incoming is not None:
                self._handle_order(fleet, incoming)
                last_order = time.monotonic()
                continue
            idle = time.monotonic() - last_order
            if idle > IDLE_RECONNECT_S:
                self.print_line(f"no order for {IDLE_RECONNECT_S / 60:.0f} minutes; reconnecting")
                return
            if fleet.call_failure != reported_failure:
                reported_failure = fleet.call_failure
                if reported_failure:
                    self.print_line(f"{reported_failure}; retrying")
            self._update_health(last_contact=time.time())
            self.stop.wait(min(MAX_POLL_S, max(MIN_POLL_S, POLL_FRACTION * idle)))

    def _handle_order(self, fleet: Fleet, incoming: Incoming) -> None:
        """Check an order, pass it to the worker and reply; anything but an order for this client gets no reply."""
        try:
            order = open_order(None if self.keys is None else self.keys[1], self.name, incoming.payload)
            self.order_counter.accept(order)
        except OrderError as error:
            self.print_line(f"refused an order: {error}")
            return
        except OSError as error:
            self.print_line(f"an order was not carried out, because {self.home} cannot be written ({error.strerror})")
            answer = None
        else:
            self._update_health(last_order=time.time())
            answer = self._ask_worker(order.request)
        try:
            fleet.reply(incoming, answer)
        except FleetError as error:
            if error.kind != "refused":
                raise
            log.info("the server no longer expects this reply (%s)", error)

    def _ask_worker(self, request: bytes) -> bytes | None:
        """Return the worker's reply to a request; None if the worker is not running or stops."""
        try:
            with WorkerConnection(self.socket, family="AF_UNIX", authkey=self.secret.read_bytes()) as worker:
                worker.send_bytes(request)
                return worker.recv_bytes()
        except (OSError, EOFError, AuthenticationError) as error:
            log.error("the worker is not running: %s", type(error).__name__)
            return None

    def _report_failure(self, kind: str, text: str) -> None:
        """Print why the connection failed. RunError if retrying is pointless and no connection has ever succeeded."""
        if kind == "stopped":
            return
        error = self._diagnose(kind, text)
        last_error, since = self._failure
        if error.text != last_error:
            since = time.monotonic()
            self._failure = (error.text, since)
            if self._accepted or error.retry_seconds > 0:
                limit = "" if self._accepted or error.retry_seconds == math.inf else f" for {error.retry_seconds:.0f} s"
                self.print_line(f"{error.text}; retrying{limit}")
        if time.monotonic() - since >= error.retry_seconds and not self._accepted:
            raise RunError(error.text)

    def _diagnose(self, kind: str, text: str) -> KnownError:
        """Return the user's view of a connection failure; `kind` is that of a FleetError, "disk" or "away"."""
        if kind == "certificate":
            return KnownError(
                f"the server's certificate was not issued by the CA in {self.connection.ca}, or is for another name "
                "or time: ask the coordinator for the ca.crt of this federation, and use a host name in its "
                "certificate (`fedamole doctor` shows the cause)",
                0.0,
            )
        if kind == "tls":
            return KnownError("no TLS 1.3 with this server: check the port, and whether it runs with --insecure", 0.0)
        if kind == "key":
            return KnownError(KEY_ERRORS.get(text, UNKNOWN_KEY_ERROR), 0.0)
        if kind == "busy":
            return KnownError(
                "the server does not accept this key now: another client with the same key is connected, or was a "
                "minute ago",
                STALE_CONNECTION_S,
            )
        if kind == "proxy":
            return KnownError(text, STALE_CONNECTION_S)
        if kind == "refused":
            text = f"the server refuses this client's connection ({text}): check that it is a server of fedamole"
            return KnownError(text, STALE_CONNECTION_S)
        return KnownError(text, math.inf)

    def _update_health(self, **changes: Any) -> None:
        """Update health.json; if only the last contact changed, write at most every `CONTACT_WRITE_S` seconds."""
        before = self._health.last_contact or 0.0
        self._health = replace(self._health, **changes)
        if set(changes) != {"last_contact"} or changes["last_contact"] - before >= CONTACT_WRITE_S:
            with suppress(OSError):  # a full disk is reported when results are written
                self._health.write(self.home)
        else:
            self._health = replace(self._health, last_contact=before)


def client_home(folder: str, name: str) -> Path:
    """Return the folder for the files of a client's processes."""
    return Path(folder).resolve() / f".client-{name}"
