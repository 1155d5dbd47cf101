"""A deployment of real processes on loopback for failure tests: servers, clients, a network that can be cut.

Every process carries a mark in its environment, which its children inherit: so that all of them can be found, and
ended, whatever has become of their parents.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from fedamole.config import build, load_config, plain
from fedamole.data.settings import SourceSettings
from fedamole.deployment.processes import LOOPBACK, free_port
from fedamole.deployment.security.policy import UNBOUNDED
from fedamole.experiment import settled
from tests.conftest import heeding_interrupts, small

MARK = "FEDAMOLE_TEST_MARK"
FEDAMOLE = Path(sys.executable).parent / "fedamole"
LIAR = Path(__file__).parent / "dishonest_client.py"
NAMES = ("chat", "entail", "mood")
ENDLESS = 1000
"""Number of rounds of a run that the test stops."""


def marked(mark: str) -> list[psutil.Process]:
    """Running processes with a mark."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(mark) and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
        except (psutil.Error, OSError):
            continue
    return processes


def wait_until(true: Callable[[], Any], seconds: float, what: str, describe: Callable[[], str] = str) -> Any:
    """Wait until a condition is true and return its value; AssertionError, with the text of `told`, after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := true():
            return value
        time.sleep(0.1)
    raise AssertionError(f"after {seconds:.0f} s still not: {what}\n{describe()}")


class Command:
    """A running `fedamole` command with all its child processes."""

    def __init__(self, arguments: Sequence[str], output: Path, mark: str, **env: str) -> None:
        self.mark, self.output = f"{mark}-{uuid.uuid4().hex[:6]}", output
        with output.open("ab") as out:
            self.process = subprocess.Popen(
                list(arguments),
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                preexec_fn=_ready,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", MARK: self.mark, **env},
            )

    @property
    def text(self) -> str:
        """Its output."""
        return self.output.read_text(errors="replace")

    def part(self, sign: str) -> psutil.Process:
        """The process of this command whose command line contains `sign`."""
        processes = [process for process in self.alive() if sign in " ".join(_words(process))]
        assert processes, f"{sign} does not run; there are {list(map(_words, self.alive()))}"
        return processes[0]

    def alive(self) -> list[psutil.Process]:
        """Its processes, including itself and orphans."""
        return marked(self.mark)

    def says(self, text: str, seconds: float) -> None:
        """Wait until its output contains a text, which may be wrapped."""
        wait_until(lambda: text in self.text, seconds, f"it writes {text!r}", lambda: self.text[-3000:])

    def interrupt(self, seconds: float = 30.0) -> int:
        """Send Ctrl-C; return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.ended(seconds)

    def ended(self, seconds: float) -> int:
        """Wait for its end; return the exit code."""
        wait_until(lambda: self.process.poll() is not None, seconds, "ended", lambda: self.text[-3000:])
        assert self.process.returncode is not None
        return self.process.returncode

    def gone(self, seconds: float = 10.0) -> None:
        """Assert that no process is left."""
        wait_until(
            lambda: not self.alive(), seconds, "gone", lambda: str([_words(process) for process in self.alive()])
        )

    def kill_all(self) -> None:
        """Kill it and all its child processes at once."""
        processes = self.alive()
        for process in processes:
            process.suspend()  # none sees another one's end
        for process in processes:
            process.kill()
        self.process.wait()


def _words(process: psutil.Process) -> list[str]:
    try:
        arguments: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return arguments


def _ready() -> None:
    heeding_interrupts()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing survives the test's process


def killed(process: psutil.Process) -> None:
    """SIGKILL."""
    process.kill()


def working(process: psutil.Process, seconds: float = 30.0) -> None:
    """Wait until a process has used half a second of CPU time from now on."""
    before = sum(process.cpu_times()[:2])
    wait_until(lambda: sum(process.cpu_times()[:2]) > before + 0.5, seconds, "the process is at work")


class Proxy:
    """A network that can be cut: passes the bytes of TCP connections on to a port of loopback, or holds them."""

    def __init__(self, port: int, host: str = LOOPBACK) -> None:
        self.target = port
        self.open = threading.Event()
        self.open.set()
        self.listener = socket.create_server((host, 0))
        self.address = f"{host}:{self.listener.getsockname()[1]}"
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        self.open.wait()
        try:
            far = socket.create_connection((LOOPBACK, self.target))
        except OSError:
            near.close()
            return
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self.open.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            for end in (source, sink):
                end.close()

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Hold all bytes during the block, and deliver them afterwards."""
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()

    def close(self) -> None:
        self.open.set()
        self.listener.close()


class Site:
    """One server, its clients, and the folder of the run."""

    def __init__(self, folder: Path, tiny: Path, *overrides: str, secure: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.tiny, self.mark = folder, tiny, uuid.uuid4().hex
        self.run, self.port = folder / "run", free_port()
        self.overrides = [*small("fedamole"), f"federation.rounds={ENDLESS}", *overrides]
        self.certs = folder / "certs" if secure else None
        self.commands: list[Command] = []
        self.proxies: list[Proxy] = []
        self.config = folder / "config.toml"
        tables = tomllib.loads((tiny / "config.toml").read_text())
        self.sources = {source["name"]: source for source in tables["data"].pop("source")}
        tables["base"]["model"] = str(tiny / "base")
        tables["deployment"] = {"clients": list(NAMES), "gathering": 60.0}
        self.config.write_text(tomli_w.dumps(tables))
        self.policy = folder / "policy.toml"
        self.policy.write_text(tomli_w.dumps(plain(UNBOUNDED)))

    def here(self) -> Any:
        """The config of a run of the same clients in one process, with the defaults of a deployment."""
        config = load_config(self.config, [*self.overrides, "run.group=1"])
        sources = tuple(
            build(SourceSettings, {**self.sources[name], "path": str(self.tiny / self.sources[name]["path"])}, "source")
            for name in NAMES
        )
        config = replace(settled(config, deployed=True), method=config.method.for_deployment())
        return replace(config, data=replace(config.data, source=sources))

    def _start(self, arguments: Sequence[str], output: str, **env: str) -> Command:
        command = Command(arguments, self.folder / output, self.mark, **env)
        self.commands.append(command)
        return command

    def server(self, resume: bool = False) -> Command:
        """`fedamole server`."""
        what = ["--resume", str(self.run)] if resume else [str(self.config), f"run.folder={self.run}", *self.overrides]
        door = ["--insecure"] if self.certs is None else ["--certs", str(self.certs)]
        return self._start([str(FEDAMOLE), "server", *what, "--port", str(self.port), *door], "server.out")

    def client(
        self,
        name: str,
        *arguments: str,
        address: str | None = None,
        certs: Path | None = None,
        folder: str = "",
        lies: bool = False,
    ) -> Command:
        """`fedamole client`; a dishonest one behaves as set by `self.lie(name, kind)`."""
        door = ["--insecure"] if self.certs is None else ["--certs", str(certs or self.certs / "clients" / name)]
        host = "localhost" if self.certs else LOOPBACK
        output = folder or f"c-{name}"
        start = [sys.executable, str(LIAR), "client"] if lies else [str(FEDAMOLE), "client"]
        if lies:
            self.lie(name, "honest")
        source = self.sources.get(name, {"path": f"{name}.jsonl"})
        given = {"--data": str(self.tiny / source["path"]), "--base": str(self.tiny / "base")}
        given |= {"--policy": str(self.policy)}
        given |= {"--template": source["template"]} if "template" in source else {}
        given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
        options = [argument for pair in given.items() for argument in pair]
        return self._start(
            [
                *start,
                "--server",
                address or f"{host}:{self.port}",
                "--name",
                name,
                *options,
                "--folder",
                str(self.folder / output),
                "--device",
                "cpu",
                "--threads",
                "1",
                *door,
            ],
            f"{output}.out",
            LIE=str(self.folder / f"{name}.lie"),
        )

    def lie(self, name: str, kind: str) -> None:
        """Set how a dishonest client behaves from its next request on."""
        file = self.folder / f"{name}.lie"
        file.with_suffix(".new").write_text(kind)
        file.with_suffix(".new").rename(file)

    def proxy(self, host: str = LOOPBACK) -> Proxy:
        """A network between a client and this server."""
        self.proxies.append(Proxy(self.port, host))
        return self.proxies[-1]

    def events(self, what: str, since: float = 0.0, **fields: Any) -> list[dict[str, Any]]:
        """Lines of progress of a kind that have certain fields, written since a time."""
        path = self.run / "server" / "progress.jsonl"
        if not path.exists():
            return []
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [
            line for line in lines if line["what"] == what and line["time"] >= since and fields.items() <= line.items()
        ]

    def event(self, what: str, seconds: float, since: float = 0.0, **fields: Any) -> dict[str, Any]:
        """Wait for such a line, and return the first one."""
        result = wait_until(lambda: self.events(what, since, **fields), seconds, f"{what} {fields}", self.told)
        return dict(result[0])

    def trained(self, name: str, seconds: float, since: float) -> dict[str, Any]:
        """Wait until a client has trained in a round that began since then and is done."""

        def found() -> Any:
            rounds = {line["round"] for line in self.events("round", since)}
            lines = self.events("answered", since, client=name)
            return [line for line in lines if "failed" not in line and line["round"] in rounds]

        line: dict[str, Any] = wait_until(found, seconds, f"{name} trains", self.told)[0]
        self.event("done", seconds, since=line["time"], round=line["round"])
        return line

    def failed(self, name: str, seconds: float, since: float) -> dict[str, Any]:
        """Wait until a client has failed, and return that line."""

        def found() -> Any:
            return [line for line in self.events("answered", since, client=name) if "failed" in line]

        return dict(wait_until(found, seconds, f"{name} fails", self.told)[0])

    def log(self) -> str:
        """The log of the run's process as one line."""
        path = self.run / "server" / "run.log"
        return " ".join(path.read_text(errors="replace").split()) if path.exists() else ""

    def metrics(self, **fields: Any) -> list[dict[str, Any]]:
        """Lines of the run's metrics that have certain fields."""
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if fields.items() <= line.items()]

    def told(self) -> str:
        """The end of every log, for a failure message."""
        texts = [f"--- {command.output.name}: {command.text[-1500:]}" for command in self.commands]
        return "\n".join([*texts, f"--- run.log: {self.log()[-1500:]}"])

    def close(self) -> None:
        """Kill all remaining processes."""
        for proxy in self.proxies:
            proxy.close()
        for process in marked(self.mark):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        for command in self.commands:
            command.process.wait()
        wait_until(lambda: not marked(self.mark), 10, "all processes are gone")


@contextmanager
def site(folder: Path, tiny: Path, *overrides: str, secure: bool = False) -> Iterator[Site]:
    """A site that is always cleaned up."""
    created = Site(folder, tiny, *overrides, secure=secure)
    try:
        yield created
    finally:
        created.close()
