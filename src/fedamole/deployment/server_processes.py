"""`fedamole server`: a SuperLink, the gateway before it, and the run, as one command that survives its parts."""

import json
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from fedamole.config import Config, load_config
from fedamole.deployment.flower.command_allowlist import SERVERAPP, allow_only
from fedamole.deployment.flower.control import Control
from fedamole.deployment.flower.superlink import CONTROL, GATEWAY
from fedamole.deployment.processes import (
    LOOPBACK,
    PrintLine,
    Process,
    alive,
    environment,
    free_port,
    secret_file,
    wait_for_free_port,
    wait_for_port,
)
from fedamole.deployment.security.certificates import make_loopback
from fedamole.deployment.security.client_keys import admitted_keys
from fedamole.deployment.security.inspection import check_server
from fedamole.deployment.security.keys import public_pem, read_passphrase
from fedamole.deployment.server_run import OUTCOME, PROGRESS, SETTINGS, TICKET, OnProgress
from fedamole.errors import ConfigError, FedamoleError, RunError
from fedamole.experiment import resolved, rows_of
from fedamole.files import write_atomic
from fedamole.runs.run_folder import RUN, SERVER, RunFolder
from fedamole.terminal import printable

log = logging.getLogger(__name__)

CHECK_S = 0.2
LOG_CHECK_S = 60.0
"""Seconds between two looks at the size of logs."""
KEY_CHECK_S = 2.0
"""Seconds between two looks at the keys that are let in."""
SUBMIT_TIMEOUT_S = 90.0
"""Seconds after which a run whose process has vanished is submitted again at the latest."""
SHUTDOWN_S = 20.0
"""Seconds within which the processes of a server that was killed or stopped have ended."""
MAX_ATTEMPTS = 5
"""Times a run is submitted, or one of the processes started, again without a round finished in between."""


@dataclass(frozen=True)
class ListenSettings:
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

    def without_key(self, names: tuple[str, ...]) -> str:
        """Say which clients of a run have no key; empty where all have one."""
        missing = [] if self.certs is None else sorted(set(names) - set(admitted_keys(self.certs)))
        if not missing:
            return ""
        return (
            f"deployment.clients: {', '.join(missing)} have no key in {self.certs}/nodes: `fedamole certs` makes or "
            "admits keys"
        )


def prepare_folder(config: Config, folder: Path, one_owner: bool = False) -> None:
    """Lay a new run ready for the coordinator's process; nothing that exists is touched.

    `one_owner` says that all clients belong to the coordinator, as in a simulation: then the method stays as it is.
    """
    if not config.deployment.clients:
        raise ConfigError(
            'deployment.clients is empty: name the organisations, e.g. deployment.clients = ["hospital-a", "bank-b"]'
        )
    if not one_owner:
        config = replace(config, method=config.method.for_deployment())
    config.method.check(len(config.deployment.clients))
    rows_of(config)
    RunFolder(folder).refuse_existing()
    config = resolved(replace(config, run=replace(config.run, device="cpu")), folder.resolve())
    write_atomic(folder / SERVER / SETTINGS, tomli_w.dumps(config.tables()))


class ServerProcesses:
    """The processes of a coordinator, and the run they carry."""

    def __init__(self, folder: Path, listen: ListenSettings, print_line: PrintLine, on_progress: OnProgress) -> None:
        """Set up for the run laid ready in a folder; `on_progress` is given every line of progress."""
        self.folder, self.own = folder.resolve(), folder.resolve() / SERVER
        self.listen, self.print_line, self.on_progress = listen, print_line, on_progress
        self.config = load_config(self.own / SETTINGS)
        if text := listen.without_key(self.config.deployment.clients):
            if not (self.folder / RUN).exists():
                raise ConfigError(text)
            print_line(f"{text}; the run goes on without them")  # removed while it was under way
        self.env = environment(self.own / "flwr")
        self.port = listen.port if listen.insecure else free_port()
        secret = secret_file(self.own / "secret")
        tokens = self.own / "tokens"
        token = secret_file(tokens / CONTROL).read_text(encoding="utf-8")
        certs = None if listen.certs is None else listen.certs.resolve()
        inside: Path | None = None
        tls = ["--insecure"]
        if certs is None:
            (tokens / GATEWAY).unlink(missing_ok=True)
        else:
            secret_file(tokens / GATEWAY)
            # A certificate for this machine's own processes, whoever has signed the one that clients see.
            inside, key = make_loopback(self.own / "loopback")
            tls = [
                "--ssl-ca-certfile",
                str(inside),
                "--ssl-certfile",
                str(inside),
                "--ssl-keyfile",
                str(key),
                "--enable-supernode-auth",
            ]
        self.control = Control(self.port, inside, token)
        self.superlink = Process(
            "SuperLink",
            [
                sys.executable,
                "-m",
                "fedamole.deployment.flower.superlink",
                str(tokens),
                "--host",
                LOOPBACK,
                "--port",
                str(self.port),
                "--isolation",
                "process",
                "--superexec-auth-secret-file",
                str(secret),
                "--database",
                str(self.own / "superlink.db"),
                *tls,
            ],
            self.env,
            self.own / "superlink.log",
        )
        self.executor = Process(
            "SuperExec",
            [
                sys.executable,
                "-m",
                "fedamole.deployment.flower.executor",
                str(tokens),
                "--runtime-api-address",
                f"{LOOPBACK}:{self.port}",
                "--superexec-auth-secret-file",
                str(secret),
                *(["--insecure"] if inside is None else ["--root-certificates", str(inside)]),
            ],
            {**self.env, "PATH": f"{allow_only(SERVERAPP, self.own / 'commands')}{os.pathsep}{os.defpath}"},
            self.own / "serverapp.log",
        )
        self.processes = [self.superlink, self.executor]
        if certs is not None:
            arguments = [
                sys.executable,
                "-m",
                "fedamole.deployment.gateway.process",
                "--host",
                listen.host,
                "--port",
                str(listen.port),
                "--superlink",
                f"{LOOPBACK}:{self.port}",
                "--certificate",
                str(certs / "server.crt"),
                "--key",
                str(certs / "server.key"),
                "--ca",
                str(inside),
                "--nodes",
                str(certs / "nodes"),
                "--superlink-token",
                str(tokens / GATEWAY),
            ]
            self.processes.append(Process("gateway", arguments, self.env, self.own / "gateway.log"))
        self._read_bytes = 0
        self._pid = 0
        self._submitted = 0.0
        self._submissions = 0
        self._registered_keys: dict[str, bytes] | None = None
        """Public keys by name that the SuperLink knows; None before the first look."""
        self._next_key_check = self._next_log_check = 0.0
        self._key_error = ""
        self._starts_at_last_round: dict[str, int] = {}
        """Starts of each process that ended before the last finished round."""

    def run(self, stop: threading.Event) -> None:
        """Carry the run to its end, through ends of any of the processes; errors of the run are raised here."""
        try:
            self._reset_outcome()
            self._wait_for_previous_server()
            self.superlink.start()
            wait_for_port(self.port, self.superlink)
            self.executor.start()
            self._sync_keys()
            for process in self.processes[2:]:
                process.start()
            self._submit()
            where = f"{self.listen.host}:{self.listen.port}"
            self.print_line(f"waiting for clients at {where}: {', '.join(self.config.deployment.clients)}")
            while not stop.is_set():
                self._restart_exited()
                self._sync_keys()
                self._forward_progress()
                if self._is_finished():
                    return
                stop.wait(CHECK_S)
            self.print_line(f"stopping; `fedamole server --resume {self.folder}` goes on from the last finished round")
        except TimeoutError as error:
            raise RunError(f"{error}\nThe logs are in {self.own}") from error
        finally:
            for process in reversed(self.processes):
                process.stop()
            self._wait_for_run_process()

    def _reset_outcome(self) -> None:
        """Forget how the run ended last time, and read its progress from here on."""
        (self.own / OUTCOME).unlink(missing_ok=True)
        progress = self.own / PROGRESS
        self._read_bytes = progress.stat().st_size if progress.exists() else 0

    def _wait_for_previous_server(self) -> None:
        """Wait for the processes of a server that was killed a moment ago: they end, but hold the port and the run."""
        wait_for_free_port(self.listen.host, self.listen.port, SHUTDOWN_S)
        self._wait_for_run_process()

    def _wait_for_run_process(self) -> None:
        """Wait until the process of the run, which ends with its executor but holds the run, has ended."""
        end = time.monotonic() + SHUTDOWN_S
        path = self.own / PROGRESS
        lines = path.read_bytes().splitlines() if path.exists() else []
        pid = next((line["pid"] for line in _parse_lines(reversed(lines)) if line["what"] == "started"), 0)
        while pid and alive(pid) and time.monotonic() < end:
            time.sleep(CHECK_S)

    def _sync_keys(self) -> None:
        """Have the SuperLink know the keys that are in the folder now, for the clients of this run, and no others.

        The gateway refuses a removed key at once; this is what takes its name from it.
        """
        now = time.monotonic()
        if self.listen.certs is None or now < self._next_key_check:
            return
        self._next_key_check = now + KEY_CHECK_S
        try:
            present = admitted_keys(self.listen.certs)
        except ConfigError as error:
            if self._registered_keys is None:
                raise
            if str(error) != self._key_error:
                self._key_error = str(error)
                self.print_line(f"{error}; until that is mended, this run goes on with the keys that it knows")
            return
        wanted = {name: public_pem(present[name].key) for name in self.config.deployment.clients if name in present}
        if wanted == self._registered_keys:
            return
        known = self.control.nodes()
        for node, (name, key) in known.items():
            if wanted.get(name) != key:
                self.control.unregister(node)
                self.print_line(f"the key that {name} had is refused from now on")
        for name, key in wanted.items():
            if (name, key) not in known.values():
                self._register_key(name, key)
        self._registered_keys = wanted

    def _register_key(self, name: str, key: bytes) -> None:
        try:
            self.control.register(name, key)
        except RunError as error:
            if self._registered_keys is None:
                raise
            self.print_line(
                f"{error}; a key that was removed from a run cannot come back to it: {name} needs a new one"
            )

    def _submit(self) -> None:
        """Start the run's process, for the first time or again: it goes on from its last round."""
        ticket = secrets.token_hex(8)
        write_atomic(self.own / TICKET, ticket)
        key = "" if self.listen.certs is None else str(self.listen.certs.resolve() / "coordinator.key")
        self.control.start_run({"folder": str(self.folder), "ticket": ticket, "order_key": key})
        self._submitted, self._pid = time.monotonic(), 0
        self._submissions += 1

    def _restart_exited(self) -> None:
        """Start again whatever process has ended, and keep logs small."""
        if time.monotonic() > self._next_log_check:
            self._next_log_check = time.monotonic() + LOG_CHECK_S
            for process in self.processes:
                process.rotate_log()
        for process in self.processes:
            if process.running:
                continue
            if process.starts - self._starts_at_last_round.get(process.name, 0) > MAX_ATTEMPTS:
                raise RunError(f"the {process.name} ends again and again:\n{process.tail(1500)}")
            self.print_line(f"the {process.name} has ended; starting it again")
            process.start()
            if process is self.superlink:
                wait_for_port(self.port, self.superlink)

    def _forward_progress(self) -> None:
        """Pass new lines of progress on."""
        for line in self._new_lines():
            if line["what"] == "started":
                self._pid = line["pid"]
            elif line["what"] == "done":
                self._submissions = 0
                self._starts_at_last_round = {process.name: process.starts - 1 for process in self.processes}
            self.on_progress(line)

    def _new_lines(self) -> Iterator[dict[str, Any]]:
        path = self.own / PROGRESS
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._read_bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read_bytes += len(line)
                yield from _parse_lines([line])

    def _is_finished(self) -> bool:
        """Whether the run is done; a run whose process has vanished is submitted again."""
        outcome = self.own / OUTCOME
        if outcome.exists():
            self._forward_progress()
            found = json.loads(outcome.read_text(encoding="utf-8"))
            if found["error"] is None:
                return True
            error = FedamoleError(found["error"])
            error.exit_code = found["exit_code"]
            raise error
        waited = time.monotonic() - self._submitted
        gone = not alive(self._pid) if self._pid else waited > SUBMIT_TIMEOUT_S
        if gone:
            if self._submissions > MAX_ATTEMPTS:
                raise RunError(f"the run's process ends again and again:\n{self.executor.tail(2000)}")
            self.print_line("the run's process has ended; it goes on from its last finished round")
            self._submit()
        return False


def _parse_lines(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Lines of progress; one that a killed process has left half written is passed over."""
    for line in lines:
        with suppress(ValueError):
            yield json.loads(line)


def finished(folder: Path) -> bool:
    """Whether there is nothing left to resume; RunError where there is no server's run."""
    if not (folder / SERVER / SETTINGS).exists():
        raise RunError(f"{folder} is no run of `fedamole server`: {SERVER}/{SETTINGS} is missing")
    return (folder / RUN).exists() and RunFolder.open(folder).finished
