"""`fedamole server`: runs a SuperLink, the gateway in front of it and the run, and restarts them after failures."""

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
from fedamole.data.settings import DataSettings
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
from fedamole.deployment.shared_config import refuse_run_only
from fedamole.errors import ConfigError, FedamoleError, RunError
from fedamole.experiment import check_public, record_base, resolved, variants_of
from fedamole.files import write_atomic
from fedamole.runs.run_folder import RUN, SERVER, RunFolder
from fedamole.terminal import printable

log = logging.getLogger(__name__)

CHECK_S = 0.2
"""Seconds between checks of the processes."""
LOG_CHECK_S = 60.0
"""Seconds between checks of the log sizes."""
KEY_CHECK_S = 2.0
"""Seconds between checks of the admitted keys."""
SUBMIT_TIMEOUT_S = 90.0
"""Seconds after which a submitted run whose process has not started is submitted again."""
SHUTDOWN_S = 20.0
"""Seconds within which the processes of a killed or stopped server end."""
MAX_ATTEMPTS = 5
"""Maximum number of submissions of the run, or restarts of a process, without a finished round in between."""


def options(**values: object) -> list[str]:
    """Command line options, for example `host="::1"` as `--host ::1`; underscores become dashes."""
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def python_module(module: str, *arguments: object, **values: object) -> list[str]:
    """The command line that runs a module with this Python."""
    return [sys.executable, "-m", module, *map(str, arguments), *options(**values)]


@dataclass(frozen=True)
class ListenSettings:
    """Where the server listens for clients."""

    host: str
    port: int
    certs: Path | None
    """Folder made by `fedamole certs`; None only with `insecure`."""
    insecure: bool = False

    def __post_init__(self) -> None:
        """Reject insecure combinations and unusable certificates."""
        if self.insecure and self.host not in (LOOPBACK, "localhost"):
            raise ConfigError(f"--insecure is for tests on {LOOPBACK} only, but --host is {self.host}")
        if self.insecure == (self.certs is not None):
            raise ConfigError("give either --certs FOLDER (made by `fedamole certs`) or --insecure on loopback")
        if self.certs is None:
            return
        errors, warnings = check_server(self.certs, self.host, read_passphrase(None))
        if errors:
            raise ConfigError("; ".join(errors))
        for warning in warnings:
            log.warning("%s", printable(warning))

    def without_key(self, names: tuple[str, ...]) -> str:
        """Return an error text that names the clients of a run without a key; empty if all have one."""
        missing = [] if self.certs is None else sorted(set(names) - set(admitted_keys(self.certs)))
        if not missing:
            return ""
        return (
            f"deployment.clients: {', '.join(missing)} have no key in {self.certs}/nodes: make or admit keys with "
            "`fedamole certs"
        )


def prepare_folder(config: Config, folder: Path, one_owner: bool = False) -> None:
    """Prepare the folder of a new run for the coordinator's process; existing files are not changed.

    `one_owner` states that all clients belong to the coordinator, as in a simulation: then the method keeps its
    settings.
    """
    if not config.deployment.clients:
        raise ConfigError(
            'deployment.clients is empty: list the organisations, e.g. deployment.clients = ["hospital-a", "bank-b"]'
        )
    if not one_owner:
        refuse_label_noise(config.data)
        config = replace(config, method=config.method.for_deployment())
    refuse_run_only(config)
    config.method.check(len(config.deployment.clients))
    variants_of(config)
    check_public(config)
    RunFolder(folder).refuse_existing()
    config = resolved(replace(config, run=replace(config.run, device="cpu")), folder.resolve())
    write_atomic(folder / SERVER / SETTINGS, tomli_w.dumps(config.tables()))


def refuse_label_noise(data: DataSettings) -> None:
    """Raise ConfigError if a source has label noise: organisations train on their own answers, as they are."""
    for name, share in data.noise().items():
        raise ConfigError(
            f"data.source[{name}].label_noise = {share}: is for experiments in a simulation; a deployment trains on "
            "the organisations' own data as they are, so remove this key"
        )


class ServerProcesses:
    """The processes of a coordinator: SuperLink, SuperExec, gateway, and the run that SuperExec starts."""

    def __init__(self, folder: Path, listen: ListenSettings, print_line: PrintLine, on_progress: OnProgress) -> None:
        """Set up the processes for a prepared run folder; `on_progress` is called with every event of the run."""
        self.folder, self.own = folder.resolve(), folder.resolve() / SERVER
        self.listen, self.print_line, self.on_progress = listen, print_line, on_progress
        self.config = load_config(self.own / SETTINGS, stored=True)
        if text := listen.without_key(self.config.deployment.clients):
            if not (self.folder / RUN).exists():
                raise ConfigError(text)
            print_line(f"{text}; the run continues without them")  # keys removed during the run
        self.env = environment(self.own / "flwr")
        self.port = listen.port if listen.insecure else free_port()
        tokens, secret = self.own / "tokens", secret_file(self.own / "secret")
        token = secret_file(tokens / CONTROL).read_text(encoding="utf-8")
        certs = None if listen.certs is None else listen.certs.resolve()
        loopback: tuple[Path, Path] | None = None
        if certs is None:
            (tokens / GATEWAY).unlink(missing_ok=True)
        else:
            secret_file(tokens / GATEWAY)
            # The local processes use their own certificate, independent of the one that clients see.
            loopback = make_loopback(self.own / "loopback")
        self.control = Control(self.port, loopback and loopback[0], token)
        self.superlink = self._superlink_process(tokens, secret, loopback)
        self.executor = self._executor_process(tokens, secret, loopback)
        self.processes = [self.superlink, self.executor]
        if certs is not None and loopback is not None:
            self.processes.append(self._gateway_process(certs, tokens, loopback[0]))
        self._read_bytes = 0
        self._pid = 0
        self._submitted = 0.0
        self._submissions = 0
        self._registered_keys: dict[str, bytes] | None = None
        """Public keys registered at the SuperLink, by client name; None before the first check."""
        self._next_key_check = self._next_log_check = 0.0
        self._key_error = ""
        self._starts_at_last_round: dict[str, int] = {}
        """Number of restarts of each process before the last finished round."""

    def _superlink_process(self, tokens: Path, secret: Path, loopback: tuple[Path, Path] | None) -> Process:
        arguments = python_module(
            "fedamole.deployment.flower.superlink",
            tokens,
            host=LOOPBACK,
            port=self.port,
            isolation="process",
            superexec_auth_secret_file=secret,
            database=self.own / "superlink.db",
        )
        if loopback is None:
            arguments.append("--insecure")
        else:
            certificate, key = loopback
            arguments += options(ssl_ca_certfile=certificate, ssl_certfile=certificate, ssl_keyfile=key)
            arguments.append("--enable-supernode-auth")
        return Process("SuperLink", arguments, self.env, self.own / "superlink.log")

    def _executor_process(self, tokens: Path, secret: Path, loopback: tuple[Path, Path] | None) -> Process:
        arguments = python_module(
            "fedamole.deployment.flower.executor",
            tokens,
            runtime_api_address=f"{LOOPBACK}:{self.port}",
            superexec_auth_secret_file=secret,
        )
        arguments += ["--insecure"] if loopback is None else options(root_certificates=loopback[0])
        path = f"{allow_only(SERVERAPP, self.own / 'commands')}{os.pathsep}{os.defpath}"
        return Process("SuperExec", arguments, {**self.env, "PATH": path}, self.own / "serverapp.log")

    def _gateway_process(self, certs: Path, tokens: Path, ca: Path) -> Process:
        arguments = python_module(
            "fedamole.deployment.gateway.process",
            host=self.listen.host,
            port=self.listen.port,
            superlink=f"{LOOPBACK}:{self.port}",
            certificate=certs / "server.crt",
            key=certs / "server.key",
            ca=ca,
            nodes=certs / "nodes",
            superlink_token=tokens / GATEWAY,
        )
        return Process("gateway", arguments, self.env, self.own / "gateway.log")

    def run(self, stop: threading.Event) -> None:
        """Run to completion, restarting processes that end; raises the errors of the run."""
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
            address = f"{self.listen.host}:{self.listen.port}"
            self.print_line(f"waiting for clients at {address}: {', '.join(self.config.deployment.clients)}")
            while not stop.is_set():
                self._restart_exited()
                self._sync_keys()
                self._forward_progress()
                if self._is_finished():
                    return
                stop.wait(CHECK_S)
            self.print_line(
                f"stopping; continue from the last finished round with `fedamole server --resume {self.folder}`"
            )
        except TimeoutError as error:
            raise RunError(f"{error}\nThe logs are in {self.own}") from error
        finally:
            for process in reversed(self.processes):
                process.stop()
            self._wait_for_run_process()

    def _reset_outcome(self) -> None:
        """Delete the previous outcome, and read progress only from here on."""
        (self.own / OUTCOME).unlink(missing_ok=True)
        progress = self.own / PROGRESS
        self._read_bytes = progress.stat().st_size if progress.exists() else 0

    def _wait_for_previous_server(self) -> None:
        """Wait until the processes of a recently killed server have released the port and the run."""
        wait_for_free_port(self.listen.host, self.listen.port, SHUTDOWN_S)
        self._wait_for_run_process()

    def _wait_for_run_process(self) -> None:
        """Wait until the previous process of the run has ended; it ends with its executor but locks the run."""
        end = time.monotonic() + SHUTDOWN_S
        path = self.own / PROGRESS
        lines = path.read_bytes().splitlines() if path.exists() else []
        pid = next((line["pid"] for line in _parse_lines(reversed(lines)) if line["what"] == "started"), 0)
        while pid and alive(pid) and time.monotonic() < end:
            time.sleep(CHECK_S)

    def _sync_keys(self) -> None:
        """Register the currently admitted keys of this run's clients at the SuperLink, and unregister all others.

        The gateway refuses a removed key at once; this also frees the client's name at the SuperLink.
        """
        now = time.monotonic()
        if self.listen.certs is None or now < self._next_key_check:
            return
        self._next_key_check = now + KEY_CHECK_S
        try:
            admitted = admitted_keys(self.listen.certs)
        except ConfigError as error:
            if self._registered_keys is None:
                raise
            if str(error) != self._key_error:
                self._key_error = str(error)
                self.print_line(f"{error}; until this is fixed, the run continues with the current keys")
            return
        expected = {name: public_pem(admitted[name].key) for name in self.config.deployment.clients if name in admitted}
        if expected == self._registered_keys:
            return
        registered = self.control.nodes()
        for node, (name, key) in registered.items():
            if expected.get(name) != key:
                self.control.unregister(node)
                self.print_line(f"the old key of {name} is refused from now on")
        for name, key in expected.items():
            if (name, key) not in registered.values():
                self._register_key(name, key)
        self._registered_keys = expected

    def _register_key(self, name: str, key: bytes) -> None:
        try:
            self.control.register(name, key)
        except RunError as error:
            if self._registered_keys is None:
                raise
            self.print_line(f"{error}; a key removed from a run cannot be used in it again: {name} needs a new one")

    def _submit(self) -> None:
        """Start the run's process, for the first time or again from its last finished round."""
        ticket = secrets.token_hex(8)
        write_atomic(self.own / TICKET, ticket)
        key = "" if self.listen.certs is None else str(self.listen.certs.resolve() / "coordinator.key")
        self.control.start_run({"folder": str(self.folder), "ticket": ticket, "order_key": key})
        self._submitted, self._pid = time.monotonic(), 0
        self._submissions += 1

    def _restart_exited(self) -> None:
        """Restart processes that have ended, and rotate large logs."""
        if time.monotonic() > self._next_log_check:
            self._next_log_check = time.monotonic() + LOG_CHECK_S
            for process in self.processes:
                process.rotate_log()
        for process in self.processes:
            if process.running:
                continue
            if process.starts - self._starts_at_last_round.get(process.name, 0) > MAX_ATTEMPTS:
                raise RunError(f"the {process.name} keeps failing:\n{process.tail(1500)}")
            self.print_line(f"the {process.name} has stopped; restarting it")
            process.start()
            if process is self.superlink:
                wait_for_port(self.port, self.superlink)

    def _forward_progress(self) -> None:
        """Pass new progress events on."""
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
        """Return whether the run is complete; resubmit a run whose process has disappeared."""
        outcome = self.own / OUTCOME
        if outcome.exists():
            self._forward_progress()
            result = json.loads(outcome.read_text(encoding="utf-8"))
            if result["error"] is None:
                return True
            error = FedamoleError(result["error"])
            error.exit_code = result["exit_code"]
            raise error
        waited = time.monotonic() - self._submitted
        is_missing = not alive(self._pid) if self._pid else waited > SUBMIT_TIMEOUT_S
        if is_missing:
            if self._submissions > MAX_ATTEMPTS:
                raise RunError(f"the run's process keeps failing:\n{self.executor.tail(2000)}")
            self.print_line("the run's process has stopped; restarting it from the last finished round")
            self._submit()
        return False


def _parse_lines(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Parse progress lines; a partial line left by a killed process is skipped."""
    for line in lines:
        with suppress(ValueError):
            yield json.loads(line)


def move_base(folder: Path, base: str) -> None:
    """Record the new location of the base of a server's run (see `record_base`); RunError if it has not started."""
    if not finished(folder) and not (folder / RUN).exists():
        raise RunError(f"{folder}: the run has not started yet; start a new run with base.model={base}")
    record_base(RunFolder.open(folder), base)


def finished(folder: Path) -> bool:
    """Return whether a run is complete; RunError if the folder is not a run of `fedamole server`."""
    if not (folder / SERVER / SETTINGS).exists():
        raise RunError(f"{folder} is not a run of `fedamole server`: {SERVER}/{SETTINGS} is missing")
    return (folder / RUN).exists() and RunFolder.open(folder).finished
