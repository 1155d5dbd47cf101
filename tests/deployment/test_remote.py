"""The engine of a deployment over real clients, without a network: parity, lateness, faults."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedamole.engine import link as timing
from fedamole.engine.messages import EVALUATE, FAILURES, JOIN, TEST, UPDATE, Reply, Request
from fedamole.experiment import loop_of
from fedamole.federation import client_state
from fedamole.federation.method import ClientInfo
from fedamole.federation.record import pack, unpack
from fedamole.runs.checkpoint import round_and_exchange
from fedamole.runs.run_files import BASE, MAJORITY
from fedamole.runs.run_folder import RunFolder, write_atomic
from fedamole.synthesis.latent_exchange import LatentKept, LatentState
from tests.conftest import small
from tests.deployment.direct import ClientSchedule, DirectDeployment, Killed, direct_deployment, in_one_process
from tests.deployment.dishonest_client import DishonestClient

TIMES = ("seconds", "peak_memory", "group", "bytes")
NAMES = ("chat", "entail", "mood", "plain")
RULES = ("evaluation.best_round=client", "federation.aggregation=clipped")
"""Defaults of a deployment, set explicitly so that in-process runs use them too."""
QUICK = ("federation.rounds=3", "training.local_steps=1", "run.group=1", *RULES)


def facts(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without times, sizes and failures."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [{**line, "failed": True} if "failed" in line else line for line in lines]
    return [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in records]


def left(client: Path) -> dict[str, bytes]:
    """A client's final state: its last private state, and its personal models of the best round."""
    state = max(client.glob("state/*.safetensors"), default=None, key=round_and_exchange)
    files = [*client.glob("adapter*/*.safetensors"), *([] if state is None else [state])]
    return {str(file.relative_to(client)): file.read_bytes() for file in sorted(files)}


def assert_same(there: DirectDeployment, in_process: Path) -> None:
    """Assert that a deployed and an in-process run are bit-identical at the server and at every client."""
    assert states(there.server_folder) == states(in_process)
    assert facts(there.server_folder) == facts(in_process)
    for name in NAMES:
        assert left(there.client_folder(name)) == left(in_process / "clients" / name), name
    rows = [json.loads((path / "summary.json").read_text())["rows"] for path in (there.server_folder, in_process)]
    assert rows[0] == rows[1]


def states(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "checkpoints").glob("*.safetensors"))}


@pytest.fixture
def settle(tiny: Path, tmp_path: Path, monkeypatch: Any) -> Any:
    monkeypatch.setattr(timing, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(timing, "POLL_SECONDS", 0.01)

    def make(method: str, *overrides: str, folder: str = ".") -> DirectDeployment:
        return direct_deployment(tiny / "config.toml", tmp_path / folder, *small(method), *overrides)

    return make


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fedamole", []),
        ("fedit", ["evaluation.pre_aggregation=true"]),
        ("fedlease", []),
        ("ifca_lora", []),
        ("flora", []),
        ("regmean", []),
        ("model_glue", []),
        ("feddm", []),
        ("fedaf", []),
        ("codream", []),
        ("pfedhr", []),
        ("fed_et", []),
        ("data_engine", ["data.embedding_share=0.2"]),
        ("feddpa", []),
        ("fedamole", ["evaluation.select=score"]),
    ],
)
def test_equals_the_run_in_one_process(method: str, options: list[str], settle: Any, runs: Any) -> None:
    there = settle(method, *options, *QUICK)
    there.run()
    assert_same(there, runs(method, *options, *QUICK))


def test_noise_of_a_release_is_not_that_of_the_seed(settle: Any, runs: Any) -> None:
    """Two deployments with one seed: equal before the release, which each client writes to its disk, and not in it."""
    options = ("method.min_class_examples=2", *QUICK, "federation.rounds=2")
    after = [release_round(runs("feddpms", *options))]
    for name in ("first", "second"):
        there = settle("feddpms", *options, folder=name)
        there.run()
        after.append(release_round(there.server_folder))
        written = unpack(LatentKept, (there.client_folder("entail") / "released.safetensors").read_bytes())
        assert {label: mean.tolist() for label, mean in written.means.items()} == {
            label: mean.tolist() for label, mean in after[-1].means["entail"].items()
        }
    assert len({pack(replace(state, means={})) for state in after}) == 1
    assert all(state.means["entail"] for state in after)
    assert len({pack(replace(state, tensors={}, autoencoder={}, reader={})) for state in after}) == 3


def release_round(folder: Path) -> LatentState:
    return unpack(LatentState, states(folder)["round-0001.safetensors"])


def test_equals_it_also_where_replies_are_clipped_and_the_best_round_is_one_for_all(settle: Any, runs: Any) -> None:
    options = (*QUICK, "federation.clip_factor=1", "evaluation.best_round=mean", "training.local_steps=2")
    there = settle("fedamole", *options)
    assert there.run()["clipped"] > 0
    assert_same(there, runs("fedamole", *options))


@pytest.mark.parametrize("best_round", ["mean", "client"])
def test_a_deployment_stops_early_as_the_run_in_one_process_does(best_round: str, settle: Any, runs: Any) -> None:
    """At the server and in the folder of every client."""
    stops = ("federation.rounds=9", "federation.patience=1", "training.learning_rate=1.0")
    options = (*QUICK, f"evaluation.best_round={best_round}", *stops)
    there, here = settle("local_only", *options), runs("local_only", *options)
    summary = there.run()
    assert 1 < summary["rounds"] < 9, "choose another rate"
    assert_same(there, here)
    folders = [here, *(there.client_folder(name).parents[1] for name in NAMES)]
    summaries = [summary, *(json.loads((folder / "summary.json").read_text()) for folder in folders)]
    assert {item["rounds"] for item in summaries} == {summary["rounds"]}
    assert all(item["stopped"] == {"rounds": 9, "patience": 1} for item in summaries)
    assert (there.client_folder("mood") / "adapter" / "README.md").read_text().count("no improvement for 1 round.") == 1


def test_without_a_word_in_the_config_best_rounds_are_each_clients_own(settle: Any) -> None:
    """mood reports loss 0 in round 0: its best model is then that of round 0, and nothing else changes."""

    def models(there: DirectDeployment) -> dict[str, dict[str, bytes]]:
        return {name: left(there.client_folder(name)) for name in NAMES if name != "mood"}

    options = (*QUICK[:3], "training.learning_rate=0.003")
    there = settle("local_only", *options)
    rows = there.run()["rows"]["local_only"]["best_round"]
    assert max(rows.values()) > 0, "choose another rate: this test wants a best round that is not the first"
    honest_reply = models(there)

    def lie(name: str, request: Request, answer: bytes) -> bytes:
        reply = unpack(Reply, answer)
        if (name, request.operation, request.round) != ("mood", UPDATE, 0):
            return answer
        return pack(replace(reply, scores={row: {**values, "loss": 0.0} for row, values in reply.scores.items()}))

    other = settle("local_only", *options, folder="lied")
    other.link.meddle = lie
    assert other.run()["rows"]["local_only"]["best_round"] == {**rows, "mood": 0}
    assert models(other) == honest_reply


def test_one_liar_with_a_key_harms_itself_alone(settle: Any, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    """mood sends another false value in each round; the config has only the default protection."""
    there = settle("fedit", "federation.rounds=6", "training.local_steps=2", "method.weighting=examples")
    kinds = ("examples", "lowest loss", "poison", "flip", "false loss", "seconds")
    file, node = tmp_path / "lie", there.link.node("mood")
    monkeypatch.setenv("LIE", str(file))
    old = there.link.hosts[node]
    there.link.hosts[node] = DishonestClient(old.settings, old.listener)
    there.link.before = lambda name, request: file.write_text(kinds[max(request.round, 0)]) and None
    rows = there.run()["rows"]["fedit"]["best_round"]
    records = [line for line in lines(there.server_folder) if line.get("client") == "mood" and line["round"] >= 0]
    train = {line["round"]: line for line in records if line["split"] == "train"}
    assert [round_ for round_, line in train.items() if "clipped" in line] == [2, 3]
    assert [round_ for round_, line in train.items() if "failed" in line] == [5]
    scored = {line["round"] for line in records if line["split"] == "validation"}
    assert scored == {0, 1, 2, 3, 5}
    assert "client mood, round 4, evaluate: refused: its scores: loss is not a number from 0 to 10000" in caplog.text
    assert "client mood, round 5, update: refused: its report: seconds is not a number from 0 to 1e+07" in caplog.text
    assert rows.pop("mood") == 1
    assert max(rows.values()) > 1, "the best rounds of the others are their own"
    clients = json.loads(min((there.server_folder / "checkpoints").glob("*.json")).read_text())["progress"]["examples"]
    assert clients["mood"] == 10**9
    known = tuple(ClientInfo(name, count) for name, count in clients.items())
    folder = RunFolder.open(there.server_folder)
    loop = loop_of(there.config, there.engine("a1b2", ClientSchedule()), there.server, folder, ClientSchedule())
    weights = replace(loop.server, clients=known).weights("examples")
    assert weights["mood"] == pytest.approx(sum(weights.values()) / 2)


def asked(there: DirectDeployment, name: str, operation: str) -> list[int]:
    """Rounds in which a client got a request, in order."""
    return [request.round for who, request in there.link.asked if (who, request.operation) == (name, operation)]


@pytest.mark.parametrize(
    ("method", "options"), [("fedsa_lora", ["evaluation.pre_aggregation=true"]), ("local_only", [])]
)
def test_rounds_that_did_not_count_are_undone(
    method: str, options: list[str], settle: Any, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    """In round 1 one reply is lost, one disk is full, one client is out of memory: as if three had been left out."""
    there = settle(method, *options, *QUICK, "deployment.min_clients=1")
    failing = {"disk": "plain", "memory": "mood"}
    write = write_atomic

    def full_once(path: Path, content: Any) -> None:
        if failing.get("disk", "?") in str(path) and path.name == "round-0001.safetensors":
            del failing["disk"]
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    def short_once(done: int, steps: int) -> None:
        if asked(there, "mood", UPDATE)[-1] == 1 and failing.pop("memory", ""):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(client_state, "write_atomic", full_once)
    there.link.hosts[there.link.node("mood")].listener.step = short_once
    there.link.meddle = lambda name, request, answer: (
        "no_answer" if (name, request.round, request.operation) == ("chat", 1, UPDATE) else answer
    )
    there.run()
    assert not failing
    assert_same(there, in_one_process(there.config, tmp_path / "here", lost={1: ("chat", "mood", "plain")}))
    failures = {line["failed"] for line in lines(there.server_folder) if "failed" in line}
    assert failures == {FAILURES[code] for code in ("disk", "out_of_memory", "no_answer")}
    assert asked(there, "chat", UPDATE) == asked(there, "mood", UPDATE) == [0, 1, 2]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["fedalt", "fedamole"])
def test_workers_that_end_and_start_again_change_nothing(method: str, settle: Any, tmp_path: Path) -> None:
    """Killed during training, or replaced between two requests of any kind: no client joins again."""
    there = settle(method, *QUICK, "deployment.min_clients=4")
    killed: list[bool] = []

    def die_once(done: int, steps: int) -> None:
        if asked(there, "mood", UPDATE)[-1] == 1 and not killed:
            killed.append(True)
            raise Killed

    points = {("chat", UPDATE, 1), ("plain", EVALUATE, 1), ("entail", TEST, 2)}

    def replaced(name: str, request: Request) -> None:
        if (name, request.operation, request.round) in points:
            there.link.restart(name)

    there.link.hosts[there.link.node("mood")].listener.step = die_once
    there.link.before = replaced
    there.run()
    assert killed
    assert asked(there, "mood", UPDATE) == [0, 1, 1, 2]
    assert all(asked(there, name, JOIN) == [-1] for name in NAMES)
    assert_same(there, in_one_process(there.config, tmp_path / "here"))


def test_a_client_that_lost_its_folder_joins_again(settle: Any, caplog: Any) -> None:
    """mood's folder is deleted while its worker runs, chat's together with its worker: both rejoin a round later."""
    there = settle("fedit", *QUICK)

    def deleted(name: str, request: Request) -> None:
        if (request.operation, request.round) == (UPDATE, 1) and name in ("mood", "chat"):
            shutil.rmtree(there.folder / name)
            if name == "chat":
                there.link.restart(name)

    there.link.before = deleted
    summary = there.run()
    assert [asked(there, name, JOIN) for name in NAMES] == [[-1, -1], [-1], [-1, -1], [-1]]
    assert asked(there, "mood", UPDATE) == [0, 1, 2]
    failed = [(line["client"], line["round"]) for line in lines(there.server_folder) if "failed" in line]
    assert failed == [("chat", 1), ("mood", 1)]
    assert "is missing or incomplete" in caplog.text
    assert "the state of earlier rounds is missing" in caplog.text
    assert set(summary["rows"]["fedit"]["clients"]) == set(NAMES)


@pytest.mark.parametrize(("method", "options"), [("fedit", ["evaluation.pre_aggregation=true"]), ("fdlora", [])])
def test_late_joins_and_absences(method: str, options: list[str], settle: Any, tmp_path: Path) -> None:
    """An absent client keeps its model of the best round that the server knows; late clients count from then on."""
    away = {0: ("mood", "plain"), 1: ("chat", "mood"), 2: ("chat",)}
    there = settle(method, *options, *QUICK, "federation.rounds=4")
    there.run(schedule=ClientSchedule(away))
    assert [asked(there, name, JOIN) for name in NAMES] == [[-1]] * 4
    assert [asked(there, name, UPDATE) for name in NAMES] == [[0, 3], [0, 1, 2, 3], [2, 3], [1, 2, 3]]
    in_process = in_one_process(there.config, tmp_path / "here", away)
    assert_same(there, in_process)
    rows = json.loads((in_process / "summary.json").read_text())["rows"]
    best = [round_ for row in rows if row not in (BASE, MAJORITY) for round_ in rows[row]["best_round"].values()]
    assert max(best) > 0, "no best round to be kept later"


@pytest.mark.parametrize(
    ("method", "options", "point", "damaged"),
    [
        ("fedamole", [], ("client_done", 6), False),
        ("fedit", ["evaluation.pre_aggregation=true"], ("round_done", 2), True),
        ("fedlease", [], ("stage", 3), False),
        ("fdlora", [], ("client_done", 9), True),
        ("fedit", ["federation.clip_factor=1"], ("client_done", 6), False),
    ],
)
def test_a_killed_server_resumes_with_the_same_result(
    method: str, options: list[str], point: tuple[str, int], damaged: bool, settle: Any, runs: Any
) -> None:
    there = settle(method, *options, *QUICK)

    def strike(what: str, nth: int) -> None:
        if (what, nth) == point:
            raise Killed

    with pytest.raises(Killed):
        there.run(schedule=ClientSchedule(stop=strike))
    if damaged:
        path = max((there.server_folder / "checkpoints").glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    before = len(there.link.asked)
    there.run(resumed=True)
    again = there.link.asked[before:]
    assert [request.operation for _, request in again[:4]] == [JOIN] * 4
    assert min(request.round for _, request in again[4:]) == 1
    assert_same(there, runs(method, *options, *QUICK))
