"""A link without a network: real hosts with data, base and disk of their own, in this process."""

import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedamole.config import build, load_config
from fedamole.data.settings import SourceSettings
from fedamole.deployment.client_handler import ClientHandler
from fedamole.deployment.run_session import ClientSettings
from fedamole.deployment.security.policy import UNBOUNDED
from fedamole.deployment.shared_config import shared_tables
from fedamole.engine.in_process import InProcess
from fedamole.engine.messages import Request, read_request
from fedamole.engine.remote import Remote
from fedamole.experiment import loop_of, prepare, resolved, rows_of, server_of, worker_of
from fedamole.federation.progress import ProgressListener
from fedamole.federation.worker import Scores, UpdateResult
from fedamole.model.bank import Bank
from fedamole.model.base import load_base
from fedamole.runs.run_folder import RunFolder

Names = Collection[str]


class Killed(BaseException):
    """The end of a client's worker in the midst of its work: nothing of it goes on, its folder stays."""


class Calendar(ProgressListener):
    """Counts rounds, says who is away in which, and can stop the run where a test wants it."""

    def __init__(self, away: Mapping[int, Names] | None = None, stop: Callable[[str, int], None] | None = None) -> None:
        self.plan, self.stop, self.round, self.told = away or {}, stop or (lambda what, nth: None), 0, dict[str, int]()
        self.waiting: list[int] = []

    @property
    def away(self) -> Names:
        return self.plan.get(self.round, ())

    def _note(self, what: str) -> None:
        self.told[what] = self.told.get(what, 0) + 1
        self.stop(what, self.told[what])

    def present(self, names: Names, waiting_for: int) -> None:
        self.waiting.append(waiting_for)

    def client_done(self, round_: int, name: str, report: Mapping[str, Any]) -> None:
        self._note("client_done")

    def stage(self, text: str) -> None:
        self._note("stage")

    def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
        self.round = round_ + 1
        self._note("round_done")


@dataclass
class Direct:
    """Nodes are hosts; what comes before and after their work can be meddled with."""

    hosts: dict[int, ClientHandler]
    registered: dict[int, str]
    calendar: Calendar = field(default_factory=Calendar)
    before: Callable[[str, Request], None] = lambda name, request: None
    """Called before a host sees a request; what it raises befalls the worker."""
    meddle: Callable[[str, Request, bytes], bytes | str | None] = lambda name, request, answer: answer
    """Of name, request and answer: the answer that arrives, a failure, or None for never."""
    asked: list[tuple[str, Request]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting: dict[str, bytes | str] = {}

    def node(self, name: str) -> int:
        return next(node for node, other in self.registered.items() if other == name)

    def nodes(self) -> Mapping[int, str]:
        return {node: name for node, name in self.registered.items() if name not in self.calendar.away}

    def restart(self, name: str) -> ClientHandler:
        """Another process with the same settings; the operating system has let go of the old one's lock."""
        node = self.node(name)
        old = self.hosts[node]
        if old.session is not None:
            old.session.lock.close()
        self.hosts[node] = ClientHandler(old.settings, old.listener)
        return self.hosts[node]

    def send(self, node: int, payload: bytes, round_: int, seconds: float) -> str:
        ticket, name, request = f"ticket-{len(self.asked)}", self.registered[node], read_request(payload)
        self.asked.append((name, request))
        try:
            self.before(name, request)
            answer = self.meddle(name, request, self.hosts[node].answer(payload))
        except Killed:
            self.restart(name)
            answer = "worker"
        if answer is not None:
            self.waiting[ticket] = answer
        return ticket

    def receive(self, tickets: Collection[str]) -> Mapping[str, bytes | str]:
        return {ticket: self.waiting.pop(ticket) for ticket in tickets if ticket in self.waiting}


@dataclass
class Town:
    """A server and its clients, made from a config that could as well run in one process."""

    folder: Path
    config: Any
    link: Direct

    @property
    def server_folder(self) -> Path:
        return self.folder / "server-run"

    def client_folder(self, name: str) -> Path:
        """What a client has on its disk: its own part of its own run folder, the newest where there are several."""
        return max((self.folder / name).glob(f"*/clients/{name}"), key=lambda path: (len(str(path)), str(path)))

    def engine(self, run: str, listener: ProgressListener) -> Remote:
        config, base = self.config, load_base(self.config.base, torch.device("cpu"), Path.cwd())
        self.identity = base.identity
        self.server = server_of(config, base)
        tables = shared_tables(config, base.identity)
        return Remote(self.link, config.method, rows_of(config), self.server, run, tables, config.deployment, listener)

    def run(self, resumed: bool = False, calendar: Calendar | None = None) -> dict[str, Any]:
        config, self.link.calendar = self.config, calendar or Calendar()
        run = RunFolder.open(self.server_folder).about["id"] if resumed else "a1b2"
        engine = self.engine(run, self.link.calendar)
        if resumed:
            folder = RunFolder.open(self.server_folder)
        else:
            folder = RunFolder.create(
                self.server_folder, "", '{"clients": {}}', config.method_name, self.identity, "server", run
            )
        return loop_of(config, engine, self.server, folder, self.link.calendar).run()


def town(config_file: Path, folder: Path, *overrides: str) -> Town:
    """One host per source of a config; all sources must be whole clients."""
    tables = tomllib.loads(config_file.read_text())
    sources = [
        build(SourceSettings, {**source, "path": str(config_file.parent / source["path"])}, "source")
        for source in tables["data"]["source"]
    ]
    names = [source.name for source in sources]
    roster = f"deployment.clients={names}".replace("'", '"')
    config = load_config(config_file, [roster, "deployment.gathering=0", "deployment.patience=5", *overrides])
    hosts = {
        10 + place: ClientHandler(
            ClientSettings(
                source,
                folder=str(folder / source.name),
                base=config.base.model,
                device="cpu",
                threads=1,
                policy=UNBOUNDED,
            ),
            ProgressListener(),
        )
        for place, source in enumerate(sources)
    }
    return Town(folder, config, Direct(hosts, {10 + place: name for place, name in enumerate(names)}))


class Scripted(InProcess):
    """All clients in one process, of whom some are away in some rounds, and some give no answer in some."""

    def expect(self, calendar: Calendar, lost: Mapping[int, Names]) -> None:
        self.calendar, self.lost = calendar, lost

    def wait_for_clients(self) -> list[str]:
        return [name for name in sorted(self.data) if name not in self.calendar.away]

    def update(self, round_: int, messages: Mapping[str, bytes]) -> dict[str, UpdateResult]:
        return super().update(round_, {n: messages[n] for n in messages if n not in self.lost.get(round_, ())})

    def evaluate(self, round_: int, row: str, messages: Mapping[str, bytes | None]) -> dict[str, Scores]:
        return super().evaluate(round_, row, {n: messages[n] for n in messages if n not in self.calendar.away})


def in_one_process(
    config: Any, path: Path, away: Mapping[int, Names] | None = None, lost: Mapping[int, Names] | None = None
) -> Path:
    """The same run without a wire; returns its folder."""
    config, calendar = resolved(config, path), Calendar(away)
    prepared = prepare(config)
    base = prepared.base
    folder = RunFolder.create(path, "", prepared.federation.manifest.to_json(), config.method_name, base.identity)
    engine = Scripted(worker_of(config, Bank(base), folder), prepared.clients, calendar, 1)
    engine.expect(calendar, lost or {})
    loop_of(config, engine, server_of(config, base, engine.clients), folder, calendar).run()
    return path
