"""`fedamole server`: a SuperLink, the gateway before it, and the run, as one command that survives its parts."""

import json
import logging
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from fedamole.config import Config, load_config
from fedamole.deployment.client_keys import roster
from fedamole.deployment.coordinator import OUTCOME, PROGRESS, SETTINGS, TICKET
from fedamole.deployment.inspection import check_server
from fedamole.deployment.keys import read_passphrase
from fedamole.deployment.processes import (
    LOOPBACK,
    Process,
    alive,
    command,
    environment,
    free_port,
    secret_file,
    wait_for_free_port,
    wait_for_port,
)
from fedamole.deployment.progress import Say, Show
from fedamole.errors import ConfigError, FedamoleError, RunError
from fedamole.experiment import resolved, rows_of
from fedamole.federation.run_folder import RUN, SERVER, RunFolder, write_atomic
from fedamole.terminal import printable

log = logging.getLogger(__name__)

APP = Path(__file__).parent / "flower-app"
PAUSE = 0.2
QUIET = 90.0
"""Seconds after which a run whose process has vanished is submitted again at the latest."""
PREDECESSOR = 20.0
"""Seconds within which the processes of a server that was killed have ended."""
ATTEMPTS = 5
"""Times a run is submitted, or one of the processes started, again without a round finished in between."""


@dataclass(frozen=True)
class Door:
    """Where clients come in."""

    host: str
    port: int
    certs: Path | None
    """Folder made by `fedamole certs`; None only with `insecure`."""
    insecure: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be secure."""
        if self.insecure and self.host not in (LOOPBACK, "localhost"):
            raise ConfigError(f"--insecure is for trying things out on {LOOPBACK} only, and --host is {self.host}")
        if self.insecure == (self.certs is not None):
            raise ConfigError("give either --certs FOLDER (made by `fedamole certs`), or --insecure on loopback")
        if self.certs is None:
            return
        errors, warnings = check_server(self.certs, self.host, read_passphrase(None))
        if errors:
            raise ConfigError("; ".join(errors))
        for warning in warnings:
            log.warning("%s", printable(warning))

    def keys(self, names: tuple[str, ...]) -> dict[str, Path]:
        """Public keys of the clients of a run; ConfigError for one that has none."""
        if self.certs is None:
            return {}
        known = roster(self.certs)
        if missing := sorted(set(names) - set(known)):
            raise ConfigError(
                f"deployment.clients: {', '.join(missing)} have no key in {self.certs}/nodes: "
                "`fedamole certs` makes or admits keys"
            )
        return {name: known[name].path for name in names}


def prepare_folder(config: Config, folder: Path) -> None:
    """Lay a new run ready for the coordinator's process; nothing that exists is touched."""
    if not config.deployment.clients:
        raise ConfigError(
            'deployment.clients is empty: name the organisations, e.g. deployment.clients = ["hospital-a", "bank-b"]'
        )
    config.method.check(len(config.deployment.clients))
    rows_of(config)
    RunFolder(folder).refuse_existing()
    config = resolved(replace(config, run=replace(config.run, device="cpu")), folder.resolve())
    write_atomic(folder / SERVER / SETTINGS, tomli_w.dumps(config.tables()))


class Server:
    """The processes of a coordinator, and the run they carry."""

    def __init__(self, folder: Path, door: Door, say: Say, show: Show) -> None:
        """Set up for the run laid ready in a folder; `show` is given every line of progress."""
        self.folder, self.own = folder.resolve(), folder.resolve() / SERVER
        self.door, self.say, self.show = door, say, show
        self.config = load_config(self.own / SETTINGS)
        self.keys = door.keys(self.config.deployment.clients)
        self.env = environment(self.own / "flwr")
        self.port = door.port if door.insecure else free_port()
        secret = secret_file(self.own / "secret")
        certs = None if door.certs is None else door.certs.resolve()
        tls = [] if certs is None else [
            "--ssl-ca-certfile", str(certs / "ca.crt"), "--ssl-certfile", str(certs / "server.crt"),
            "--ssl-keyfile", str(certs / "server.key"), "--enable-supernode-auth",
        ]  # fmt: skip
        self.link = Process(
            "SuperLink",
            [
                command("flower-superlink"), "--host", LOOPBACK, "--port", str(self.port), "--isolation", "process",
                "--superexec-auth-secret-file", str(secret), "--database", str(self.own / "superlink.db"),
                *(tls or ["--insecure"]),
            ],
            self.env, self.own / "superlink.log",
        )  # fmt: skip
        self.executor = Process(
            "SuperExec",
            [
                command("flower-superexec"), "--runtime-api-address", f"{LOOPBACK}:{self.port}",
                "--superexec-auth-secret-file", str(secret),
                *(["--insecure"] if certs is None else ["--root-certificates", str(certs / "ca.crt")]),
            ],
            self.env, self.own / "serverapp.log",
        )  # fmt: skip
        self.processes = [self.link, self.executor]
        if certs is not None:
            words = [
                sys.executable, "-m", "fedamole.deployment.gateway", "--host", door.host, "--port", str(door.port),
                "--superlink", f"{LOOPBACK}:{self.port}", "--certificate", str(certs / "server.crt"),
                "--key", str(certs / "server.key"), "--ca", str(certs / "ca.crt"),
            ]  # fmt: skip
            self.processes.append(Process("gateway", words, self.env, self.own / "gateway.log"))
        self._read = 0
        self._pid = 0
        self._submitted = 0.0
        self._attempts = 0
        self._calm: dict[str, int] = {}
        """Starts of each process that ended before the last finished round."""

    def run(self, stop: threading.Event) -> None:
        """Carry the run to its end, through ends of any of the processes; errors of the run are raised here."""
        try:
            self._home()
            self._wait_for_predecessor()
            self.link.start()
            wait_for_port(self.port, self.link)
            self.executor.start()
            self._register()  # before anybody can come in, as a SuperNode whose key is unknown ends
            for process in self.processes[2:]:
                process.start()
            self._submit()
            where = f"{self.door.host}:{self.door.port}"
            self.say(f"waiting for clients at {where}: {', '.join(self.config.deployment.clients)}")
            while not stop.is_set():
                self._revive()
                self._tell()
                if self._ended():
                    return
                stop.wait(PAUSE)
            self.say(f"stopping; `fedamole server --resume {self.folder}` goes on from the last finished round")
        except TimeoutError as error:
            raise RunError(f"{error}\nThe logs are in {self.own}") from error
        finally:
            for process in reversed(self.processes):
                process.stop()

    def _home(self) -> None:
        """Tell Flower's command line where its SuperLink is."""
        tls = (
            {"insecure": True} if self.door.certs is None
            else {"root-certificates": str(self.door.certs.resolve() / "ca.crt")}
        )
        table = {"superlink": {"default": "run", "run": {"address": f"{LOOPBACK}:{self.port}", **tls}}}
        write_atomic(self.own / "flwr" / "config.toml", tomli_w.dumps(table))
        (self.own / OUTCOME).unlink(missing_ok=True)
        progress = self.own / PROGRESS
        self._read = progress.stat().st_size if progress.exists() else 0

    def _wait_for_predecessor(self) -> None:
        """Wait for the processes of a server that was killed a moment ago: they end, but hold the port and the run."""
        end = time.monotonic() + PREDECESSOR
        wait_for_free_port(self.door.host, self.door.port, PREDECESSOR)
        path = self.own / PROGRESS
        lines = path.read_bytes().splitlines() if path.exists() else []
        pid = next((line["pid"] for line in _parsed(reversed(lines)) if line["what"] == "started"), 0)
        while pid and alive(pid) and time.monotonic() < end:
            time.sleep(PAUSE)

    def _register(self) -> None:
        """Register the keys of this run's clients; those that are registered already stay."""

        def one(item: tuple[str, Path]) -> None:
            name, key = item
            done = self._flwr("supernode", "register", str(key.resolve()), "run", "--name", name, "--format", "json")
            if not done.get("success") and "already" not in str(done).lower():
                raise RunError(f"the key of {name} could not be registered: {done.get('error-message', done)}")

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(one, self.keys.items()))

    def _submit(self) -> None:
        """Start the run's process, for the first time or again: it goes on from its last round."""
        ticket = secrets.token_hex(8)
        write_atomic(self.own / TICKET, ticket)
        done = self._flwr("run", str(APP), "run", "-c", f"folder='{self.folder}' ticket='{ticket}'", "--format", "json")
        if not done.get("success"):
            raise RunError(f"the run could not be started: {done.get('error-message', done)}; see {self.own}")
        self._submitted, self._pid = time.monotonic(), 0
        self._attempts += 1

    def _flwr(self, *words: str) -> dict[str, Any]:
        """What a command of Flower's answers, as JSON."""
        found = subprocess.run(
            [command("flwr"), *words], env=self.env, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            check=False, process_group=0,
        )  # fmt: skip
        text = found.stdout[found.stdout.find("{") : found.stdout.rfind("}") + 1]
        try:
            answer: dict[str, Any] = json.loads(text)
        except ValueError:
            return {"success": False, "error-message": (found.stdout + found.stderr).strip()[-2000:]}
        return answer

    def _revive(self) -> None:
        """Start again whatever process has ended."""
        for process in self.processes:
            if process.running:
                continue
            if process.starts - self._calm.get(process.name, 0) > ATTEMPTS:
                raise RunError(f"the {process.name} ends again and again:\n{process.tail(1500)}")
            self.say(f"the {process.name} has ended; starting it again")
            process.start()
            if process is self.link:
                wait_for_port(self.port, self.link)

    def _tell(self) -> None:
        """Pass new lines of progress on."""
        for line in self._lines():
            if line["what"] == "started":
                self._pid = line["pid"]
            elif line["what"] == "done":
                self._attempts = 0
                self._calm = {process.name: process.starts - 1 for process in self.processes}
            self.show(line)

    def _lines(self) -> Iterator[dict[str, Any]]:
        path = self.own / PROGRESS
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                yield from _parsed([line])

    def _ended(self) -> bool:
        """Whether the run is done; a run whose process has vanished is submitted again."""
        outcome = self.own / OUTCOME
        if outcome.exists():
            self._tell()
            found = json.loads(outcome.read_text())
            if found["error"] is None:
                return True
            error = FedamoleError(found["error"])
            error.exit_code = found["exit_code"]
            raise error
        waited = time.monotonic() - self._submitted
        gone = not alive(self._pid) if self._pid else waited > QUIET
        if gone:
            if self._attempts > ATTEMPTS:
                raise RunError(f"the run's process ends again and again:\n{self.executor.tail(2000)}")
            self.say("the run's process has ended; it goes on from its last finished round")
            self._submit()
        return False


def _parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Lines of progress; one that a killed process has left half written is passed over."""
    for line in lines:
        with suppress(ValueError):
            yield json.loads(line)


def finished(folder: Path) -> bool:
    """Whether there is nothing left to resume; RunError where there is no server's run."""
    if not (folder / SERVER / SETTINGS).exists():
        raise RunError(f"{folder} is no run of `fedamole server`: {SERVER}/{SETTINGS} is missing")
    return (folder / RUN).exists() and RunFolder.open(folder).finished
