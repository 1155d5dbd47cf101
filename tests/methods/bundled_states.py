"""Rounds of a method on the bundled base and its eight clients, without any scoring."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedamole.cli.options import bundled_config
from fedamole.config import load_config
from fedamole.engine.in_process import InProcess
from fedamole.experiment import prepare, server_of, worker_of
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import pack, unpack
from fedamole.model.bank import Bank
from fedamole.runs.run_folder import RunFolder


def bundled_states(folder: Path, settings: Sequence[str], rounds: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the server's state after each round, and the replies by client; `folder` must not exist."""
    config = load_config(bundled_config("fedit"), ["run.device=cpu", "evaluation.pre_aggregation=false", *settings])
    prepared, method = prepare(config), config.method
    run = RunFolder.create(folder, "", "", "rounds", prepared.base.identity)
    engine = InProcess(worker_of(config, Bank(prepared.base), run), prepared.clients, ProgressListener(), 8)
    server = server_of(config, prepared.base, engine.clients)
    state = method.init(server)
    for round_ in range(rounds):
        answers = engine.update(round_, {info.name: pack(method.message(state, info)) for info in server.clients})
        replies = {name: unpack(method.records.reply, answer.payload or b"") for name, answer in answers.items()}
        state = method.aggregate(replace(server, round=round_), state, replies)
        yield state, replies
