"""Processes beside this one: started, watched, started again, and stopped with it."""

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
"""Flower asks nobody but its own parts, installs nothing, and looks for work often."""

LOOPBACK = "127.0.0.1"
PrintLine = Callable[[str], None]
"""Prints one line for the user."""
PRIVATE_UMASK = 0o077
"""The umask of a deployment's processes: what they write is read by nobody else on this machine."""
_PR_SET_PDEATHSIG = 1


def without_proxy() -> dict[str, str]:
    """Environment variables by which no call to this machine itself goes to the proxy of HTTPS_PROXY."""
    listed = [os.environ[name] for name in ("NO_PROXY", "no_proxy") if os.environ.get(name)]
    everybody = ",".join([*listed, LOOPBACK, "localhost", "::1"])
    return {"NO_PROXY": everybody, "no_proxy": everybody}


def environment(home: Path) -> dict[str, str]:
    """Environment of the processes beside this one: Flower's home and switches, and no proxy for loopback."""
    return {**os.environ, **OFFLINE, **without_proxy(), "FLWR_HOME": str(home)}


def command(name: str) -> str:
    """Path of a command that was installed beside this Python."""
    return str(Path(sys.executable).parent / name)


def alive(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends in whatever way (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        return int(found.getsockname()[1])


def wait_for_free_port(host: str, port: int, seconds: float) -> None:
    """Wait until nobody listens on a port of this machine; TimeoutError where somebody goes on."""
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
    """A file with a new secret that only this user can read."""
    return private_file(path, secrets.token_hex(32))


def private_file(path: Path, content: str) -> Path:
    """Write a file that only this user can read; one of that name is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(content)
    return path


def wait_for_port(port: int, process: "Process", seconds: float = 60.0) -> None:
    """Wait until a process listens on a port of the loopback interface; TimeoutError where it does not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.running:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex((LOOPBACK, port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"{process.name} does not listen on port {port}:\n{process.tail()}")


class Process:
    """One process with a log file of its own."""

    def __init__(self, name: str, words: Sequence[str], env: Mapping[str, str], log: Path | None) -> None:
        """Describe a process; without a log it writes where this one does."""
        self.name, self.words, self.env, self.log = name, list(words), dict(env), log
        self.starts = 0
        self._begin = 0
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> "Process":
        """Start it, for the first time or again."""
        self.starts += 1
        if self.log is None:
            self._child = subprocess.Popen(self.words, env=self.env, stdin=subprocess.DEVNULL, preexec_fn=_ready)
            return self
        self.log.parent.mkdir(parents=True, exist_ok=True)
        rotate(self.log)
        self._begin = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as out:
            self._child = subprocess.Popen(
                self.words, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=_ready
            )
        return self

    def rotate_log(self) -> None:
        """Move a log that has grown large out of the way, while the process goes on writing."""
        if self.log is not None and rotate(self.log):
            self._begin = 0

    @property
    def running(self) -> bool:
        """Whether it runs now."""
        return self._child is not None and self._child.poll() is None

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs or before its start."""
        return None if self._child is None else self._child.poll()

    @property
    def pid(self) -> int:
        """Its process id, 0 before the start."""
        return 0 if self._child is None else self._child.pid

    def stop(self, seconds: float = 10.0) -> None:
        """Ask it to end, and after a while end it."""
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
        """The end of what it has written since its last start."""
        if self.log is None or not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(self._begin, self.log.stat().st_size - characters))
            return file.read().decode(errors="replace")


def _ready() -> None:
    """In the child: a group of its own, so that Ctrl-C is for the parent to handle; files for this user's eyes only."""
    os.setpgid(0, 0)
    os.umask(PRIVATE_UMASK)
    die_with_parent()
