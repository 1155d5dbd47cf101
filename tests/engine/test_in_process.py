"""Clients in groups: who trains with whom changes no result, and memory that runs out makes groups smaller."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamole.engine.in_process import InProcess
from fedamole.errors import FedamoleError
from fedamole.experiment import prepare, rows_of
from fedamole.federation.loop import Watcher
from fedamole.federation.method import Client, Server, Trained
from fedamole.federation.record import Nothing, pack, unpack
from fedamole.federation.run_folder import RunFolder
from fedamole.federation.worker import Worker
from fedamole.methods.fedit import FedIT, GlobalLora
from fedamole.model.bank import Bank
from fedamole.model.params import Adapter


@pytest.mark.parametrize("method", ["fedamole", "fedit", "local_only"])
def test_the_group_changes_no_result(method: str, runs: Any, facts: Any) -> None:
    """Whole runs of three rounds in float32: metrics agree to rounding, the assignment exactly."""
    found = [facts(runs(method, f"run.group={group}")) for group in (1, 3, 4)]
    for other in found[1:]:
        assert len(other) == len(found[0])
        for mine, theirs in zip(other, found[0], strict=True):
            assert mine.keys() == theirs.keys()
            for key in mine.keys() - {"group"}:
                if key == "loss":
                    assert mine[key] == pytest.approx(theirs[key], abs=2e-3)
                elif key in ("round", "client", "split", "steps", "method"):
                    assert mine[key] == theirs[key]
    who_holds_what = [(runs(method, f"run.group={group}") / "assignment.jsonl") for group in (1, 3, 4)]
    if method == "fedamole":
        lines = [[json.loads(line) for line in path.open()] for path in who_holds_what]
        for group in lines:
            assert [(line["client"], line["experts"]) for line in group] == [
                (line["client"], line["experts"]) for line in lines[0]
            ]


class Diary(Watcher):
    """Writes down who trained with whom."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []

    def group_started(self, round_: int, names: Sequence[str]) -> None:
        self.groups.append(list(names))


def engine(runs: Any, folder: Path, method: Any, group: int) -> tuple[InProcess, dict[str, bytes], Diary]:
    config = replace(runs.load("fedit"), method=method)
    prepared = prepare(config)
    run = RunFolder.create(folder, "", "", "fedit", prepared.base.identity)
    worker = Worker(Bank(prepared.base), method, rows_of(config), config.training, config.evaluation, run, 0)
    diary = Diary()
    clients = InProcess(worker, prepared.clients, diary, group)
    state = method.init(Server(prepared.base.shapes, clients.clients, 0))
    return clients, {info.name: pack(method.message(state, info)) for info in clients.clients}, diary


def tensors(payload: bytes | None) -> dict[str, torch.Tensor]:
    assert payload is not None
    return dict(unpack(GlobalLora, payload).tensors)


SMALL = FedIT(rank=2, alpha=4.0)


@pytest.mark.parametrize(("group", "sizes"), [(1, [1, 1, 1, 1]), (3, [3, 1]), (9, [4])])
def test_groups_hold_every_client_once(group: int, sizes: list[int], runs: Any, tmp_path: Path) -> None:
    clients, messages, diary = engine(runs, tmp_path / "run", SMALL, group)
    answers = clients.update(0, messages)
    assert [len(names) for names in diary.groups] == sizes
    assert sorted(name for names in diary.groups for name in names) == sorted(answers) == sorted(messages)
    assert [answer.report["group"] for answer in answers.values()] == [size for size in sizes for _ in range(size)]


@dataclass(frozen=True)
class Twice(FedIT):
    """A method with local work of its own: it trains, and trains again from there."""

    def update(self, client: Client, kept: Nothing, message: GlobalLora) -> tuple[Nothing, GlobalLora, Trained]:
        first = client.fit(Adapter(self.spec(), message.tensors))
        second = client.fit(first.adapter)
        return (*self.reply(client, kept, message, second), second)


def test_a_method_with_its_own_update_works_one_client_at_a_time(runs: Any, tmp_path: Path) -> None:
    """In any group the result is the same to the bit, and it is FedIT's from where FedIT got to."""
    found = []
    for group in (1, 4):
        clients, messages, _ = engine(runs, tmp_path / f"run{group}", Twice(rank=2, alpha=4.0), group)
        answers = clients.update(0, messages)
        assert all(answer.report["group"] == 1 for answer in answers.values())
        found.append({name: answer.payload for name, answer in answers.items()})
    assert found[0] == found[1]
    once, messages, _ = engine(runs, tmp_path / "once", SMALL, 1)
    first = once.update(0, messages)
    again = once.update(0, {name: pack(GlobalLora(tensors(answer.payload))) for name, answer in first.items()})
    for name, answer in again.items():
        wanted = tensors(answer.payload)
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in tensors(found[0][name]).items())


def test_clients_without_an_adapter_are_scored_on_the_bare_base(runs: Any, tmp_path: Path) -> None:
    """Before any round nobody has a model of his own: a group of bare bases, beside the bare row itself."""
    clients, messages, _ = engine(runs, tmp_path / "run", replace(SMALL), 4)
    clients.worker.rows = {"fedit": "trained"}
    clients.update(0, {name: message for name, message in messages.items() if name in ("chat", "mood")})
    scores = clients.evaluate(0, "fedit", dict.fromkeys(messages))
    bare = clients.bare("validation")
    for name in messages:
        assert (scores[name]["loss"] == pytest.approx(bare[name]["loss"], abs=1e-6)) == (name in ("entail", "plain"))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_where_memory_runs_out_groups_are_halved(
    error: RuntimeError, runs: Any, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    wanted, messages, _ = engine(runs, tmp_path / "wanted", SMALL, 1)
    clients, _, _ = engine(runs, tmp_path / "run", SMALL, 4)
    load = clients.worker.bank.load

    def tight(adapters: Sequence[Adapter]) -> None:
        if len(adapters) > 1:
            raise error
        load(adapters)

    monkeypatch.setattr(clients.worker.bank, "load", tight)
    with caplog.at_level(logging.WARNING):
        answers = clients.update(0, messages)
    assert {name: answer.payload for name, answer in answers.items()} == {
        name: answer.payload for name, answer in wanted.update(0, messages).items()
    }
    assert clients.group == 1
    assert "out of memory with 4 clients at once, going on with 2" in caplog.text
    assert "out of memory with 2 clients at once, going on with 1" in caplog.text

    def none(_: Sequence[Adapter]) -> None:
        raise error

    monkeypatch.setattr(clients.worker.bank, "load", none)
    with pytest.raises(FedamoleError, match=r"one client at a time \(chat\): lower training.batch_size"):
        clients.bare("test")
