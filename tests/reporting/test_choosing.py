"""Each client's choice among finished runs, from made-up runs; the expected choices are worked out by hand."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from tests.made_runs import Losses, made_run

from fedamole.cli import main as cli
from fedamole.comparison.choice_table import as_json, choice_table, explanation
from fedamole.comparison.chosen_row import scenario_with_chosen
from fedamole.comparison.records import as_records
from fedamole.comparison.tables import build_tables
from fedamole.errors import ConfigError, RunError
from fedamole.reporting.choosing import Candidate, Choice, choose, read_candidates
from fedamole.reporting.results import CHOSEN, gains, read_scenarios, runs_of

ALONE = "local_only"
TEST = {ALONE: {"a": 50.0, "b": 60.0}, "fedit": {"a": 40.0, "b": 80.0}}


def no_error(client: str, candidate: Candidate, other: Candidate) -> float:
    raise AssertionError("no standard error is needed")


def chosen(choices: list[Choice]) -> dict[str, str]:
    return {choice.client: choice.chosen.label for choice in choices}


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def write(name: str, method: str, *losses: dict[str, float], **more: Any) -> Path:
        tests = {method: more.pop("test", TEST.get(method, {"a": 1.0, "b": 1.0}))}
        return made_run(tmp_path / "runs" / name, method, {method: list(losses)}, tests, **more).path

    return write


def both(a: float, b: float) -> dict[str, float]:
    return {"a": a, "b": b}


def test_each_client_takes_what_its_own_validation_prefers(make: Any) -> None:
    """At the best rounds: local_only 2 and 2 in round 1, fedit 2.1 and 1 in round 0."""
    paths = [
        make("alone", ALONE, both(3.0, 3.0), both(2.0, 2.0)),
        make("fedit", "fedit", both(2.1, 1.0), both(1.0, 9.0)),
    ]
    candidates = read_candidates(paths, ALONE)
    choices = choose(candidates, 0.0, no_error)
    assert chosen(choices) == {"a": ALONE, "b": "fedit"}
    assert [choice.alone.label for choice in choices if choice.alone] == [ALONE, ALONE]
    table = choice_table(candidates, choices, ALONE, 0.0)
    head = ("client", "chosen", "validation loss", "of local_only", "score", "score - local_only", "loss")
    assert table.head == (*head, "loss - local_only")
    assert table.body == (
        ("a", ALONE, "2.000", "2.000", "50.0", "+0.0", "0.500", "+0.000"),
        ("b", "fedit", "1.000", "2.000", "80.0", "+20.0", "0.800", "+0.200"),
        ("mean", "", "", "", "65.0", "+10.0", "0.650", "+0.100"),
    )
    # Two runs of two rounds: 2 x 2 x 200 tokens, and 2 x 2 x 2000 bytes a client.
    assert "All 2 runs had to be trained for it: 800 tokens of training and 0.00763 MiB of traffic" in table.caption
    written = as_json(candidates, choices, ALONE, 0.0)
    assert written["cost"] == {"runs": 2, "tokens": 800.0, "bytes": 8000.0}
    assert written["mean"] == {"score": 65.0, "alone_score": 55.0, "loss": 0.65, "alone_loss": 0.55}
    assert written["clients"][1]["run"] == str(paths[1])
    json.dumps(written)


def test_best_rounds_of_each_clients_own_are_those_compared(make: Any) -> None:
    """fedit's b was best in round 1; a, absent in round 1, has the model of round 0."""
    alone = make("alone", ALONE, both(2.0, 2.0))
    fedit = make("fedit", "fedit", both(1.0, 3.0), {"b": 1.5}, {"a": 5.0, "b": 5.0}, best={"a": 0, "b": 1})
    candidates = read_candidates([alone, fedit], ALONE)
    assert [candidate.validation for candidate in candidates] == [both(2.0, 2.0), both(1.0, 1.5)]
    of_all = make("all", "fedit", both(1.0, 3.0), {"b": 1.5}, {"a": 5.0, "b": 5.0}, best=1)
    assert read_candidates([of_all], "fedit")[0].validation == both(1.0, 1.5)


def test_by_score_where_the_score_chooses_the_best_round(make: Any) -> None:
    """The scores are 100 - loss."""
    paths = [make(method, method, both(1.0, two), select="score") for method, two in ((ALONE, 2.0), ("fedit", 1.0))]
    candidates = read_candidates(paths, ALONE)
    choices = choose(candidates, 0.0, no_error)
    assert chosen(choices) == {"a": ALONE, "b": "fedit"}
    line = choice_table(candidates, choices, ALONE, 0.0)
    assert (line.head[2], line.body[1][2:4]) == ("validation score", ("99.0", "98.0"))
    with pytest.raises(ConfigError, match=r"--margin 1 is in standard errors of the validation loss.*leave it out"):
        choose(candidates, 1.0, no_error)


def test_of_equal_models_training_alone_then_the_cheaper_is_taken(make: Any) -> None:
    """All have 1 at a. At b training alone is worse, and of the others the one that sends less is taken."""
    paths = [
        make("dear", "dear", both(1.0, 1.0), sent=10),
        make("cheap", "cheap", both(1.0, 1.0), sent=9),
        make("alone", ALONE, both(1.0, 2.0), sent=1000),
    ]
    for order in (paths, paths[::-1]):
        assert chosen(choose(read_candidates(order, ALONE), 0.0, no_error)) == {"a": ALONE, "b": "cheap"}


def test_a_lead_within_the_margin_is_left_to_noise(make: Any) -> None:
    """Both clients see a lead of 0.1. With a standard error of 0.06 that is a lead of 1.67 of them, with 0.2 of 0.5.

    Without the margin a would lose 10 points of test score against training alone.
    """
    paths = [make("alone", ALONE, both(1.0, 1.0)), make("fedit", "fedit", both(0.9, 0.9))]
    candidates = read_candidates(paths, ALONE)

    def error(client: str, candidate: Candidate, other: Candidate) -> float:
        assert (candidate.label, other.label) == ("fedit", ALONE)
        return {"a": 0.2, "b": 0.06}[client]

    def worst(margin: float) -> float:
        records = as_json(candidates, choose(candidates, margin, error), ALONE, margin)["clients"]
        return float(min(record["score"] - record["alone_score"] for record in records))

    assert chosen(choose(candidates, 0.0, no_error)) == {"a": "fedit", "b": "fedit"}
    assert worst(0.0) == -10.0
    assert chosen(choose(candidates, 1.0, error)) == {"a": ALONE, "b": "fedit"}
    assert worst(1.0) == 0.0
    assert chosen(choose(candidates, 1.7, error)) == {"a": ALONE, "b": ALONE}
    assert "only for a lead of more than 1.7 standard errors" in explanation("loss", ALONE, 1.7)


def test_the_next_best_candidate_may_pass_the_margin(make: Any) -> None:
    """wild leads by most, but within its noise; calm leads by less, and clearly."""
    paths = [
        make("alone", ALONE, both(1.0, 1.0)),
        make("wild", "wild", both(0.5, 0.5)),
        make("calm", "calm", both(0.8, 2)),
    ]
    candidates = read_candidates(paths, ALONE)
    errors = {"wild": 1.0, "calm": 0.01}
    assert chosen(choose(candidates, 2.0, lambda _, item, other: errors[item.label])) == {"a": "calm", "b": ALONE}


def test_diverged_models_are_not_chosen(make: Any) -> None:
    """Training alone diverged at b: any finite model is better, whatever the margin."""
    paths = [make("alone", ALONE, both(1.0, math.nan), best=0), make("fedit", "fedit", both(math.nan, 9.0), best=0)]
    for margin in (0.0, 2.0):
        assert chosen(choose(read_candidates(paths, ALONE), margin, no_error)) == {"a": ALONE, "b": "fedit"}


def test_variants_and_several_seeds_are_candidates(tmp_path: Path) -> None:
    """Training alone is there with two seeds; each client compares with the seed that its validation prefers."""
    losses: dict[str, Losses] = {"fedit": [both(9.0, 9.0)], "fedit_ft": [both(0.5, 1.5)]}
    tests = {"fedit": both(1.0, 1.0), "fedit_ft": both(2.0, 2.0)}
    paths = [made_run(tmp_path / "fedit", "fedit", losses, tests).path]
    for seed, loss in enumerate((2.0, 1.0)):
        paths.append(made_run(tmp_path / f"s{seed}", ALONE, {ALONE: [both(loss, loss)]}, TEST, seed=seed).path)
    candidates = read_candidates(paths, ALONE)
    seeds = [f"{ALONE} in {path}" for path in paths[1:]]
    assert [candidate.label for candidate in candidates] == ["fedit", "fedit_ft", *seeds]
    choices = choose(candidates, 0.0, no_error)
    assert chosen(choices) == {"a": "fedit_ft", "b": seeds[1]}
    assert [choice.alone.label for choice in choices if choice.alone] == [seeds[1], seeds[1]]
    assert as_json(candidates, choices, ALONE, 0.0)["cost"]["runs"] == 3


def test_a_client_that_never_trained_has_the_untuned_base(make: Any) -> None:
    paths = [make("alone", ALONE, both(5.0, 5.0)), make("fedit", "fedit", {"a": 1.0}, best={"a": 0})]
    candidates = read_candidates(paths, ALONE)
    choices = choose(candidates, 0.0, no_error)
    assert chosen(choices) == {"a": "fedit", "b": "fedit"}
    assert candidates[1].untuned == {"b"}
    assert choice_table(candidates, choices, ALONE, 0.0).body[1][1] == "fedit (untuned base)"


def test_runs_that_no_client_can_choose_between(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    alone = make("alone", ALONE, both(1.0, 1.0))
    other = make("other", "fedit", both(1.0, 1.0), weights="v")
    with pytest.raises(
        RunError, match=r"other and .*alone had different data, splits or base, so no client can choose"
    ):
        read_candidates([alone, other], ALONE)
    score = make("score", "fedit", both(1.0, 1.0), select="score")
    with pytest.raises(RunError, match=r"best rounds of .*alone were chosen by loss, those of .*score by score"):
        read_candidates([alone, score], ALONE)
    failed = make("failed", "fedit", both(1.0, 1.0), failed=True)
    with pytest.raises(RunError, match=r"failed: all 2 updates failed, so nothing was trained"):
        read_candidates([alone, failed], ALONE)
    fedit = make("fedit", "fedit", both(1.0, 1.0))
    unfinished = make("unfinished", "fedit", both(1.0, 1.0))
    (unfinished / "summary.json").unlink()
    with pytest.raises(RunError, match=r"unfinished is not finished: summary.json is missing; `fedamole resume"):
        read_candidates([alone, unfinished], ALONE)
    with caplog.at_level(logging.WARNING):
        [candidate] = read_candidates([fedit], ALONE)
    assert "local_only is not among the runs, so nothing shows" in caplog.text
    choices = choose([candidate], 0.0, no_error)
    assert [choice.alone for choice in choices] == [None, None]
    table = choice_table([candidate], choices, ALONE, 0.0)
    assert ALONE not in table.caption
    assert "One run had to be trained for it" in table.caption
    assert table.body[0] == (
        "a",
        "fedit",
        "1.000",
        "",
        "40.0",
        "",
        "0.400",
        "",
    )
    with pytest.raises(ConfigError, match=r"--margin 1 is a lead over training alone, which is missing: add its run"):
        choose([candidate], 1.0, no_error)


def test_a_run_of_a_folder_that_trained_nothing_is_left_out(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = make("failed", "fedit", both(0.5, 0.5), failed=True).parent
    with pytest.raises(RunError, match=r"no run in .*runs has trained anything"):
        read_candidates([folder], ALONE)
    make("alone", ALONE, both(1.0, 1.0))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        candidates = read_candidates([folder], ALONE)
    assert [candidate.label for candidate in candidates] == [ALONE]
    assert "all 2 updates failed, so nothing was trained and the scores are meaningless; it is left out" in caplog.text


def test_the_command(make: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder = make("alone", ALONE, both(2.0, 2.0)).parent
    make("fedit", "fedit", both(3.0, 1.0))
    for words, shown in (
        (["--json"], '"chosen": "fedit"'),
        ([], "score - local_only"),
        (["--alone", "fedit"], "of fedit"),
    ):
        monkeypatch.setattr("sys.argv", ["fedamole", "choose", str(folder), *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        assert shown in capsys.readouterr().out


# --- in a comparison --------------------------------------------------------------------------------------------


@pytest.fixture
def trials(tmp_path: Path) -> list[Any]:
    """With seed 0 b prefers fedit, with seed 1 both do."""
    actual = []
    for seed, a in enumerate((9.0, 0.5)):
        for method, losses in ((ALONE, both(1.0, 1.0)), ("fedit", both(a, 0.5))):
            path = tmp_path / f"{method}-s{seed}"
            actual.append(made_run(path, method, {method: [losses]}, {method: TEST[method]}, seed=seed))
    return actual


def test_chosen_is_a_row_of_a_comparison(trials: list[Any]) -> None:
    """Scores 50 and 80 with seed 0, 40 and 80 with seed 1; two runs of 200 tokens and 10 s each."""
    [plain] = read_scenarios(trials)
    actual = scenario_with_chosen(plain, trials, runs_of(trials), ALONE, 0.0, no_error)
    tables = build_tables([actual], "fedit", chosen="chosen: so and so.", target=ALONE)
    lines = {line[0]: dict(zip(tables[0].head[1:], line[1:], strict=True)) for line in tables[0].body}
    assert list(lines) == ["base", "majority", ALONE, "fedit", CHOSEN]
    shown = {"score": "62.5 ± 3.5", "worst client": "45.0 ± 7.1", "backward tokens": "400", "seconds": "20"}
    assert lines[CHOSEN] == {**lines[CHOSEN], **shown, "learning rate": "", "memory MiB": "100", "best round": ""}
    assert "chosen: so and so." in tables[0].caption
    assert "Rounds: 1 for all." in tables[0].caption
    against = {(line.method, line.measure): line.gain for line in gains([actual], CHOSEN)}
    assert against[ALONE, "score"].mean == pytest.approx(7.5)  # 0, 20, -10, 20
    assert (against[ALONE, "score"].wins, against[ALONE, "score"].losses) == (2, 1)
    assert set(against) == {(name, measure) for name in (ALONE, "fedit") for measure in ("score", "loss")}
    assert [table.title for table in tables[-2:]] == ["fedit minus each other method", "chosen minus each other method"]
    assert "chosen" in tables[1].head or any("chosen" in line[0] for line in tables[1].body)
    records = as_records([actual], "fedit")
    assert {record["measure"] for record in records if record["method"] == CHOSEN} >= {"score", "loss", "mib_up"}
    assert not any(record["method"] == CHOSEN and record["measure"] == "learning_rate" for record in records)
    assert {record["method"] for record in records if record["table"] == "gains of chosen"} == {ALONE, "fedit"}


def test_the_row_takes_no_star_from_a_method(tmp_path: Path) -> None:
    """fedit is clearly better at a and local_only at b, so that chosen leads; the star stays with the better method."""
    made = []
    for seed in (0, 1):
        for method, losses, test in (
            (ALONE, both(1.0, 2.0), both(9.0, 1.0)),
            ("fedit", both(2.0, 1.0), both(8.0, 90.0)),
        ):
            made.append(made_run(tmp_path / f"{method}{seed}", method, {method: [losses]}, {method: test}, seed=seed))
    [plain] = read_scenarios(made)
    actual = scenario_with_chosen(plain, made, runs_of(made), ALONE, 0.0, no_error)
    before, after = (build_tables([item], "fedit")[0].body for item in (plain, actual))
    assert after[:-1] == before
    assert not any("*" in cell for cell in after[-1])


def test_a_seed_that_a_method_has_not_finished_has_no_row(trials: list[Any]) -> None:
    [plain] = read_scenarios(trials[:3])
    actual = scenario_with_chosen(plain, trials[:3], runs_of(trials[:3]), ALONE, 0.0, no_error)
    assert [result.seed for result in actual.methods[CHOSEN]] == [0]
    assert actual.label(CHOSEN) == "chosen (1 of 2 seeds)"
    [only] = read_scenarios([trials[0], trials[3]])
    assert (
        CHOSEN not in scenario_with_chosen(only, [trials[0], trials[3]], runs_of(trials), ALONE, 0.0, no_error).methods
    )


def test_a_method_that_trained_nothing_is_no_candidate(tmp_path: Path, trials: list[Any]) -> None:
    better = {"broken": [both(0.1, 0.1)]}
    broken = [
        made_run(tmp_path / f"broken{seed}", "broken", better, {"broken": both(1.0, 1.0)}, seed=seed, failed=True)
        for seed in (0, 1)
    ]
    [plain] = read_scenarios([*trials, *broken])
    actual = scenario_with_chosen(plain, [*trials, *broken], runs_of([*trials, *broken]), ALONE, 0.0, no_error)
    assert [result.measures["score"] for result in actual.methods[CHOSEN]] == [65.0, 60.0]
