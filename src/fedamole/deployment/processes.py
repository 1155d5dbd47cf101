"""Child processes: start, monitor, restart, and stop them with this process."""

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from fedamole.deployment.log_files import rotate

OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
    "PYTHONUNBUFFERED": "1",
}
"""Environment of Flower's processes: no telemetry, no update check, no package installation, short polling interval."""

LOOPBACK = "127.0.0.1"
PrintLine = Callable[[str], None]
"""Prints one line for the user."""
PRIVATE_UMASK = 0o077
"""Umask of a deployment's processes: only this user can read the files they write."""
_PR_SET_PDEATHSIG = 1


def without_proxy() -> dict[str, str]:
    """Return environment variables that exclude this machine from the proxy in HTTPS_PROXY."""
    configured = [os.environ[name] for name in ("NO_PROXY", "no_proxy") if os.environ.get(name)]
    hosts = ",".join([*configured, LOOPBACK, "localhost", "::1"])
    return {"NO_PROXY": hosts, "no_proxy": hosts}


def environment(home: Path) -> dict[str, str]:
    """Return the environment of child processes: Flower's home and settings, and no proxy for loopback."""
    return {**os.environ, **OFFLINE, **without_proxy(), "FLWR_HOME": str(home)}


def command(name: str) -> str:
    """Return the path of a command installed next to this Python."""
    return str(Path(sys.executable).parent / name)


def alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def die_with_parent() -> None:
    """Make the kernel end this process when its parent ends for any reason (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def wait_for_free_port(host: str, port: int, seconds: float) -> None:
    """Wait until a port of this machine is free; TimeoutError if it is still in use after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_server((host, port)).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise TimeoutError(f"port {port} of {host} cannot be used: {error.strerror}") from error
        time.sleep(0.1)


def secret_file(path: Path) -> Path:
    """Write a new random secret to a file that only this user can read."""
    return private_file(path, secrets.token_hex(32))


def private_file(path: Path, content: str) -> Path:
    """Write a file that only this user can read, replacing an existing one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(content)
    return path


def wait_for_port(port: int, process: "Process", seconds: float = 60.0) -> None:
    """Wait until a process listens on a loopback port; TimeoutError if it does not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.running:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex((LOOPBACK, port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"{process.name} does not listen on port {port}:\n{process.tail()}")


class Process:
    """A child process with its own log file."""

    def __init__(self, name: str, arguments: Sequence[str], env: Mapping[str, str], log: Path | None) -> None:
        """Describe a process; without a log it inherits this process's output."""
        self.name, self.arguments, self.env, self.log = name, list(arguments), dict(env), log
        self.starts = 0
        self._begin = 0
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> "Process":
        """Start the process, for the first time or again."""
        self.starts += 1
        if self.log is None:
            self._child = subprocess.Popen(
                self.arguments, env=self.env, stdin=subprocess.DEVNULL, preexec_fn=_prepare_child
            )
            return self
        self.log.parent.mkdir(parents=True, exist_ok=True)
        rotate(self.log)
        self._begin = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as out:
            self._child = subprocess.Popen(
                self.arguments,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                preexec_fn=_prepare_child,
            )
        return self

    def rotate_log(self) -> None:
        """Rotate a large log while the process keeps writing."""
        if self.log is not None and rotate(self.log):
            self._begin = 0

    @property
    def running(self) -> bool:
        """Whether the process is running."""
        return self._child is not None and self._child.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Exit code; None while it runs and before its start."""
        return None if self._child is None else self._child.poll()

    @property
    def pid(self) -> int:
        """Process id; 0 before the start."""
        return 0 if self._child is None else self._child.pid

    def stop(self, seconds: float = 10.0) -> None:
        """Terminate the process, and kill it after `seconds`."""
        if self._child is None:
            return
        if self.running:
            self._child.terminate()
        try:
            self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def tail(self, characters: int = 4000) -> str:
        """Return the end of the output since the last start."""
        if self.log is None or not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(self._begin, self.log.stat().st_size - characters))
            return file.read().decode(errors="replace")


def _prepare_child() -> None:
    """In the child: create a process group, so that the parent handles Ctrl-C, and make new files private."""
    os.setpgid(0, 0)
    os.umask(PRIVATE_UMASK)
    die_with_parent()
