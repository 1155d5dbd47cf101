"""A link without a network: real client handlers with their own data, base and disk, in this process."""

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
from fedamole.experiment import loop_of, prepare, public_rows, resolved, server_of, variants_of, worker_of
from fedamole.federation.evaluator import Scores
from fedamole.federation.progress import ProgressListener
from fedamole.federation.worker import UpdateResult
from fedamole.model.bank import Bank
from fedamole.model.base import load_base
from fedamole.runs.run_folder import RunFolder

ClientNames = Collection[str]


class Killed(BaseException):
    """Simulates the death of a client's worker during its work; its folder stays."""


class ClientSchedule(ProgressListener):
    """Counts rounds, lists absent clients by round, and can stop the run at a given event."""

    def __init__(
        self, away: Mapping[int, ClientNames] | None = None, stop: Callable[[str, int], None] | None = None
    ) -> None:
        self.plan, self.stop, self.round, self.told = away or {}, stop or (lambda what, nth: None), 0, dict[str, int]()
        self.waiting: list[int] = []

    @property
    def away(self) -> ClientNames:
        return self.plan.get(self.round, ())

    def _note(self, what: str) -> None:
        self.told[what] = self.told.get(what, 0) + 1
        self.stop(what, self.told[what])

    def present(self, names: ClientNames, waiting_for: int) -> None:
        self.waiting.append(waiting_for)

    def client_done(self, round_: int, name: str, report: Mapping[str, Any]) -> None:
        self._note("client_done")

    def stage(self, text: str) -> None:
        self._note("stage")

    def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
        self.round = round_ + 1
        self._note("round_done")


@dataclass
class DirectLink:
    """A link whose nodes are client handlers; tests can act before and after their work."""

    hosts: dict[int, ClientHandler]
    registered: dict[int, str]
    schedule: ClientSchedule = field(default_factory=ClientSchedule)
    before: Callable[[str, Request], None] = lambda name, request: None
    """Called before a handler gets a request; exceptions it raises end the worker."""
    meddle: Callable[[str, Request, bytes], bytes | str | None] = lambda name, request, answer: answer
    """Returns the reply to deliver, a failure code, or None for none."""
    asked: list[tuple[str, Request]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting: dict[str, bytes | str] = {}

    def node(self, name: str) -> int:
        return next(node for node, other in self.registered.items() if other == name)

    def nodes(self) -> Mapping[int, str]:
        return {node: name for node, name in self.registered.items() if name not in self.schedule.away}

    def restart(self, name: str) -> ClientHandler:
        """Replace a handler by a new one with the same settings, as after a restart; the lock is released."""
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
class DirectDeployment:
    """A server and its clients, built from a config that could also run in one process."""

    folder: Path
    config: Any
    link: DirectLink

    @property
    def server_folder(self) -> Path:
        return self.folder / "server-run"

    def client_folder(self, name: str) -> Path:
        """The client's part of its newest run folder."""
        return max((self.folder / name).glob(f"*/clients/{name}"), key=lambda path: (len(str(path)), str(path)))

    def engine(self, run: str, listener: ProgressListener) -> Remote:
        config, base = self.config, load_base(self.config.base, torch.device("cpu"), Path.cwd())
        self.identity = base.identity
        bank, public = Bank(base) if config.method.trains_at_server else None, public_rows(config, base, None)
        self.server = server_of(config, base, (), bank, () if public is None else public.rows)
        tables = shared_tables(config, base.identity)
        return Remote(
            self.link, config.method, variants_of(config), self.server, run, tables, config.deployment, listener
        )

    def run(self, resumed: bool = False, schedule: ClientSchedule | None = None) -> dict[str, Any]:
        config, self.link.schedule = self.config, schedule or ClientSchedule()
        run = RunFolder.open(self.server_folder).about["id"] if resumed else "a1b2"
        engine = self.engine(run, self.link.schedule)
        if resumed:
            folder = RunFolder.open(self.server_folder)
        else:
            folder = RunFolder.create(
                self.server_folder, "", '{"clients": {}}', config.method_name, self.identity, "server", run
            )
        return loop_of(config, engine, self.server, folder, self.link.schedule).run()


def direct_deployment(config_file: Path, folder: Path, *overrides: str) -> DirectDeployment:
    """One client handler per source of a config; every source must be a whole client."""
    tables = tomllib.loads(config_file.read_text())
    sources = [
        build(SourceSettings, {**source, "path": str(config_file.parent / source["path"])}, "source")
        for source in tables["data"]["source"]
    ]
    names = [source.name for source in sources]
    roster = f"deployment.clients={names}".replace("'", '"')
    config = load_config(config_file, [roster, "deployment.gathering=0", "deployment.max_wait=5", *overrides])
    hosts = {
        10 + index: ClientHandler(
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
        for index, source in enumerate(sources)
    }
    return DirectDeployment(folder, config, DirectLink(hosts, {10 + index: name for index, name in enumerate(names)}))


class ScheduledInProcess(InProcess):
    """All clients in one process, with absences and lost replies by round."""

    def expect(self, schedule: ClientSchedule, lost: Mapping[int, ClientNames]) -> None:
        self.schedule, self.lost = schedule, lost

    def wait_for_clients(self) -> list[str]:
        return [name for name in sorted(self.data) if name not in self.schedule.away]

    def update(self, round_: int, messages: Mapping[str, bytes], exchange: int = 0) -> dict[str, UpdateResult]:
        return super().update(
            round_, {n: messages[n] for n in messages if n not in self.lost.get(round_, ())}, exchange
        )

    def evaluate(self, round_: int, row: str, messages: Mapping[str, bytes | None]) -> dict[str, Scores]:
        return super().evaluate(round_, row, {n: messages[n] for n in messages if n not in self.schedule.away})


def in_one_process(
    config: Any,
    path: Path,
    away: Mapping[int, ClientNames] | None = None,
    lost: Mapping[int, ClientNames] | None = None,
) -> Path:
    """The same run in process; returns its folder."""
    config, schedule = resolved(config, path), ClientSchedule(away)
    prepared = prepare(config)
    base = prepared.base
    folder = RunFolder.create(path, "", prepared.federation.manifest.to_json(), config.method_name, base.identity)
    engine = ScheduledInProcess(worker_of(config, Bank(base), folder), prepared.clients, schedule, 1)
    engine.expect(schedule, lost or {})
    server = server_of(config, base, engine.clients, engine.worker.bank, prepared.public)
    loop_of(config, engine, server, folder, schedule).run()
    return path
