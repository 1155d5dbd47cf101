"""A link whose clients are functions: tests a server without models, data or network."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedamole.engine.messages import EVALUATE, JOIN, UPDATE, Reply, Request, read_request
from fedamole.engine.remote import Remote
from fedamole.federation.loop import Loop
from fedamole.federation.method import BaseInfo, Evaluates, Server
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import bytes_as_tensor, pack, tensor_as_bytes, unpack
from fedamole.federation.settings import DeploymentSettings, FederationSettings
from fedamole.methods.fedit import FedIT
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.runs.identity import Identity
from fedamole.runs.run_files import BASE, MAJORITY
from fedamole.runs.run_folder import RunFolder

IDENTITY = Identity("w", "t", "s")
SHAPES = {"m": (4, 3)}
EXAMPLES = {"train": 9, "embedding": 1, "validation": 1, "test": 1}
NAMES = ("ann", "bob", "eve")
Answers = Callable[[str, Request], bytes | str | None]


def honest_reply(name: str, request: Request) -> Reply:
    """The reply of a client without a model: it sends back what it received."""
    about = (request.run, request.round, request.operation, name)
    loss = {"loss": 2.0 - request.round / 10}
    if request.operation == JOIN:
        report: dict[str, Any] = {"examples": EXAMPLES, "base": asdict(IDENTITY), "device": "cpu"}
        return Reply(*about, report=report, scores={BASE: {"loss": 3.0}})
    if request.operation == UPDATE:
        message = unpack(SharedTensors, tensor_as_bytes(request.message) or b"")
        tensors = {key: tensor + 1 + ord(name[0]) / 100 for key, tensor in message.tensors.items()}
        report = {"loss": 1.0, "steps": 3, "seconds": 0.1, "group": 1, "peak_memory_mib": 4.0}
        return Reply(
            *about, report=report, scores={"fedit_ft": loss}, reply=bytes_as_tensor(pack(SharedTensors(tensors)))
        )
    if request.operation == EVALUATE:
        return Reply(*about, scores={"fedit": loss})
    rows = [f"{row}/{which}" for row in ("fedit", "fedit_ft") for which in ("best", "last")]
    scores = {row: {"loss": 1.0, "score": 50.0, "rouge_l": 50.0} for row in [*rows, BASE]}
    return Reply(*about, scores={**scores, MAJORITY: {"score": 10.0}})


@dataclass
class FakeLink:
    """A link whose clients are functions; `answers` can replace the behaviour of "eve"."""

    answers: Answers = lambda name, request: pack(honest_reply(name, request))
    registered: dict[int, str] = field(default_factory=lambda: dict(enumerate(NAMES)))
    asked: list[tuple[int, Request]] = field(default_factory=list)
    waiting: dict[str, bytes | str] = field(default_factory=dict)

    def nodes(self) -> Mapping[int, str]:
        return self.registered

    def send(self, node: int, payload: bytes, round_: int, seconds: float) -> str:
        ticket, request = f"t{len(self.asked)}", read_request(payload)
        self.asked.append((node, request))
        answer = self.answers(self.registered[node] or "eve", request)
        if answer is not None:
            self.waiting[ticket] = answer
        return ticket

    def receive(self, tickets: Collection[str]) -> Mapping[str, bytes | str]:
        return {ticket: self.waiting.pop(ticket) for ticket in tickets if ticket in self.waiting}

    def count(self, operation: str) -> int:
        return sum(request.operation == operation for _, request in self.asked)


def engine(link: FakeLink, listener: ProgressListener | None = None, **settings: Any) -> Remote:
    deployed = DeploymentSettings(
        NAMES, **{"min_clients": 2, "deadline": 0.1, "max_wait": 0.2, "gathering": 0.0, **settings}
    )
    tables = {"identity": asdict(IDENTITY), "config": {"evaluation": {"select": "loss"}}}
    rows: dict[str, Evaluates] = {"fedit": "post_aggregation", "fedit_ft": "pre_aggregation"}
    server = Server(BaseInfo(SHAPES, 4), (), 0)
    return Remote(link, FedIT(rank=2), rows, server, "run1", tables, deployed, listener or ProgressListener())


def run(folder: Path, link: FakeLink, rounds: int = 1) -> dict[str, Any]:
    """Run over a link; return its variants, the server's states, the clients left out and the scores."""
    there = engine(link)
    run_folder = RunFolder.create(folder, "", "{}", "fedit", IDENTITY, "server", "run1")
    loop = Loop(
        FedIT(rank=2, weighting="examples"),
        there.variants,
        there,
        there.server,
        FederationSettings(rounds),
        run_folder,
        select="loss",
        listener=ProgressListener(),
    )
    summary = loop.run()
    lines = [json.loads(line, parse_constant=_refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    states = [path.read_bytes() for path in sorted(folder.glob("checkpoints/*.safetensors"))]
    left_out = [(line["client"], line["round"]) for line in lines if "failed" in line]
    scored = [(line["client"], line["round"], line["method"]) for line in lines if line["split"] == "validation"]
    return {"rows": summary["rows"], "states": states, "left_out": left_out, "scored": scored}


def _refuse(text: str) -> None:
    raise AssertionError(f"metrics.jsonl holds {text}, which is no JSON")
