"""A client whose replies are changed on their way out, in a run in one process."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedamole.engine.in_process import InProcess
from fedamole.experiment import loop_of, prepare, server_of, worker_of
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import named_tensors, pack, unpack
from fedamole.federation.robust import with_tensors
from fedamole.federation.worker import UpdateResult
from fedamole.model.bank import Bank
from fedamole.runs.run_folder import RunFolder

LIAR = "weather_coast"


def poison(tensors: Mapping[str, Tensor], norm: float = 9000.0) -> dict[str, Tensor]:
    """Random numbers of one norm in all tensors together."""
    generator = torch.Generator().manual_seed(1)
    drawn = {key: torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items()}
    total = sum(float(tensor.double().square().sum()) for tensor in drawn.values()) ** 0.5
    return {key: tensor * (norm / total) for key, tensor in drawn.items()}


KINDS: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "poison": poison,
    "flip": lambda tensors: {key: -10 * tensor for key, tensor in tensors.items()},
    "zero": lambda tensors: {key: torch.zeros_like(tensor) for key, tensor in tensors.items()},
}
"""What the liar sends in place of what it trained."""


class Attacked(InProcess):
    """All clients in one process, one of which lies about its update, or (kind "absent") sends none."""

    def lie(self, kind: str, record: Any) -> None:
        self.kind, self.record = kind, record

    def update(self, round_: int, messages: Mapping[str, bytes], exchange: int = 0) -> dict[str, UpdateResult]:
        answers = super().update(round_, messages, exchange)
        if self.kind == "absent":
            del answers[LIAR]
        elif self.kind != "honest":
            reply = unpack(self.record, answers[LIAR].payload or b"")
            spoilt = with_tensors(reply, KINDS[self.kind](named_tensors(reply)))
            answers[LIAR] = replace(answers[LIAR], payload=pack(spoilt))
        return answers


def attacked(config: Any, path: Path, kind: str) -> Path:
    """Run a config in one process with a liar; return the run's folder."""
    prepared = prepare(config)
    base = prepared.base
    folder = RunFolder.create(path, "", "{}", config.method_name, base.identity)
    engine = Attacked(worker_of(config, Bank(base), folder), prepared.clients, ProgressListener(), 4)
    engine.lie(kind, config.method.records.reply)
    loop_of(config, engine, server_of(config, base, engine.clients), folder, ProgressListener()).run()
    return path


def loss_of_others(folder: Path, row: str) -> float:
    """Mean validation loss after the last round of all clients but the liar."""
    last = {
        line["client"]: line["loss"]
        for line in RunFolder(folder).lines("metrics.jsonl")
        if line["split"] == "validation" and line["method"] == row
    }
    return float(sum(loss for name, loss in last.items() if name != LIAR) / (len(last) - 1))
