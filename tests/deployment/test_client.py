"""`fedamole client`: connection failures, accepted orders, and clean-up."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedamole.deployment import client_processes as client
from fedamole.deployment.client_processes import ClientProcesses, ServerConnection, socket_folder
from fedamole.deployment.flower.fleet import FleetError, Incoming
from fedamole.deployment.security.certificates import make_certificates
from fedamole.deployment.security.keys import load_private, new_key
from fedamole.deployment.security.orders import sign_order
from fedamole.errors import ConfigError, RunError


def test_what_a_killed_client_left_behind_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in (f"fedamole-{ended.pid}-left", f"fedamole-{os.getpid()}-mine", "fedamole-notes-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "fedamole-²-x").symlink_to("/")  # what another account may put there
    (tmp_path / f"fedamole-{ended.pid}-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    created = socket_folder()
    left = {path.name for path in tmp_path.iterdir()}
    foreign = {"fedamole-²-x", f"fedamole-{ended.pid}-link", "elsewhere"}
    assert left == {f"fedamole-{os.getpid()}-mine", "fedamole-notes-x", created.name, *foreign}
    assert created.stat().st_mode & 0o777 == 0o700


class Script:
    """A fake connection: the outcome of each attempt, in order; the last is repeated."""

    def __init__(self, *attempts: Any) -> None:
        self.attempts, self.made, self.stop = list(attempts), 0, threading.Event()
        self.queue: list[Incoming] = []
        self.replies: list[bytes | None] = []
        self.node, self.call_failure = 7, ""

    def __call__(self, server: str, ca: Any, key: Any, stop: threading.Event) -> "Script":
        return self

    def activate(self, former: int) -> int:
        attempt = self.attempts[min(self.made, len(self.attempts) - 1)]
        self.made += 1
        if isinstance(attempt, Exception):
            raise attempt
        self.alive = attempt
        return self.node

    def heartbeat(self) -> bool:
        return True

    def receive(self) -> Incoming | None:
        if self.queue:
            return self.queue.pop(0)
        if self.alive == "lost":
            raise FleetError("busy", "lost")
        return None

    def reply(self, incoming: Incoming, payload: bytes | None) -> None:
        self.replies.append(payload)

    def close(self) -> None:
        """There is nothing to close."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RESTART_S", 0.05)
    monkeypatch.setattr(client, "WORKER_START_S", 0.0)
    monkeypatch.setattr(client, "MIN_POLL_S", 0.01)
    monkeypatch.setattr(client, "STALE_CONNECTION_S", 0.5)


def tried(script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch, until: str) -> list[str]:
    """The lines a client prints until a given one, or until it fails; its worker sleeps."""
    monkeypatch.setattr(client, "Fleet", script)
    messages: list[str] = []

    def say(text: str) -> None:
        messages.append(text)
        if until in text:
            os.kill(os.getpid(), signal.SIGINT)

    processes = ClientProcesses(ServerConnection("127.0.0.1:1", None, insecure=True), "north", {}, folder, say)
    processes.worker.arguments = ["sleep", "60"]
    try:
        processes.run()
    finally:
        assert not processes.worker.running
        assert not processes.socket_folder.exists()
    return messages


BUSY = FleetError("busy", "x")


@pytest.mark.usefixtures("quick")
def test_a_client_that_was_taken_once_is_given_any_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "STALE_CONNECTION_S", 60.0)
    script = Script(BUSY, "lost", *[BUSY] * 30, "fine")
    messages: list[str] = []
    monkeypatch.setattr(client, "Fleet", script)

    def say(text: str) -> None:
        messages.append(text)
        if messages.count("connected") == 2:
            os.kill(os.getpid(), signal.SIGINT)

    processes = ClientProcesses(ServerConnection("127.0.0.1:1", None, insecure=True), "north", {}, tmp_path, say)
    processes.worker.arguments = ["sleep", "60"]
    processes.run()
    assert [text.split(":")[0] for text in messages] == [
        "connecting to 127.0.0.1",
        "the server does not accept this key now",
        "connected",
        "the server does not accept this key now",
        "connected",
        "stopping",
    ]
    health = json.loads((tmp_path / "health.json").read_text())
    assert health["state"] == "stopped"
    assert time.time() - health["last_contact"] < 60


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FleetError("certificate", "x"), "was not issued by the CA"),
        (FleetError("tls", "x"), "no TLS 1.3 with this server"),
        (FleetError("key", "expired-key"), "this key has expired"),
        (FleetError("key", "unknown-key"), "does not know this key, or has removed it"),
        (FleetError("proxy", "407"), "407"),
        (BUSY, "does not accept this key now"),
        (FleetError("refused", "status 404"), "check that it is a server of fedamole"),
    ],
)
def test_a_client_that_will_never_be_taken_ends_with_the_reason(
    error: FleetError, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match=text.replace("?", r"\?")):
        tried(Script(error), tmp_path, monkeypatch, "never said")


@pytest.mark.usefixtures("quick")
def test_a_server_that_is_away_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(*[httpx.ConnectError("x")] * 30, "fine")
    output = tried(script, tmp_path, monkeypatch, "connected")
    assert [text for text in output if "cannot reach" in text] == ["cannot reach 127.0.0.1:1 (ConnectError); retrying"]


@pytest.mark.usefixtures("quick")
def test_a_client_that_is_not_asked_for_long_connects_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "IDLE_RECONNECT_S", 0.2)
    script = Script("fine")
    output = tried(script, tmp_path, monkeypatch, "no order for")
    assert "connected" in output
    assert [text for text in output if text.startswith("no order for")]


@pytest.mark.usefixtures("quick")
def test_two_clients_of_one_name_and_folder_are_one_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys, time; from pathlib import Path; from fedamole.files import exclusive\n"
        "with exclusive(Path(sys.argv[1]), 'x'): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    try:
        with pytest.raises(RunError, match=r"another client named north is running in .*: stop it first"):
            tried(Script("fine"), tmp_path, monkeypatch, "connected")
    finally:
        holder.kill()
        holder.wait()


def test_a_client_obeys_its_coordinator_alone_and_each_order_once(tmp_path: Path) -> None:
    """The worker is an echo; it receives only accepted orders."""
    make_certificates(tmp_path / "certs", ["localhost"], ["north", "south"])
    certs, messages = tmp_path / "certs" / "clients" / "north", list[str]()
    processes = ClientProcesses(ServerConnection("localhost:1", certs), "north", {}, tmp_path / "home", messages.append)
    coordinator = load_private(tmp_path / "certs" / "coordinator.key")
    reached: list[bytes] = []

    def echo() -> None:
        with Listener(processes.socket, family="AF_UNIX", authkey=processes.secret.read_bytes()) as listener:
            for _ in range(2):
                with listener.accept() as caller:
                    reached.append(caller.recv_bytes())
                    caller.send_bytes(b"done")

    worker = threading.Thread(target=echo, daemon=True)
    worker.start()
    while not Path(processes.socket).exists():
        time.sleep(0.01)
    script = Script("fine")
    good, later = sign_order(coordinator, "north", 5, b"train"), sign_order(coordinator, "north", 6, b"test")
    orders = [
        good,
        good,
        sign_order(coordinator, "north", 4, b"old"),
        sign_order(coordinator, "south", 9, b"south's"),
        sign_order(new_key(), "north", 9, b"forged"),
        sign_order(None, "north", 9, b"unsigned"),
        sign_order(load_private(certs / "node.key"), "north", 9, b"by a client"),
        b"go",
        later,
    ]
    for order in orders:
        processes._handle_order(script, Incoming(None, order))  # type: ignore[arg-type]
    worker.join(10)
    assert reached == [b"train", b"test"]
    assert script.replies == [b"done", b"done"], "what is no order gets no answer"
    assert [text.split(":")[1] for text in messages] == [
        " it was accepted before, or is older than one that was"
    ] * 2 + [" it is signed for another client"] + [
        " its signature does not match the coordinator.pub of this client"
    ] * 3 + [" it is not a signed order"]


def test_a_worker_that_is_not_there_is_an_answer(tmp_path: Path) -> None:
    processes = ClientProcesses(ServerConnection("127.0.0.1:1", None, insecure=True), "north", {}, tmp_path, print)
    script = Script("fine")
    processes._handle_order(script, Incoming(None, sign_order(None, "", 1, b"x")))  # type: ignore[arg-type]
    assert script.replies == [None]


def test_a_full_disk_is_reported_and_does_not_end_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = list[str]()
    processes = ClientProcesses(
        ServerConnection("127.0.0.1:1", None, insecure=True), "north", {}, tmp_path, messages.append
    )
    monkeypatch.setattr(
        processes.order_counter, "accept", lambda order: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    script = Script("fine")
    processes._handle_order(script, Incoming(None, sign_order(None, "", 1, b"x")))  # type: ignore[arg-type]
    assert script.replies == [None]
    assert messages == [f"an order was not carried out, because {tmp_path} cannot be written (No space left on device)"]


@pytest.mark.parametrize("left", ["ca.crt", "coordinator.pub", "node.key"])
def test_a_missing_file_of_a_folder_is_reported(left: str, tmp_path: Path) -> None:
    for name in {"ca.crt", "coordinator.pub", "node.key"} - {left}:
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=f"{left} is missing"):
        ServerConnection("localhost:1", tmp_path)
