"""A link without a network: real hosts with data, base and disk of their own, in this process."""

import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedamole.config import build, load_config
from fedamole.data.settings import SourceSettings
from fedamole.deployment.agreement import shared_tables
from fedamole.deployment.host import ClientSettings, Host
from fedamole.engine.remote import Remote
from fedamole.experiment import rows_of
from fedamole.federation.loop import Loop, Watcher
from fedamole.federation.method import Server
from fedamole.federation.run_folder import RunFolder
from fedamole.model.base import load_base


@dataclass
class Direct:
    """Nodes are hosts; what a host answers can be changed, delayed for ever or lost on its way."""

    hosts: dict[int, Host]
    registered: dict[int, str]
    offline: set[int] = field(default_factory=set)
    meddle: Callable[[int, bytes, bytes], bytes | str | None] = lambda node, asked, answer: answer
    """Of node, request and answer: the answer that arrives, a failure, or None for never."""
    asked: list[tuple[int, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting: dict[str, bytes | str] = {}

    def nodes(self) -> Mapping[int, str]:
        return {node: self.registered[node] for node in self.hosts if node not in self.offline}

    def send(self, node: int, payload: bytes, round_: int, seconds: float) -> str:
        ticket = f"ticket-{len(self.asked)}"
        self.asked.append((node, payload))
        answer = "lost" if node in self.offline else self.meddle(node, payload, self.hosts[node].answer(payload))
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

    def run(self, resumed: bool = False) -> dict[str, Any]:
        config = self.config
        base = load_base(config.base, torch.device("cpu"), Path.cwd())
        path = self.folder / "server-run"
        if resumed:
            folder = RunFolder.open(path)
        else:
            folder = RunFolder.create(path, "", '{"clients": {}}', config.method_name, base.identity, "server")
        rows = rows_of(config)
        server = Server(base.shapes, (), config.run.seed, 0, base.width, base.embedding_std)
        self.engine = Remote(
            self.link, config.method, rows, server, folder.about["id"], shared_tables(config, base.identity),
            config.deployment, Watcher(),
        )
        loop = Loop(
            config.method, rows, self.engine, server, config.federation, folder,
            select=config.evaluation.select, watcher=Watcher(),
        )
        return loop.run()


def town(config_file: Path, folder: Path, *overrides: str) -> Town:
    """One host per source of a config; all sources must be whole clients."""
    tables = tomllib.loads(config_file.read_text())
    sources = [
        build(SourceSettings, {**source, "path": str(config_file.parent / source["path"])}, "source")
        for source in tables["data"]["source"]
    ]
    names = [source.name for source in sources]
    config = load_config(
        config_file, [f"deployment.clients={names}".replace("'", '"'), "deployment.gathering=0", "deployment.patience=5", *overrides]
    )
    hosts = {
        10 + place: Host(
            ClientSettings(source, folder=str(folder / source.name), base=config.base.model, device="cpu", threads=1),
            Watcher(),
        )
        for place, source in enumerate(sources)
    }
    return Town(folder, config, Direct(hosts, {10 + place: name for place, name in enumerate(names)}))
