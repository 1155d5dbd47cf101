"""Clients in groups: who trains with whom changes no result, and memory that runs out makes groups smaller."""

import json
import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training import lora_spec

from fedamole.engine.in_process import InProcess
from fedamole.errors import FedamoleError
from fedamole.experiment import prepare, variants_of, worker_of
from fedamole.federation.client_state import PrivateState
from fedamole.federation.local import embed
from fedamole.federation.method import BaseInfo, Client, Evaluates, Server, TrainingRequest, TrainingResult
from fedamole.federation.progress import ProgressListener
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing, named_tensors, pack, unpack
from fedamole.federation.worker import Worker
from fedamole.methods.fedamole import FedAmole, TrainedExperts
from fedamole.methods.fedit import FedIT
from fedamole.methods.local_only import LocalOnly, OwnLora
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.params import Adapter, new_shared
from fedamole.runs.run_folder import RunFolder


def assert_same(result: Any, expected: Any) -> None:
    """Equal but for the rounding of numbers, and for the group itself."""
    assert type(result) is type(expected)
    if isinstance(result, dict):
        assert result.keys() == expected.keys()
        for key in result.keys() - {"group"}:
            assert_same(result[key], expected[key])
    elif isinstance(result, list):
        for mine, theirs in zip(result, expected, strict=True):
            assert_same(mine, theirs)
    else:
        assert result == (pytest.approx(expected, abs=1e-5) if isinstance(expected, float) else expected)


def journal(folder: Path) -> list[dict[str, Any]]:
    """Who held which experts, and how relevant they were to him."""
    return [json.loads(line) for line in (folder / "assignment.jsonl").open()]


@pytest.mark.parametrize("method", ["fedamole", "fedit_ft", "local_only"])
def test_the_group_changes_no_result(method: str, runs: Any, facts: Any) -> None:
    """Whole runs of three rounds in float32: losses, scores, traffic and the assignment, who has which expert."""
    sequential = runs(method, "run.group=1")
    assert (len(journal(sequential)) > 0) == (method == "fedamole")
    for group in (3, 4):
        assert_same(facts(runs(method, f"run.group={group}")), facts(sequential))
        assert_same(journal(runs(method, f"run.group={group}")), journal(sequential))


def test_memory_that_runs_out_in_a_run_changes_nothing(runs: Any, facts: Any, monkeypatch: Any, caplog: Any) -> None:
    """A device for two clients, asked for four: found out once, and remembered in all later steps and rounds."""
    expected, original, passes = runs("fedamole", "run.group=4"), Bank.backward, list[int]()

    def backward(bank: Bank, loss: torch.Tensor) -> None:
        passes.append(len(bank.parameters()[0]))
        if passes[-1] > 2:
            raise torch.OutOfMemoryError("no")
        original(bank, loss)

    monkeypatch.setattr(Bank, "backward", backward)
    with caplog.at_level(logging.WARNING):
        folder = runs.fresh("fedamole", "run.group=4")
    assert passes == [4] + [2, 2] * 9, "nine steps: three rounds of three"
    assert caplog.text.count("out of memory") == 1
    assert "out of memory with 4 clients at once, continuing with 2" in caplog.text
    assert_same(facts(folder), facts(expected))
    assert_same(journal(folder), journal(expected))


class Diary(ProgressListener):
    """Writes down who trained with whom."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []

    def group_started(self, round_: int, names: Sequence[str]) -> None:
        self.groups.append(list(names))


def engine(
    runs: Any, folder: Path, method: Any, group: int, variants: dict[str, Evaluates] | None = None
) -> tuple[InProcess, dict[str, bytes], Diary]:
    config = replace(runs.load("fedit"), method=method)
    prepared = prepare(config)
    run = RunFolder.create(folder, "", "", "fedit", prepared.base.identity)
    variants = variants or variants_of(config)
    worker = Worker(Bank(prepared.base), method, variants, config.training, config.evaluation, run, 0)
    diary = Diary()
    clients = InProcess(worker, prepared.clients, diary, group)
    state = method.init(Server(BaseInfo(prepared.base.shapes), clients.clients, 0))
    return clients, {info.name: pack(method.message(state, info)) for info in clients.clients}, diary


def tensors(payload: bytes | None) -> dict[str, torch.Tensor]:
    assert payload is not None
    return dict(unpack(SharedTensors, payload).tensors)


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

    def update(
        self, client: Client, kept: Nothing, message: SharedTensors
    ) -> Generator[TrainingRequest, TrainingResult, Any]:
        first = yield TrainingRequest(Adapter(self.spec(), message.tensors), step_fraction=0.5)
        second = yield TrainingRequest(first.adapter, step_fraction=0.5)
        return (*self.reply(client, kept, message, second), second)


def test_a_method_with_its_own_update_trains_in_lockstep_too(runs: Any, tmp_path: Path) -> None:
    """Every piece of training is done for the whole group, the pieces of a round on batches of their own."""
    results = []
    for group in (1, 4):
        clients, messages, _ = engine(runs, tmp_path / f"run{group}", Twice(rank=2, alpha=4.0), group)
        answers = clients.update(0, messages)
        assert {answer.report["group"] for answer in answers.values()} == {group}
        assert {answer.report["steps"] for answer in answers.values()} == {clients.worker.training.local_steps}
        results.append({name: tensors(answer.payload) for name, answer in answers.items()})
    for name, mine in results[0].items():
        torch.testing.assert_close(mine, results[1][name], rtol=0, atol=1e-5)
    once, messages, _ = engine(runs, tmp_path / "once", Once(rank=2, alpha=4.0), 4)
    first = once.update(0, messages)
    again = once.update(0, {name: pack(SharedTensors(tensors(answer.payload))) for name, answer in first.items()})
    for name, answer in again.items():
        same = [torch.equal(tensor, results[1][name][key]) for key, tensor in tensors(answer.payload).items()]
        assert not all(same), "the second piece saw the batches and masks of the first again"


@dataclass(frozen=True)
class Once(FedIT):
    """Half a round."""

    def update(
        self, client: Client, kept: Nothing, message: SharedTensors
    ) -> Generator[TrainingRequest, TrainingResult, Any]:
        only = yield TrainingRequest(Adapter(self.spec(), message.tensors), step_fraction=0.5)
        return (*self.reply(client, kept, message, only), only)


def test_each_client_reads_its_own_embeddings_with_different_numbers_of_steps(runs: Any, tmp_path: Path) -> None:
    """Epochs of unequal data: the group trains in the order of steps, the replies are each client's own."""
    replies = []
    for group in (1, 4):
        config = runs.load("fedamole", "training.local_epochs=1", "training.batch_size=4", "method.experts=9")
        prepared = prepare(config)
        run = RunFolder.create(tmp_path / f"run{group}", "", "", "fedamole", prepared.base.identity)
        worker = worker_of(config, Bank(prepared.base), run)
        clients = InProcess(worker, prepared.clients, ProgressListener(), group)
        state = config.method.init(Server(BaseInfo(prepared.base.shapes), clients.clients, 0))
        messages = {info.name: pack(config.method.message(state, info)) for info in clients.clients}
        answers = clients.update(0, messages)
        steps = [answers[name].report["steps"] for name in sorted(answers)]
        assert steps != sorted(steps, reverse=True), "the order of steps is not that of names"
        replies.append({name: unpack(TrainedExperts, answer.payload or b"") for name, answer in answers.items()})
    for name, alone in replies[0].items():
        mine, theirs = named_tensors(replies[1][name]), named_tensors(alone)
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=5e-3)


@dataclass(frozen=True)
class TwoRanks(LocalOnly):
    """A method whose clients hold LoRAs of two kinds: chat and mood of rank 3, the others of rank 2."""

    def spec_of(self, client: Client) -> AdapterSpec:
        return replace(self.spec(), rank=3 if client.name in ("chat", "mood") else 2)

    def init_client_state(self, client: Client) -> OwnLora:
        rank = self.spec_of(client).rank
        return OwnLora(new_shared(client.shapes, rank, torch_generator(client.seed, "lora", client.name)))

    def adapter(self, client: Client, kept: OwnLora, message: Nothing) -> Adapter:
        return Adapter(self.spec_of(client), kept.tensors)


def test_adapters_of_different_kinds_in_one_group(runs: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Those of one kind are trained and scored together, and everybody gets his own result."""
    result, loaded = [], list[list[int]]()
    for group in (1, 4):
        clients, messages, diary = engine(runs, tmp_path / f"run{group}", TwoRanks(rank=2, alpha=4.0), group)
        bank, load = clients.worker.bank, clients.worker.bank.load
        loaded.append([])

        def counted(adapters: Any, load: Any = load) -> None:
            loaded[-1].append(len(adapters))
            load(adapters)

        monkeypatch.setattr(bank, "load", counted)
        answers = clients.update(0, messages)
        assert [len(names) for names in diary.groups] == [group] * (4 // group)
        reports = {name: {key: answer.report[key] for key in ("loss", "steps")} for name, answer in answers.items()}
        scores = clients.evaluate(0, "fedit", dict.fromkeys(messages)), clients.test("fedit", best=False)
        ranks = {}
        for name in answers:
            state = unpack(
                PrivateState, (tmp_path / f"run{group}/clients/{name}/state/round-0000.safetensors").read_bytes()
            )
            assert state.trained is not None
            ranks[name] = lora_spec(state.trained.spec).rank
        result.append([reports, *scores])
        assert ranks == {"chat": 3, "entail": 2, "mood": 3, "plain": 2}
    assert_same(result[1], result[0])
    assert len({report["loss"] for report in result[0][0].values()}) == 4
    assert (set(loaded[0]), set(loaded[1])) == ({1}, {2})


def test_clients_without_an_adapter_are_scored_on_the_bare_base(runs: Any, tmp_path: Path) -> None:
    """Before any round nobody has a model of his own: a group of bare bases, beside the bare row itself."""
    clients, messages, _ = engine(runs, tmp_path / "run", replace(SMALL), 4, {"fedit": "pre_aggregation"})
    clients.update(0, {name: message for name, message in messages.items() if name in ("chat", "mood")})
    scores = clients.evaluate(0, "fedit", dict.fromkeys(messages))
    bare = clients.score_base("validation", clients.wait_for_clients())
    for name in messages:
        assert (scores[name]["loss"] == pytest.approx(bare[name]["loss"], abs=1e-6)) == (name in ("entail", "plain"))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_where_memory_runs_out_groups_are_halved(
    error: RuntimeError, runs: Any, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    expected, messages, _ = engine(runs, tmp_path / "wanted", SMALL, 1)
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
        name: answer.payload for name, answer in expected.update(0, messages).items()
    }
    assert clients.group == 1
    assert "out of memory with 4 clients at once, continuing with 2" in caplog.text
    assert "out of memory with 2 clients at once, continuing with 1" in caplog.text

    def none(_: Sequence[Adapter]) -> None:
        raise error

    monkeypatch.setattr(clients.worker.bank, "load", none)
    with pytest.raises(FedamoleError, match=r"one client at a time \(chat\): lower training.batch_size"):
        clients.score_base("test", clients.wait_for_clients())


def test_out_of_memory_after_training_trains_no_client_twice(runs: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Reading the embedding splits of more than two clients fails, when all four are trained: as groups of two."""
    method = FedAmole(rank=2, alpha=4.0)
    expected, messages, _ = engine(runs, tmp_path / "wanted", method, 2)
    answers = expected.update(0, messages)
    clients, _, diary = engine(runs, tmp_path / "run", method, 4)

    def tight(bank: Bank, *arguments: Any) -> Any:
        if bank.clients > 2:
            raise torch.OutOfMemoryError("no")
        return embed(bank, *arguments)

    monkeypatch.setattr("fedamole.federation.worker.embed", tight)
    result = clients.update(0, messages)
    assert [len(names) for names in diary.groups] == [4, 2, 2]
    assert {name: answer.payload for name, answer in result.items()} == {
        name: answer.payload for name, answer in answers.items()
    }
    states = [sorted((tmp_path / name).glob("clients/*/state/*")) for name in ("run", "wanted")]
    assert len(states[0]) == 4
    assert [path.read_bytes() for path in states[0]] == [path.read_bytes() for path in states[1]]


@pytest.mark.parametrize("method", [SMALL, Twice(rank=2, alpha=4.0)], ids=["shared training", "an update of its own"])
def test_if_one_client_does_not_fit_the_error_names_the_settings(
    method: FedIT, runs: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """From 4 clients down to 1, in training itself."""
    clients, messages, diary = engine(runs, tmp_path / "run", method, 4)

    def backward(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(clients.worker.bank, "backward", backward)
    with pytest.raises(FedamoleError) as caught:
        clients.update(0, messages)
    for word in ("(chat)", "training.batch_size", "training.max_length", "base.gradient_checkpointing"):
        assert word in str(caught.value)
    assert not isinstance(caught.value, RuntimeError)
    assert diary.groups[-1] == ["chat"]
    assert not list((tmp_path / "run").glob("clients/*/state/*"))
