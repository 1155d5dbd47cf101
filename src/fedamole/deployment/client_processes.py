"""`fedamole client`: a connection to the coordinator and a worker beside it, kept alive until it is stopped.

This process speaks with the coordinator and holds the client's key. It checks that an order is signed for this client
and new, and hands the request in it to the worker, a process of its own that holds the base model and the data. No code
comes over the connection, and nothing here starts any program but the worker.
"""

import json
import logging
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
"""Seconds between two looks at the worker."""
RESTART_S = 5.0
"""Seconds before a worker that ended, or a connection that was lost, is started again."""
WORKER_START_S = 120.0
"""Seconds to wait for the worker to start. After that the client connects anyway and answers that it has no worker."""
STALE_CONNECTION_S = 120.0
"""Seconds for which a server may still count a killed client as connected."""
MIN_POLL_S, MAX_POLL_S, POLL_FRACTION = 0.3, 3.0, 0.05
"""Seconds between two questions for work: a share of the time without work, at least and at most so many."""
IDLE_RECONNECT_S = 600.0
"""Seconds without an order after which a client connects anew, as its place at the server may have been lost."""
NODE, LAST_ORDER, LOCK = "node", "last-order", "lock"
"""Files in a client's home: the id it has at the server; the last order's counter; held while it runs."""
CONTACT_WRITE_S = 5.0
"""Seconds after which a contact is worth being written down for monitors again."""

KEY_ERRORS = {
    "expired-key": "this key has expired at the coordinator: ask it to extend the key, or send it a new one",
    "clock": "the coordinator refuses this machine's clock: set the right time",
    "bad-signature": "the coordinator cannot verify this key's signature: ask it for `fedamole clients list`",
    "no-key": "this server wants a key: give the folder that the coordinator made by --certs",
}
UNKNOWN_KEY_ERROR = (
    "the coordinator does not know this key, or has removed it: send it your node.pub (`fedamole certs --own` makes "
    "one), or ask for what `fedamole clients list` says there"
)


@dataclass(frozen=True)
class ServerConnection:
    """How a client reaches its server."""

    server: str
    """host:port."""
    certs: Path | None
    """Folder with ca.crt, coordinator.pub, node.key and node.pub; None only with `insecure`."""
    insecure: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be secure."""
        host = self.server.rpartition(":")[0].strip("[]")
        if ":" not in self.server:
            raise ConfigError(f"--server {self.server}: write host:port, for example fl.example.org:9092")
        if self.insecure and host not in (LOOPBACK, "localhost", "::1"):
            raise ConfigError(f"--insecure is for trying things out on {LOOPBACK} only, and the server is {host}")
        if self.insecure == (self.certs is not None):
            raise ConfigError("give either --certs FOLDER (what the coordinator handed you), or --insecure on loopback")
        for name in ("ca.crt", "coordinator.pub", "node.key") if self.certs is not None else ():
            assert self.certs is not None
            if not (self.certs / name).exists():
                raise ConfigError(
                    f"{self.certs / name} is missing: --certs is the folder with ca.crt and coordinator.pub, which the "
                    "coordinator sends, and with your node.key"
                )

    @property
    def ca(self) -> Path | None:
        """The authority that the server's certificate has to come from."""
        return None if self.certs is None else self.certs / "ca.crt"

    def keys(self, passphrase: bytes | None) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey] | None:
        """This client's own key and the coordinator's public one; None with --insecure."""
        if self.certs is None:
            return None
        return load_private(self.certs / "node.key", passphrase), load_public(self.certs / "coordinator.pub")


def socket_folder() -> Path:
    """A new folder for sockets and the secret, with a short path as a Unix socket's must be.

    Those of this user's clients that were killed are removed: their names say which process they belonged to.
    """
    shared = Path(tempfile.gettempdir())
    for old in shared.glob("fedamole-*-*"):
        owner = old.name.split("-")[1]
        with suppress(OSError):  # another client may have removed it just now
            mine = owner.isascii() and owner.isdigit() and old.lstat().st_uid == os.getuid()
            if mine and not old.is_symlink() and not alive(int(owner)):
                shutil.rmtree(old)
    return Path(tempfile.mkdtemp(prefix=f"fedamole-{os.getpid()}-"))


class ClientProcesses:
    """The connection of one client, and its worker."""

    def __init__(
        self,
        connection: ServerConnection,
        name: str,
        settings: dict[str, Any],
        home: Path,
        print_line: PrintLine,
        passphrase: bytes | None = None,
    ) -> None:
        """Set up; `home` is where logs and state of these processes go."""
        self.connection, self.name, self.print_line, self.home = connection, name, print_line, home
        self.keys = connection.keys(passphrase)
        home.mkdir(parents=True, exist_ok=True)
        self.order_counter = OrderCounter(home / LAST_ORDER, "" if self.keys is None else fingerprint(self.keys[1]))
        self.socket_folder = socket_folder()
        self.secret = secret_file(self.socket_folder / "secret")
        self.socket = str(self.socket_folder / "worker")
        about = json.dumps({"client": settings, "socket": self.socket, "secret": str(self.secret)})
        (home / "worker.json").write_text(about, encoding="utf-8")
        arguments = [sys.executable, "-m", "fedamole.deployment.warm_worker", str(home / "worker.json")]
        env = {name: value for name, value in environment(home / "flwr").items() if name != PASSPHRASE}
        self.worker = Process("worker", arguments, env, None)
        self.stop = threading.Event()
        self.error: FedamoleError | None = None
        self._accepted = False
        """Whether the server has ever taken this client."""
        self._failure: tuple[str, float] = ("", 0.0)
        """The trouble that keeps this client from connecting, and since when."""
        self._restart_due = 0.0
        self._health = ClientHealth("connecting", time.time())

    def run(self) -> None:
        """Serve until a signal comes; ConfigError or RunError where it makes no sense to go on."""

        def ended(number: int, frame: FrameType | None) -> None:
            self.stop.set()

        before = {number: signal.signal(number, ended) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            refusal = f"another client runs as {self.name} in {self.home.parent}: stop that one first"
            with exclusive(self.home / LOCK, refusal):
                self.print_line(f"connecting to {self.connection.server}; Ctrl-C stops")
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
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.error is not None:
            raise self.error

    def _restart_worker(self) -> None:
        """Start the worker again when it has ended, after a while; give up where it cannot start."""
        if self.worker.running:
            self._restart_due = 0.0
            return
        if self.worker.exit_code in (2, 3, 4):
            error = FedamoleError("the worker cannot start; its own words are above")
            error.exit_code = self.worker.exit_code
            raise error
        now = time.monotonic()
        self._restart_due = self._restart_due or now + RESTART_S
        if now >= self._restart_due:
            self.print_line("the worker has ended; starting it again (what it was doing is lost, its state is not)")
            self.worker.start()

    def _communicate(self) -> None:
        """Connect, carry out orders, and connect again, until the end."""
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
                    self._report_failure("away", f"{self.connection.server} cannot be reached ({type(error).__name__})")
                self.stop.wait(RESTART_S)
        except FedamoleError as error:
            self.error = error
        except Exception:  # said in full here, as nobody else sees this thread
            log.exception("the connection has failed")
            self.error = RunError("an unexpected error in the connection; see above")
        finally:
            self.stop.set()

    def _connect_and_serve(self) -> None:
        """Serve one connection until it is lost; FleetError and httpx.HTTPError say why."""
        key = None if self.keys is None else self.keys[0]
        fleet = Fleet(self.connection.server, self.connection.ca, key, self.stop)
        node = self.home / NODE
        lost = threading.Event()
        try:
            former = node.read_text(encoding="utf-8") if node.exists() and key is not None else ""
            fleet.activate(int(former) if former.isdigit() else 0)
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
        """Tell the server now and then that this client is there."""
        pause = HEARTBEAT_S * 0.7
        while not lost.wait(pause):
            try:
                if not fleet.heartbeat():
                    log.info("the server does not know this node any more")
                    lost.set()
                pause = HEARTBEAT_S * 0.7
                self._update_health(last_contact=time.time())
            except FleetError as error:
                log.info("the server refuses a sign of life: %s", error)
                lost.set()
            except httpx.HTTPError as error:
                log.debug("a sign of life did not arrive (%s)", type(error).__name__)
                pause = RESTART_S

    def _serve(self, fleet: Fleet, lost: threading.Event) -> None:
        """Ask for orders and carry them out, one after the other."""
        worked, told = time.monotonic(), ""
        while not (lost.is_set() or self.stop.is_set()):
            try:
                incoming = fleet.receive()
            except UnusableMessageError as error:
                self.print_line(f"refused: {error}")
                self.stop.wait(RESTART_S)
                continue
            if incoming is not None:
                self._handle_order(fleet, incoming)
                worked = time.monotonic()
                continue
            idle = time.monotonic() - worked
            if idle > IDLE_RECONNECT_S:
                self.print_line(f"no order for {IDLE_RECONNECT_S / 60:.0f} minutes; connecting anew")
                return
            if fleet.call_failure != told:
                told = fleet.call_failure
                if told:
                    self.print_line(f"{told}; trying again")
            self._update_health(last_contact=time.time())
            self.stop.wait(min(MAX_POLL_S, max(MIN_POLL_S, POLL_FRACTION * idle)))

    def _handle_order(self, fleet: Fleet, incoming: Incoming) -> None:
        """Check an order, have the worker do it, and answer. What is no order for this client gets no answer."""
        try:
            order = open_order(None if self.keys is None else self.keys[1], self.name, incoming.payload)
            self.order_counter.accept(order)
        except OrderError as error:
            self.print_line(f"refused an order: {error}")
            return
        except OSError as error:
            self.print_line(f"an order is not carried out, as {self.home} cannot be written ({error.strerror})")
            answer = None
        else:
            self._update_health(last_order=time.time())
            answer = self._ask_worker(order.request)
        try:
            fleet.reply(incoming, answer)
        except FleetError as error:
            if error.kind != "refused":
                raise
            log.info("nobody waits for an answer any more (%s)", error)

    def _ask_worker(self, request: bytes) -> bytes | None:
        """The worker's answer to a request; None where it is not there, or stops."""
        try:
            with WorkerConnection(self.socket, family="AF_UNIX", authkey=self.secret.read_bytes()) as worker:
                worker.send_bytes(request)
                return worker.recv_bytes()
        except (OSError, EOFError, AuthenticationError) as error:
            log.error("the worker is not there, or has stopped: %s", type(error).__name__)
            return None

    def _report_failure(self, kind: str, text: str) -> None:
        """Tell the user why the connection failed. RunError where retrying cannot help and none has ever succeeded."""
        if kind == "stopped":
            return
        text, patience = self.diagnose(kind, text)
        since = self._failure[1] if self._failure[0] == text else time.monotonic()
        if self._failure[0] != text:
            self._failure = (text, since)
            if self._accepted or patience > 0:
                limit = "" if self._accepted or patience == float("inf") else f" for {patience:.0f} s"
                self.print_line(f"{text}; trying again{limit}")
        if time.monotonic() - since >= patience and not self._accepted:
            raise RunError(text)

    def diagnose(self, kind: str, text: str) -> tuple[str, float]:
        """What a trouble means to a person, and the seconds after which it will not pass any more."""
        if kind == "certificate":
            return (
                f"the server's certificate does not come from the CA in {self.connection.ca}, or is for another name "
                "or time: ask the coordinator for the ca.crt of this federation, and use the host name that its "
                "certificate has (`fedamole doctor` tells)",
                0.0,
            )
        if kind == "tls":
            return "no TLS 1.3 with this server: has it another port, or does it run with --insecure?", 0.0
        if kind == "key":
            return KEY_ERRORS.get(text, UNKNOWN_KEY_ERROR), 0.0
        if kind == "busy":
            return (
                "the server does not take this key now: another client with the same key is connected, or was a "
                "minute ago",
                STALE_CONNECTION_S,
            )
        if kind == "proxy":
            return text, STALE_CONNECTION_S
        if kind == "refused":
            return (
                f"the server refuses to connect this client ({text}): is it a server of fedamole?",
                STALE_CONNECTION_S,
            )
        return text, float("inf")

    def _update_health(self, **changes: Any) -> None:
        """Update health.json. If only the time of the last contact changed, write at most every `CONTACT_WRITE_S` seconds."""
        before = self._health.last_contact or 0.0
        self._health = replace(self._health, **changes)
        if set(changes) != {"last_contact"} or changes["last_contact"] - before >= CONTACT_WRITE_S:
            with suppress(OSError):  # a full disk is told of by whoever has to write results
                self._health.write(self.home)
        else:
            self._health = replace(self._health, last_contact=before)


def client_home(folder: str, name: str) -> Path:
    """Where a client's processes keep their files."""
    return Path(folder).resolve() / f".client-{name}"
