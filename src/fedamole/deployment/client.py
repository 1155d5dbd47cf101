"""`fedamole client`: a warm worker and a SuperNode as one command, kept alive until it is stopped."""

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fedamole.deployment.processes import (
    LOOPBACK,
    Process,
    alive,
    command,
    environment,
    free_port,
    secret_file,
    wait_for_port,
)
from fedamole.deployment.progress import Say
from fedamole.deployment.shim import write_shim
from fedamole.errors import ConfigError, FedamoleError, RunError

PAUSE = 0.2
"""Seconds between two looks at the processes."""
AGAIN = 5.0
"""Seconds before a process that ended is started again."""
STALE = 120.0
"""Seconds for which a server may take a SuperNode that was killed for one that still runs."""


@dataclass(frozen=True)
class Trouble:
    """What a line in a SuperNode's log means."""

    sign: str
    text: str
    patience: float
    """Seconds after which trying again is given up, unless this client has been connected before."""


TROUBLES = (
    Trouble("CERTIFICATE_VERIFY_FAILED", "the server's certificate does not come from the CA in {certs}/ca.crt, or is "
            "for another name or time: ask the coordinator for the ca.crt of this federation, and use the host name "
            "that its certificate has (`fedamole doctor` tells)", 0.0),
    Trouble("code: 2004", "the server does not take this key: either it is not registered there (ask the coordinator "
            "for `fedamole certs`), or another client with the same key is connected, or was a minute ago", STALE),
    Trouble("code: 2001", "this server wants a key: give the folder that the coordinator made by --certs", 0.0),
    Trouble("Exit Code: 303", "a key is no use without TLS: leave --insecure out", 0.0),
    *(
        Trouble(sign, "no TLS connection with this server: has it another port, or does it run with --insecure?", 0.0)
        for sign in ("WRONG_VERSION_NUMBER", "record layer failure")
    ),
)


@dataclass(frozen=True)
class Connection:
    """How a client reaches its server."""

    server: str
    """host:port."""
    certs: Path | None
    """Folder with ca.crt, node.key and node.pub; None only with `insecure`."""
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
        for name in ("ca.crt", "node.key") if self.certs is not None else ():
            assert self.certs is not None
            if not (self.certs / name).exists():
                raise ConfigError(f"{self.certs / name} is missing: --certs is the folder that the coordinator made")

    def words(self) -> list[str]:
        """Options of flower-supernode."""
        if self.certs is None:
            return ["--insecure"]
        certs = self.certs.resolve()
        return ["--root-certificates", str(certs / "ca.crt"), "--auth-supernode-private-key", str(certs / "node.key")]


def rendezvous() -> Path:
    """A new folder for sockets and the secret, with a short path as a Unix socket's must be.

    Those of this user's clients that were killed are removed: their names say which process they belonged to.
    """
    shared = Path(tempfile.gettempdir())
    for old in shared.glob("fedamole-*-*"):
        owner = old.name.split("-")[1]
        with suppress(OSError):  # another client may have removed it just now
            if owner.isdigit() and old.stat().st_uid == os.getuid() and not alive(int(owner)):
                shutil.rmtree(old)
    return Path(tempfile.mkdtemp(prefix=f"fedamole-{os.getpid()}-"))


class Client:
    """The processes of one client."""

    def __init__(self, connection: Connection, settings: dict[str, Any], home: Path, say: Say) -> None:
        """Set up; `home` is where Flower's own files and logs go."""
        self.connection, self.say, self.home = connection, say, home
        self.rendezvous = rendezvous()
        port, env = free_port(), environment(home / "flwr")
        secret = secret_file(self.rendezvous / "secret")
        socket = str(self.rendezvous / "worker")
        home.mkdir(parents=True, exist_ok=True)
        about = json.dumps({"client": settings, "socket": socket, "secret": str(secret)})
        (home / "worker.json").write_text(about)
        executable = sys.executable
        self.worker = Process(
            "worker", [executable, "-m", "fedamole.deployment.warm_worker", str(home / "worker.json")], env, None
        )
        self.node = Process(
            "SuperNode",
            [
                executable, "-m", "fedamole.deployment.flower_node",
                "--superlink", connection.server, *connection.words(), "--host", LOOPBACK,
                "--port", str(port), "--isolation", "process",
                "--superexec-auth-secret-file", str(secret),
                "--node-config", f'worker="{socket}" secret="{secret}"',
            ],
            env, home / "supernode.log",
        )  # fmt: skip
        forks = str(self.rendezvous / "forks")
        self.forks = Process(
            "forks", [executable, "-m", "fedamole.deployment.flower_forks", forks], env, home / "clientapp.log"
        )
        shims = write_shim(self.rendezvous / "bin", forks)
        self.executor = Process(
            "SuperExec",
            [
                command("flower-superexec"), "--runtime-api-address", f"{LOOPBACK}:{port}", "--insecure",
                "--superexec-auth-secret-file", str(secret),
            ],
            {**env, "PATH": f"{shims}{os.pathsep}{env['PATH']}"}, home / "superexec.log",
        )  # fmt: skip
        self.port = port
        self._connected = self._accepted = False
        """Whether the SuperNode is connected, and whether one of this client's ever was."""
        self._failing: dict[str, float] = {}
        """Since when the SuperNode has had a trouble, by its sign; empty once it is connected."""
        self._waiting: dict[str, float] = {}

    def run(self) -> None:
        """Serve until a signal comes; ConfigError or RunError where it makes no sense to go on."""
        stop = threading.Event()

        def ended(number: int, frame: FrameType | None) -> None:
            stop.set()

        before = {number: signal.signal(number, ended) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.say(f"connecting to {self.connection.server}; Ctrl-C stops")
            for process in (self.worker, self.forks, self.node):
                process.start()
            while not stop.is_set():
                self._look()
                stop.wait(PAUSE)
            self.say("stopping")
        finally:
            for process in (self.executor, self.node, self.forks, self.worker):
                process.stop()
            shutil.rmtree(self.rendezvous, ignore_errors=True)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _look(self) -> None:
        """Start again what has ended, after a while; the executor when its SuperNode is up."""
        now = time.monotonic()
        if self.worker.exit_code in (2, 3, 4):
            error = FedamoleError("the worker cannot start; its own words are above")
            error.exit_code = self.worker.exit_code
            raise error
        if not self.worker.running and self._due("worker", now):
            self.say("the worker has ended; starting it again (what it was doing is lost, its state is not)")
            self.worker.start()
        if not self.forks.running and self._due("forks", now):
            (self.rendezvous / "forks").unlink(missing_ok=True)
            self.forks.start()
        if not self.node.running:
            self._connected = False
            self._judge(now)
            if self._due("SuperNode", now):
                self.node.start()
        elif not self._connected and "SuperNode ID" in self.node.tail():
            self._connected = self._accepted = True
            self._failing.clear()
            self.say("connected")
        if self.node.running and not self.executor.running:
            try:
                wait_for_port(self.port, self.node, 1.0)
                self.executor.start()
            except TimeoutError:
                return

    def _due(self, name: str, now: float) -> bool:
        """Whether a process that has ended may start again now."""
        due = self._waiting.setdefault(name, now + AGAIN)
        if now < due:
            return False
        del self._waiting[name]
        return True

    def _judge(self, now: float) -> None:
        """Find out why the SuperNode ended, and give up where it will always end so; never after it has worked."""
        tail = self.node.tail()
        trouble = next((one for one in TROUBLES if one.sign in tail), None)
        if trouble is None:
            if "SuperNode" not in self._waiting:
                self.say("the SuperNode has ended; starting it again")
            return
        text = trouble.text.format(certs=self.connection.certs)
        if trouble.sign not in self._failing:
            self._failing = {trouble.sign: now}
            if self._accepted or trouble.patience > 0:
                self.say(f"{text}; trying again" + ("" if self._accepted else f" for {trouble.patience:.0f} s"))
        if now - self._failing[trouble.sign] >= trouble.patience and not self._accepted:
            raise RunError(f"{text}. The SuperNode's own words are in {self.node.log}")


def client_home(folder: str, name: str) -> Path:
    """Where a client's processes keep their files."""
    return Path(folder).resolve() / f".client-{name}"

