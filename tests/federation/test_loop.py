"""The loop: cohorts, the best round by validation, and when the test split is read.

Where the numbers matter, a scripted engine answers with losses written down here; the loop and its folder are real.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from fedamole.errors import RunError
from fedamole.federation.loop import Loop
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import Nothing, pack
from fedamole.federation.settings import FederationSettings
from fedamole.federation.worker import UpdateResult
from fedamole.methods.local_only import LocalOnly
from fedamole.runs.identity import Identity
from fedamole.runs.run_folder import RunFolder

NAMES = ("a", "b")


class Script:
    """Answers with the given losses by round and client; an absent client is one that does not answer."""

    deployed = False

    def __init__(self, losses: list[dict[str, float]]) -> None:
        self.losses, self.calls = losses, list[tuple[Any, ...]]()

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        return tuple(ClientInfo(name, 1) for name in NAMES)

    def update(self, round_: int, messages: Mapping[str, bytes], exchange: int = 0) -> dict[str, UpdateResult]:
        self.calls.append(("update", round_, tuple(messages)))
        there = [name for name in messages if name in self.losses[round_]]
        return {name: UpdateResult(pack(Nothing()), {"loss": 0.0, "steps": 1, "seconds": 0.0}) for name in there}

    def evaluate(self, round_: int, row: str, messages: Mapping[str, bytes | None]) -> dict[str, Any]:
        self.calls.append(("evaluate", round_, tuple(messages)))
        return {name: self.scores(self.losses[round_][name]) for name in messages}

    def scores(self, loss: float) -> dict[str, float]:
        return {"loss": loss, "score": 100 - loss}

    def wait_for_clients(self) -> tuple[str, ...]:
        return tuple(client.name for client in self.clients)

    def restore(self, best: Any, answered: Any, examples: Any) -> None:
        pass

    def save_best(self, row: str, round_: int, names: Collection[str]) -> None:
        self.calls.append(("keep", round_, *names))

    def score_base(self, split: str, names: Collection[str]) -> dict[str, Any]:
        self.calls.append(("bare", split, *names))
        return {name: self.scores(50.0) for name in names}

    def majority(self) -> dict[str, Any]:
        self.calls.append(("majority",))
        return {name: {"score": 1.0} for name in NAMES}

    def test(self, row: str, best: bool) -> dict[str, Any]:
        self.calls.append(("test", best))
        return {name: self.scores(1.0) for name in NAMES}


class LateComer(Script):
    """Client b comes for round 2."""

    def wait_for_clients(self) -> tuple[str, ...]:
        return NAMES if ("update", 1, ("a",)) in self.calls else ("a",)


def play(
    path: Path,
    losses: list[dict[str, float]],
    select: str = "loss",
    script: type[Script] = Script,
    patience: int = 0,
    **options: Any,
) -> tuple[dict[str, Any], list[Any]]:
    engine = script(losses)
    folder = RunFolder.create(path, "", "{}", "local_only", Identity("w", "t", "x"))
    loop = Loop(
        LocalOnly(),
        {"local_only": "pre_aggregation"},
        engine,
        Server(BaseInfo({}), engine.clients, 0),
        FederationSettings(rounds=len(losses), patience=patience),
        folder,
        select=select,  # type: ignore[arg-type]
        listener=ProgressListener(),
        **options,
    )
    return loop.run(), engine.calls


def both(*losses: float) -> list[dict[str, float]]:
    return [{"a": loss, "b": loss} for loss in losses]


@pytest.mark.parametrize(
    ("losses", "best", "kept"),
    [
        (both(3.0, 1.0, 2.0), 1, 2),
        (both(3.0, 1.0, 1.0), 1, 2),  # a tie goes to the earlier
        (both(3.0, 2.0, 1.0), 2, 3),
        ([{"a": 1.0, "b": 5.0}, {"a": 4.0, "b": 1.0}, {"a": 0.0, "b": 9.0}], 1, 2),  # means 3, 2.5, 4.5
        # b is absent in round 1: its loss of round 0 counts still. Means 4, (1 + 5) / 2 = 3, 3.5.
        ([{"a": 3.0, "b": 5.0}, {"a": 1.0}, {"a": 3.0, "b": 4.0}], 1, 2),
        # b has never answered: the bare base, 50. Means 26, 27, 2.
        ([{"a": 2.0}, {"a": 4.0}, {"a": 2.0, "b": 2.0}], 2, 2),
    ],
)
@pytest.mark.parametrize("select", ["loss", "score"])
def test_the_best_round(losses: Any, best: int, kept: int, select: str, tmp_path: Path) -> None:
    """By the mean over all clients; the score here is 100 - loss, so both agree."""
    summary, calls = play(tmp_path / "run", losses, select)
    assert summary["rows"]["local_only"]["best_round"] == best
    assert sum(call[0] == "keep" for call in calls) == kept


@pytest.mark.parametrize("select", ["loss", "score"])
def test_best_rounds_of_each_clients_own(select: str, tmp_path: Path) -> None:
    """a: 3, absent, 2, 2. b: 5, 1, NaN, 4. A tie goes to the earlier round, an absent client keeps what it has."""
    losses = [{"a": 3.0, "b": 5.0}, {"b": 1.0}, {"a": 2.0, "b": math.nan}, {"a": 2.0, "b": 4.0}]
    summary, calls = play(tmp_path / "run", losses, select, best_round="client")
    assert [call[1:] for call in calls if call[0] == "keep"] == [(0, "a", "b"), (1, "b"), (2, "a")]
    assert summary["rows"]["local_only"]["best_round"] == {"a": 2, "b": 1}
    assert ("test", False) in calls
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    tested = [
        (line["client"], line["which"], line["round"])
        for line in lines
        if line["split"] == "test" and line["method"] == "local_only"
    ]
    assert tested == [("a", "best", 2), ("b", "best", 1), ("a", "last", 3), ("b", "last", 3)]


def test_a_false_loss_pins_the_best_round_of_its_author_alone(tmp_path: Path) -> None:
    """a says 0 in round 0: by the mean that is everybody's best round, else a's own."""
    losses = [{"a": 0.0, "b": 9.0}, {"a": 8.0, "b": 5.0}, {"a": 8.0, "b": 4.0}]
    of_all, _ = play(tmp_path / "mean", losses)
    assert of_all["rows"]["local_only"]["best_round"] == 0
    own, calls = play(tmp_path / "client", losses, best_round="client")
    assert own["rows"]["local_only"]["best_round"] == {"a": 0, "b": 2}
    honest, others = play(
        tmp_path / "honest", [{**loss, "a": 9.0 - n} for n, loss in enumerate(losses)], best_round="client"
    )
    assert honest["rows"]["local_only"]["best_round"]["b"] == 2
    assert [call[1] for call in calls if call[0] == "keep" and "b" in call[2:]] == [
        call[1] for call in others if call[0] == "keep" and "b" in call[2:]
    ]


@pytest.mark.parametrize(("best_round", "rounds"), [("client", {"a": 0, "b": 1}), ("mean", {"a": 1, "b": 1})])
def test_an_engine_gets_the_best_rounds_on_resume(best_round: str, rounds: Any, tmp_path: Path) -> None:
    """Two rounds, then a third in the same folder. A round that does not improve leaves the best rounds as they are."""
    losses = [{"a": 3.0, "b": 5.0}, {"a": 4.0, "b": 1.0}, {"a": 9.0, "b": 9.0}]
    play(tmp_path / "run", losses[:2], best_round=best_round)
    engine, heard = Script(losses), list[Any]()
    engine.restore = lambda *arguments: heard.append(deepcopy(arguments))  # type: ignore[method-assign]
    loop = Loop(
        LocalOnly(),
        {"local_only": "pre_aggregation"},
        engine,
        Server(BaseInfo({}), engine.clients, 0),
        FederationSettings(rounds=3),
        RunFolder.open(tmp_path / "run"),
        select="loss",
        listener=ProgressListener(),
        best_round=best_round,  # type: ignore[arg-type]
    )
    summary = loop.run()
    expected = {name: {"local_only": round_} for name, round_ in rounds.items()}
    assert heard == [(expected, {"a": (1, 0), "b": (1, 0)}, {"a": 1, "b": 1})]
    assert summary["rows"]["local_only"]["best_round"] == (rounds if best_round == "client" else 1)


def test_who_comes_late_has_a_best_round_of_its_own_from_then_on(tmp_path: Path) -> None:
    losses = [{"a": 30.0}, {"a": 20.0}, {"a": 36.0, "b": 60.0}, {"a": 36.0, "b": 70.0}]
    summary, calls = play(tmp_path / "run", losses, script=LateComer, best_round="client")
    assert summary["rows"]["local_only"]["best_round"] == {"a": 1, "b": 2}
    assert [call[1:] for call in calls if call[0] == "keep"] == [(0, "a"), (1, "a"), (2, "b")]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_round_whose_loss_is_no_number_is_never_the_best_of_several(bad: float, tmp_path: Path) -> None:
    assert play(tmp_path / "first", both(bad, 2.0, 3.0))[0]["rows"]["local_only"]["best_round"] == 1
    assert play(tmp_path / "later", both(2.0, bad, 3.0))[0]["rows"]["local_only"]["best_round"] == 0


def test_the_test_split_is_read_once_at_the_end(tmp_path: Path) -> None:
    _, calls = play(tmp_path / "run", both(3.0, 1.0, 2.0))
    end = [("test", True), ("test", False), ("bare", "test", *NAMES), ("majority",)]
    assert calls[-4:] == end
    assert not any(call in end for call in calls[:-4])


def test_where_the_last_round_is_the_best_it_is_not_scored_twice(tmp_path: Path) -> None:
    summary, calls = play(tmp_path / "run", both(3.0, 1.0))
    assert ("test", False) not in calls
    assert summary["rows"]["local_only"]["last_mean"] == summary["rows"]["local_only"]["mean"]


def test_a_client_that_does_not_answer_is_named(tmp_path: Path) -> None:
    play(tmp_path / "run", [{"a": 1.0}, {}])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    failed = [(line["round"], line["client"]) for line in lines if "failed" in line]
    assert failed == [(0, "b"), (1, "a"), (1, "b")]


@pytest.mark.parametrize(
    ("losses", "patience", "done"),
    [
        ((3.0, 2.0, 2.5, 2.6, 1.0, 0.9), 2, 4),  # best in round 1, then two rounds without improvement
        ((3.0, 2.0, 2.5, 2.6, 1.0, 0.9), 3, 6),
        ((3.0, 2.0, 2.5, 2.6, 1.0, 0.9), 0, 6),
        ((3.0, 3.0, 1.0), 1, 2),  # an equal value is no improvement
        ((math.nan, math.nan, 1.0), 1, 2),
    ],
)
@pytest.mark.parametrize("select", ["loss", "score"])
def test_a_run_stops_when_nothing_improves(
    losses: Sequence[float], patience: int, done: int, select: str, tmp_path: Path
) -> None:
    summary, calls = play(tmp_path / "run", both(*losses), select, patience=patience)
    assert [call[1] for call in calls if call[0] == "update"] == [*range(done)]
    stopped = {"rounds": len(losses), "patience": patience} if done < len(losses) else None
    assert (summary["rounds"], summary.get("stopped")) == (done, stopped)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert {line["round"] for line in lines if line.get("which") == "last"} == {done - 1}
    RunFolder(tmp_path / "run").read_json("summary.json")  # its format is valid


def test_where_each_client_has_its_best_round_all_of_them_have_to_stop(tmp_path: Path) -> None:
    """a is best in round 0, b in round 2: two rounds later the run stops; by the mean it would be after round 1 + 2."""
    losses = [{"a": 1.0, "b": b} for b in (9.0, 8.0, 7.0, 9.0, 9.0, 1.0)]
    losses[2]["a"] = 9.0
    assert play(tmp_path / "own", losses, patience=2, best_round="client")[0]["rounds"] == 5
    assert play(tmp_path / "mean", losses, patience=2)[0]["rounds"] == 4


@pytest.mark.parametrize("best_round", ["mean", "client"])
@pytest.mark.parametrize("interrupted", range(5))
def test_a_resumed_run_stops_after_the_same_round(best_round: Any, interrupted: int, tmp_path: Path) -> None:
    """Interrupted in the update of a round, or (4: the run has stopped by then) in the final test."""
    losses = [{"a": 1.0, "b": b} for b in (9.0, 8.0, 9.0, 9.5, 1.0, 1.0)]

    class Interrupted(Script):
        def update(self, round_: int, messages: Mapping[str, bytes], exchange: int = 0) -> dict[str, UpdateResult]:
            if round_ == interrupted:
                raise KeyboardInterrupt
            return super().update(round_, messages, exchange)

        def majority(self) -> dict[str, Any]:
            raise KeyboardInterrupt

    complete, _ = play(tmp_path / "whole", losses, patience=2, best_round=best_round)
    assert complete["rounds"] == 4
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "run", losses, patience=2, best_round=best_round, script=Interrupted)
    engine = Script(losses)
    settings, folder = FederationSettings(rounds=6, patience=2), RunFolder.open(tmp_path / "run")
    server, variants = Server(BaseInfo({}), engine.clients, 0), {"local_only": "pre_aggregation"}
    listener = ProgressListener()
    loop = Loop(
        LocalOnly(),
        variants,  # type: ignore[arg-type]
        engine,
        server,
        settings,
        folder,
        select="loss",
        listener=listener,
        best_round=best_round,
    )
    resumed = loop.run()
    assert [call[1] for call in engine.calls if call[0] == "update"] == [*range(min(interrupted, 4), 4)]
    assert [resumed[key] for key in ("rounds", "stopped", "rows")] == [
        complete[key] for key in ("rounds", "stopped", "rows")
    ]


def test_every_variant_has_to_stop(tmp_path: Path) -> None:
    """The second variant improves in every round, so the run goes on although the first does not."""

    class Two(Script):
        def evaluate(self, round_: int, row: str, messages: Mapping[str, bytes | None]) -> dict[str, Any]:
            value = 3.0 - round_ if row == "b" else 1.0
            return {name: self.scores(value) for name in messages}

    engine = Two(both(1.0, 1.0, 1.0, 1.0))
    heard: list[str] = []

    class Heard(ProgressListener):
        def stopped(self, text: str) -> None:
            heard.append(text)

    def loop(path: Path, **variants: Any) -> dict[str, Any]:
        folder = RunFolder.create(path, "", "{}", "a", Identity("w", "t", "x"))
        server, settings = Server(BaseInfo({}), engine.clients, 0), FederationSettings(rounds=4, patience=1)
        return Loop(LocalOnly(), variants, engine, server, settings, folder, select="loss", listener=Heard()).run()

    assert loop(tmp_path / "both", a="pre_aggregation", b="pre_aggregation")["rounds"] == 4
    assert heard == []
    assert loop(tmp_path / "one", a="pre_aggregation")["rounds"] == 2
    assert heard == ["stopped after 2 of 4 rounds: no improvement for 1 round"]


def test_a_method_still_sees_all_configured_rounds(tmp_path: Path) -> None:
    seen: list[int] = []

    @dataclass(frozen=True)
    class Look(LocalOnly):
        @override
        def round(self, server: Server, state: Any, cohort: Any, exchange: Any) -> Any:
            seen.append(server.rounds)
            return super().round(server, state, cohort, exchange)

    engine = Script(both(1.0, 2.0, 3.0, 4.0))
    Loop(
        Look(),
        {"local_only": "pre_aggregation"},
        engine,
        Server(BaseInfo({}), engine.clients, 0, rounds=4),
        FederationSettings(rounds=4, patience=2),
        RunFolder.create(tmp_path / "run", "", "{}", "local_only", Identity("w", "t", "x")),
        select="loss",
        listener=ProgressListener(),
    ).run()
    assert seen == [4, 4, 4]


# --- real runs ------------------------------------------------------------------------------------------------


def cohorts(lines: list[dict[str, Any]]) -> list[list[str]]:
    return [line["cohort"] for line in lines if line["split"] == "round"]


def test_a_late_client_counts_with_the_untuned_base_until_it_joins(tmp_path: Path) -> None:
    """a alone: 30, 20, so round 1 is best with 20. With b's base at 50 it stands at 35 before rounds of 36 and 33."""
    losses = [{"a": 30.0}, {"a": 20.0}, {"a": 36.0, "b": 36.0}, {"a": 36.0, "b": 30.0}]
    summary, calls = play(tmp_path / "run", losses, script=LateComer)
    assert [call[1:] for call in calls if call[0] == "bare"][:2] == [("validation", "a"), ("validation", "b")]
    assert [call[1] for call in calls if call[0] == "keep"] == [0, 1, 3]
    assert summary["rows"]["local_only"]["best_round"] == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    base = [(line["round"], line["client"]) for line in lines if line.get("method") == "base"]
    assert base[:2] == [(-1, "a"), (2, "b")]


@pytest.mark.parametrize(("share", "size"), [(1.0, 4), (0.75, 3), (0.5, 2), (0.01, 1)])
def test_the_cohort_is_a_share_of_the_clients_drawn_anew(share: float, size: int, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "", "{}", "local_only", Identity("w", "t", "x"))

    class Four(Script):
        @property
        def clients(self) -> tuple[ClientInfo, ...]:
            return tuple(ClientInfo(name, 1) for name in "abcd")

    four = Four([])
    loop = Loop(
        LocalOnly(),
        {"local_only": "pre_aggregation"},
        four,
        Server(BaseInfo({}), four.clients, 0),
        FederationSettings(8, share),
        folder,
        select="loss",
        listener=ProgressListener(),
    )

    def cohort(round_: int) -> tuple[str, ...]:
        return tuple(client.name for client in loop._cohort(replace(loop.server, round=round_), None, "abcd"))

    drawn = [cohort(round_) for round_ in range(30)]
    assert {len(cohort) for cohort in drawn} == {size}
    assert all(list(names) == sorted(set(names)) for names in drawn)
    assert drawn == [cohort(round_) for round_ in range(30)]
    if size < 4:
        assert len(set(drawn)) > 1
        assert {name for names in drawn for name in names} == {"a", "b", "c", "d"}


@dataclass(frozen=True)
class Chosen(LocalOnly):
    """Selects clients by name, whatever is allowed."""

    names: tuple[str, ...] = ()

    @override
    def select(self, server: Server, state: Any, available: Sequence[ClientInfo], count: int) -> Sequence[str]:
        return self.names


def play_chosen(folder: Path, *names: str) -> Script:
    """One round with these clients; at most 1 of the 2 clients may be selected."""
    engine = Script([{"a": 1.0, "b": 1.0}])
    Loop(
        Chosen(names=names),
        {"local_only": "pre_aggregation"},
        engine,
        Server(BaseInfo({}), engine.clients, 0),
        FederationSettings(rounds=1, cohort=0.5),
        RunFolder.create(folder, "", "{}", "local_only", Identity("w", "t", "x")),
        select="loss",
        listener=ProgressListener(),
    ).run()
    return engine


def test_a_method_selects_its_clients(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert ("update", 0, (name,)) in play_chosen(tmp_path / name, name).calls


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (("z",), r"Chosen.select: not available in round 0: z"),
        (("a", "a"), r"Chosen.select: round 0: a client is selected twice: a, a"),
        (("a", "b"), r"Chosen.select: 2 clients in round 0, not 1 to 1"),
        ((), r"Chosen.select: 0 clients in round 0, not 1 to 1"),
    ],
)
def test_a_selection_that_is_not_allowed_is_an_error(names: tuple[str, ...], error: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=error):
        play_chosen(tmp_path / "run", *names)


@pytest.mark.parametrize("method", ["local_only", "fedamole"])
def test_an_absent_client_keeps_its_last_model(method: str, runs: Any, facts: Any) -> None:
    """Adapters in the state of each client after each round: they change in the rounds of its cohort and then only."""
    seen: list[dict[str, bytes]] = []

    class Look(ProgressListener):
        def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
            folder = next(path for path in runs.folder.iterdir() if path not in known)
            states = {path: path.read_bytes() for path in sorted(folder.glob("clients/*/state/*"))}
            seen.append({path.parent.parent.name: content for path, content in states.items()})

    known = set(runs.folder.iterdir())
    folder = runs.fresh(method, "federation.cohort=0.5", "federation.rounds=4", listener=Look())
    present = cohorts(facts(folder))
    assert len({tuple(cohort) for cohort in present}) > 1
    before: dict[str, bytes] = {}
    for cohort, states in zip(present, seen, strict=True):
        for client in ("chat", "entail", "mood", "plain"):
            changed = states.get(client) != before.get(client)
            assert changed == (client in cohort)
        before = states
    validated = [(line["round"], line["client"]) for line in facts(folder) if line["split"] == "validation"]
    assert [i for i in validated if i[0] >= 0] == [
        (round_, client) for round_, cohort in enumerate(present) for client in cohort
    ]


def test_a_client_never_seen_is_scored_on_the_bare_base(runs: Any, facts: Any) -> None:
    folder = runs("fedamole", "federation.cohort=0.25", "federation.rounds=1")
    [[present]] = cohorts(facts(folder))
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    for client, scores in rows["fedamole"]["clients"].items():
        assert (scores == rows["base"]["clients"][client]) == (client != present)
        assert (folder / "clients" / client / "adapter").exists() == (client == present)


def test_the_personal_model_saved_is_the_best_rounds(runs: Any, facts: Any) -> None:
    """A rate that spoils what round 0 has learnt: the model saved is round 0's, the state is of round 2."""
    folder = runs("local_only", "training.learning_rate=3.0")
    summary = json.loads((folder / "summary.json").read_text())["rows"]["local_only"]
    means: dict[int, float] = {}
    for line in facts(folder):
        if line["split"] == "validation" and line["round"] >= 0:
            means[line["round"]] = means.get(line["round"], 0.0) + line["loss"]
    assert summary["best_round"] == min(means, key=lambda round_: means[round_])
    one_round = runs("local_only", "training.learning_rate=3.0", f"federation.rounds={summary['best_round'] + 1}")
    for client in ("chat", "mood"):
        file = f"clients/{client}/adapter/adapter_model.safetensors"
        assert (folder / file).read_bytes() == (one_round / file).read_bytes()
    assert summary["best_round"] < 2, "choose another rate: this test wants a best round that is not the last"
