"""Contracts over a method with several exchanges in a round: budget, random streams, traffic, and kills in between."""

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import small
from tests.contract.exchanges import Average, ThreeExchanges, Trained, steps_by_exchange
from tests.deployment.direct import ClientSchedule, DirectDeployment, Killed, direct_deployment
from tests.deployment.server_process import run_server
from typing_extensions import override

from fedamole.deployment.client_handler import ClientHandler
from fedamole.deployment.security.policy import UNBOUNDED
from fedamole.deployment.shared_config import shared_tables
from fedamole.engine import link as timing
from fedamole.engine.in_process import InProcess
from fedamole.engine.messages import JOIN, UPDATE, Reply, Request
from fedamole.errors import RunError
from fedamole.experiment import plan, prepare, resume, worker_of
from fedamole.federation.client_state import PrivateState
from fedamole.federation.method import BaseInfo, Client, ClientInfo, Exchange, Server
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import bytes_as_tensor, pack, unpack
from fedamole.methods import METHODS
from fedamole.model.bank import Bank
from fedamole.model.params import Adapter
from fedamole.planning import trained_parameters
from fedamole.reporting.work import work_of
from fedamole.runs.checkpoint import round_and_exchange
from fedamole.runs.run_folder import RunFolder

NAME = "three_exchanges"
NAMES = ("chat", "entail", "mood", "plain")


@pytest.fixture(autouse=True)
def registered(monkeypatch: Any) -> None:
    monkeypatch.setitem(METHODS, NAME, ThreeExchanges)
    monkeypatch.setattr(timing, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(timing, "POLL_SECONDS", 0.01)


# --- in one process -------------------------------------------------------------------------------------------


def test_exchanges_of_a_round_share_its_steps(runs: Any, facts: Any) -> None:
    """Of 3 steps half are 2 (1.5, rounded), and the rest 1; the exchange that trains nothing has no loss."""
    lines = facts(runs(NAME))
    steps = steps_by_exchange(lines)
    assert steps == {(round_, name): [2, 1, 0] for round_ in range(3) for name in NAMES}
    for line in lines:
        if line["split"] == "train":
            assert ("loss" in line) == (line.get("exchange", 0) < 2)
            assert ("probed" in line) == (line.get("exchange", 0) == 2)


def test_work_and_plan_are_those_of_all_exchanges_of_a_round(runs: Any, facts: Any) -> None:
    """The plan equals the first round of the run, to the byte and to the parameter."""
    config = runs.load(NAME)
    folder, planned, prepared = runs(NAME), plan(config), prepare(config)
    lines = [line for line in facts(folder) if line["split"] == "train" and line["round"] == 0]
    assert planned.bytes_down == sum(line["bytes_down"] for line in lines) / len(NAMES)
    assert planned.bytes_down > 2.5 * min(line["bytes_down"] for line in lines), "three messages, not one"
    size = planned.adapter_parameters
    assert {line["trained_parameters"] for line in lines} == {size}, "the same LoRA in all exchanges"
    assert trained_parameters(config, prepared.base, prepared.clients) == dict.fromkeys(NAMES, size)
    work = work_of(facts(folder), NAME, clients=len(NAMES), rounds=3)
    assert (work["steps"], work["parameters"]) == (planned.steps, size) == (3.0, size)


@dataclass(frozen=True)
class OneFactorEach(ThreeExchanges):
    """Trains B in the first exchange of a run, and A in all others."""

    @override
    def adapter(self, client: Client, client_state: Trained, message: Average) -> Adapter:
        adapter, frozen = super().adapter(client, client_state, message), "/A" if client_state.tensors == {} else "/B"
        return replace(adapter, frozen=tuple(key for key in adapter.tensors if key.endswith(frozen)))


def test_exchanges_that_train_different_tensors_add_up(runs: Any, facts: Any, monkeypatch: Any) -> None:
    whole_lora = plan(runs.load(NAME)).adapter_parameters
    monkeypatch.setitem(METHODS, NAME, OneFactorEach)
    options = (NAME, "federation.rounds=1")
    config = runs.load(*options)
    prepared, lines = prepare(config), facts(runs.fresh(*options))
    counts = trained_parameters(config, prepared.base, prepared.clients)
    assert counts["mood"] == whole_lora
    by_exchange = [
        line["trained_parameters"] for line in lines if line["split"] == "train" and line["client"] == "mood"
    ]
    assert 0 < by_exchange[0] < by_exchange[1] == by_exchange[2] == counts["mood"]
    assert work_of(lines, NAME, clients=len(NAMES), rounds=1)["parameters"] == counts["mood"]


def test_the_summary_adds_up_the_traffic_of_a_round(runs: Any, facts: Any) -> None:
    summary = json.loads((runs(NAME) / "summary.json").read_text())
    lines = [line for line in facts(runs(NAME)) if line["split"] == "train"]
    assert len(lines) == 3 * 4 * 3
    for way in ("bytes_down", "bytes_up"):
        assert summary[f"{way}_per_client_round"] == sum(line[way] for line in lines) / 12
    assert summary["updates"] == 36


def test_each_exchange_has_batches_of_its_own(runs: Any, tmp_path: Path) -> None:
    """The same message and no client state, 2 steps each: what differs are the batches."""
    prepared = prepare(runs.load(NAME, "training.local_steps=4"))
    folder = RunFolder.create(tmp_path / "run", "", "", NAME, prepared.base.identity)
    engine = InProcess(worker_of(prepared.config, Bank(prepared.base), folder), prepared.clients, ProgressListener(), 4)
    method = prepared.config.method
    message = pack(method.init(Server(BaseInfo.of(prepared.base), engine.clients, 0)))
    tensors = []
    for exchange in (0, 1, 0):
        (result,) = engine.update(0, {"mood": message}, exchange).values()
        assert result.report["steps"] == 2
        tensors.append(unpack(Trained, result.payload or b"").tensors)
        for path in folder.client("mood").glob("state/*"):
            state = path.read_bytes()
            if exchange == 0:
                first = state
            path.unlink()
        # The second exchange needs the steps of the first, and none of its tensors.
        if exchange == 0 and len(tensors) == 1:
            (folder.client("mood") / "state" / "round-0000.safetensors").write_bytes(_without_tensors(first))
    assert all(torch.equal(tensors[0][key], tensors[2][key]) for key in tensors[0])
    assert not all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


def _without_tensors(state: bytes) -> bytes:
    private = unpack(PrivateState, state)
    assert private.step_fraction == 0.5
    return pack(replace(private, client_state=bytes_as_tensor(pack(Trained({}, {}))), trained=None))


@pytest.mark.parametrize(
    ("point", "nth"),
    [
        ("client_done", 16),  # all have finished the first exchange of round 1
        ("client_done", 18),  # two have finished the second one
        ("mood/state/round-0001-exchange-1.safetensors", 1),
        ("client_done", 24),  # all have finished round 1, which is not committed
    ],
)
def test_a_run_killed_between_exchanges_resumes_with_the_same_result(
    point: str, nth: int, runs: Any, crash: Any, remains: Any
) -> None:
    folder = crash(point, nth, NAME)
    resume(folder, ProgressListener())
    assert remains(folder) == remains(runs(NAME))


def test_replies_are_clipped_by_what_is_usual_in_their_exchange(runs: Any) -> None:
    folder = runs(NAME, "federation.aggregation=clipped")
    progress = json.loads((folder / "checkpoints" / "round-0002.json").read_text())["progress"]
    groups = [set(sizes) for sizes in progress["sizes"]]
    assert len(groups) == 3
    for names in groups:
        assert {"tensors/shared/A", "exchange 1: tensors/shared/A", "exchange 2: measures"} <= {
            name.removesuffix(" (value)") for name in names
        }


@dataclass(frozen=True)
class TooMany(ThreeExchanges):
    """Exchanges more often than it declares."""

    @override
    def exchanges(self) -> int:
        return 2


@dataclass(frozen=True)
class Stranger(ThreeExchanges):
    """Sends a message to a client that is not in the cohort."""

    @override
    def round(self, server: Server, state: Average, cohort: Sequence[ClientInfo], exchange: Exchange) -> Average:
        exchange({"nobody": state})
        return state


@pytest.mark.parametrize(
    ("method", "error"),
    [(TooMany, "more than the 2 exchanges"), (Stranger, "messages to clients outside the cohort: nobody")],
)
def test_exchanges_that_are_not_allowed_are_errors(method: Any, error: str, runs: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(METHODS, NAME, method)
    with pytest.raises(RunError, match=error):
        runs.fresh(NAME, "federation.rounds=1", "training.local_steps=1")


# --- a deployment ---------------------------------------------------------------------------------------------

QUICK = (
    "federation.rounds=2",
    "run.group=1",
    "evaluation.best_round=client",
    "federation.aggregation=clipped",
    "deployment.max_norm=1000",
    "deployment.min_clients=4",
)


def outcome(server: Path, clients: Mapping[str, Path]) -> dict[str, Any]:
    """Server states, last client states, models and metrics without times."""
    lines = [json.loads(line) for line in (server / "metrics.jsonl").read_text().splitlines()]
    skipped = ("seconds", "peak_memory", "group", "bytes")
    result: dict[str, Any] = {
        "metrics": [{key: value for key, value in line.items() if not key.startswith(skipped)} for line in lines]
    }
    result |= {path.name: path.read_bytes() for path in server.glob("checkpoints/*.safetensors")}
    for name, folder in clients.items():
        result[name] = max(folder.glob("state/*.safetensors"), key=round_and_exchange).read_bytes()
        result |= {f"{name} {path.name}": path.read_bytes() for path in folder.glob("adapter/*.safetensors")}
    return result


@pytest.fixture
def expected(runs: Any) -> dict[str, Any]:
    folder = runs(NAME, *QUICK)
    return outcome(folder, {name: folder / "clients" / name for name in NAMES})


def outcome_of(there: DirectDeployment) -> dict[str, Any]:
    return outcome(there.server_folder, {name: there.client_folder(name) for name in NAMES})


@pytest.fixture
def there(tiny: Path, tmp_path: Path) -> DirectDeployment:
    return direct_deployment(tiny / "config.toml", tmp_path, *small(NAME), *QUICK)


def test_a_deployment_equals_the_run_in_one_process(there: DirectDeployment, expected: dict[str, Any]) -> None:
    there.run()
    assert outcome_of(there) == expected
    own = [json.loads(line) for line in (there.client_folder("mood").parents[1] / "metrics.jsonl").open()]
    assert steps_by_exchange([line for line in own]) == {(round_, "mood"): [2, 1, 0] for round_ in range(2)}


@pytest.mark.parametrize("nth", [16, 18, 21])
def test_a_server_stopped_between_exchanges_resumes_with_the_same_result(
    nth: int, there: DirectDeployment, expected: dict[str, Any]
) -> None:
    """12 updates a round: in round 1 all have trained once, two have trained twice, one has measured."""

    def stop(event: str, count: int) -> None:
        if (event, count) == ("client_done", nth):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        there.run(schedule=ClientSchedule(stop=stop))
    there.run(resumed=True)
    assert outcome_of(there) == expected


@pytest.mark.parametrize("exchange", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_a_server_process_killed_by_sigkill_between_exchanges_resumes(
    exchange: int, there: DirectDeployment, expected: dict[str, Any]
) -> None:
    """A process of its own is killed before an exchange of round 1, when all have answered the exchange before it."""
    updates: list[tuple[int, int, str]] = []

    def kill_at(name: str, request: Request) -> bool:
        if request.operation == UPDATE:
            updates.append((request.round, request.exchange, name))
        return (request.operation, request.round, request.exchange) == (UPDATE, 1, exchange)

    assert run_server(there, kill_at) == -signal.SIGKILL
    answered = [(round_, e, name) for round_ in (0, 1) for e in range(3) for name in NAMES]
    assert updates == answered[: (3 + exchange) * len(NAMES) + 1]
    assert [path.name for path in there.server_folder.glob("checkpoints/*.safetensors")] == ["round-0000.safetensors"]
    assert run_server(there, lambda name, request: False) == 0
    assert outcome_of(there) == expected


@pytest.mark.parametrize("exchange", [0, 1, 2])
@pytest.mark.parametrize("lost", ["state", "answer"])
def test_a_client_killed_in_an_exchange_does_this_exchange_again(
    lost: str, exchange: int, there: DirectDeployment, expected: dict[str, Any], monkeypatch: Any
) -> None:
    """Killed after its state was written and before its answer was, or after both and before the answer was sent."""
    killed: list[str] = []

    def once(name: str, request: Request) -> bool:
        due = (name, request.operation, request.round, request.exchange) == ("mood", UPDATE, 1, exchange)
        return due and not killed

    def meddle(name: str, request: Request, answer: bytes) -> bytes:
        if once(name, request):
            killed.append(name)
            if lost == "answer":
                session = there.link.hosts[there.link.node("mood")].session
                assert session is not None
                session.answer_path(1, exchange).unlink()
            raise Killed
        return answer

    there.link.meddle = meddle
    there.run()
    assert killed == ["mood"]
    assert outcome_of(there) == expected


def with_policy(there: DirectDeployment, **changes: Any) -> ClientHandler:
    """The client mood, started again with another policy."""
    node = there.link.node("mood")
    old = there.link.hosts[node]
    settings = replace(old.settings, policy=replace(UNBOUNDED, **changes))
    there.link.hosts[node] = ClientHandler(settings, old.listener)
    return there.link.hosts[node]


def join(there: DirectDeployment, client: ClientHandler) -> Reply:
    there.engine("a1b2", ClientSchedule())
    tables = shared_tables(there.config, there.identity)
    return unpack(Reply, client.answer(pack(Request("a1b2", -1, JOIN, settings=tables))))


def update(there: DirectDeployment, client: ClientHandler, exchange: int, last: int, last_exchange: int = 0) -> Reply:
    message = bytes_as_tensor(pack(there.config.method.init(there.server)))
    request = Request("a1b2", 0, UPDATE, last=last, last_exchange=last_exchange, exchange=exchange, message=message)
    return unpack(Reply, client.answer(pack(request)))


@pytest.mark.parametrize(("most", "failed"), [(5, "policy"), (6, None)])
def test_a_policy_counts_rounds_times_exchanges(most: int, failed: str | None, there: DirectDeployment) -> None:
    assert join(there, with_policy(there, max_rounds=most)).failed == failed


def test_a_client_sends_no_update_of_fewer_steps_than_its_policy_allows(there: DirectDeployment) -> None:
    """The second exchange takes 1 of the 3 steps of a round; one without any step is allowed."""
    client = with_policy(there, min_steps=2)
    assert join(there, client).failed is None
    assert update(there, client, 0, last=-1).failed is None
    assert update(there, client, 1, last=0).failed == "policy"
    assert update(there, client, 3, last=0).failed == "bad_request", "the method has 3 exchanges"
