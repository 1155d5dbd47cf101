"""Tables of a comparison from made-up run folders; the expected numbers are worked out by hand."""

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from fedamole.comparison.plot import check_plot, draw
from fedamole.comparison.records import FIELDS, as_csv, as_records
from fedamole.comparison.tables import Table, as_latex, as_markdown, build_tables, latex_text
from fedamole.errors import ConfigError, RunError
from fedamole.reporting.results import Scenario, TrialResult, best_validation_loss, gains, read_scenarios
from fedamole.reporting.significance import clear_best, gain, signed_rank, t_quantile

Make = Callable[..., TrialResult]


def row(scores: dict[str, float], losses: dict[str, float] | None = None, best_round: int | None = 1) -> dict[str, Any]:
    values = list(scores.values())
    mean = sum(values) / len(values)
    spread = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
    clients = {name: {"score": value} | ({"loss": losses[name]} if losses else {}) for name, value in scores.items()}
    return {
        "best_round": best_round,
        "mean": mean,
        "worst": min(values),
        "spread": spread,
        "last_mean": mean,
        "clients": clients,
    }


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a finished run's folder: a method with two clients, 2 rounds, 3 and 5 steps a round."""

    def write_run(
        method: str,
        seed: int,
        scores: dict[str, float],
        losses: dict[str, float] | None = None,
        *,
        scenario: str = "s",
        probed: int | None = None,
        weights: str = "w",
        rounds: int = 2,
        at_edge: bool = False,
        **counts: int,
    ) -> TrialResult:
        folder = tmp_path / scenario / f"{method}-s{seed}"
        folder.mkdir(parents=True)
        losses = losses or dict.fromkeys(scores, 1.0)
        steps = dict(zip(scores, (3, 5), strict=True))
        lines = [
            {"round": round_, "client": client, "split": "train", "steps": steps[client], "bytes_down": 1}
            | ({} if probed is None else {"probed": probed})
            | counts
            for round_ in range(rounds)
            for client in scores
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "run.json").write_text(
            json.dumps(
                {
                    "format": 1,
                    "fedamole": "0",
                    "id": "x",
                    "method": method,
                    "base": {"weights": weights, "tokenizer": "t", "targets": "x"},
                }
            )
        )
        (folder / "manifest.json").write_text(json.dumps({"clients": sorted(scores)}))
        (folder / "config.toml").write_text(
            f'[run]\nname = "{method}"\nseed = {seed}\n[method]\nname = "{method}"\n[base]\nmodel = "bundled"\n'
            f'quantization = "none"\n[federation]\nrounds = {rounds}\ncohort = 1.0\n[training]\nlocal_epochs = 0\n'
            "local_steps = 3\nbatch_size = 1\naccumulation = 1\nlearning_rate = 0.01\nlr_decay = 1.0\n"
            '[evaluation]\nselect = "loss"\ngeneration_score = "rouge_l"\n'
        )
        ends = {"base": row(dict.fromkeys(scores, 5.0), dict.fromkeys(scores, 4.0), None)}
        ends["majority"] = row(dict.fromkeys(scores, 6.0), None, None)
        costs = {"bytes_down_per_client_round": 2**20, "bytes_up_per_client_round": 2**19, "peak_memory_mib": 100.0}
        summary = {
            "format": 1,
            "method": method,
            "rounds": rounds,
            "rows": {method: row(scores, losses), **ends},
            "seconds_update": 7.0,
            "seconds_evaluate": 3.0,
            **costs,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        return TrialResult(scenario, method, method, seed, folder, at_edge)

    return write_run


@pytest.fixture
def two(make: Make) -> list[Scenario]:
    """Scenario s: ours 50/70 and 60/80 (means 60, 70), theirs 40/70 and 40/60 (means 55, 50)."""
    return read_scenarios(
        [
            make("ours", 0, {"a": 50.0, "b": 70.0}, {"a": 1.0, "b": 2.0}),
            make("ours", 1, {"a": 60.0, "b": 80.0}, {"a": 1.0, "b": 1.0}),
            make("theirs", 0, {"a": 40.0, "b": 70.0}, {"a": 2.0, "b": 2.5}),
            make("theirs", 1, {"a": 40.0, "b": 60.0}, {"a": 1.5, "b": 0.5}),
        ]
    )


def as_dict(table: Table) -> dict[str, dict[str, str]]:
    return {line[0]: dict(zip(table.head[1:], line[1:], strict=True)) for line in table.body}


def test_methods_of_a_scenario(two: list[Scenario]) -> None:
    """Ours: 60 and 70, deviation sqrt(2 * 25) = 7.1; losses 1.5 and 1.0; (3 + 5) / 2 clients = 4 steps a round."""
    result = as_dict(build_tables(two, "ours")[0])
    assert list(result) == ["base", "majority", "ours", "theirs"]
    assert result["ours"] == {
        "score": "65.0 ± 7.1",
        "worst client": "55.0 ± 7.1",
        "spread": "10.0 ± 0.0",
        "loss": "1.250 ± 0.354",
        "best round": "1 ± 0",
        "steps": "4.0",
        "MiB down": "1.000",
        "MiB up": "0.500",
        "seconds": "10",
        "memory MiB": "100",
        "learning rate": "0.01",
    }
    assert result["theirs"]["score"] == "52.5 ± 3.5"
    assert result["base"] == dict.fromkeys(result["ours"], "") | {
        "score": "5.0",
        "worst client": "5.0",
        "spread": "0.0",
        "loss": "4.000",
    }
    assert result["majority"]["loss"] == ""
    assert "seeds 0, 1" in build_tables(two, "ours")[0].caption


def test_the_best_is_starred_where_it_is_clearly_better_than_the_second(make: Make) -> None:
    """Scores lead by 10 at every client and seed; losses by 1, 1, 1 and -0.9: their interval is -0.99 to 2.04."""
    scores, losses = {"a": 50.0, "b": 70.0}, {"a": 2.0, "b": 2.0}
    better = {"a": 60.0, "b": 80.0}
    [scenario] = read_scenarios(
        [
            make("ours", 0, better, {"a": 1.0, "b": 1.0}),
            make("ours", 1, better, {"a": 1.0, "b": 2.9}),
            make("theirs", 0, scores, losses),
            make("theirs", 1, scores, losses),
            make("worse", 0, {"a": 0.0, "b": 0.0}),
            make("worse", 1, {"a": 90.0, "b": 10.0}),
        ]
    )
    methods, clients = (as_dict(table) for table in build_tables([scenario], "ours")[:2])
    assert methods["ours"]["score"] == "70.0 ± 0.0*"
    assert methods["ours"]["worst client"] == "60.0 ± 0.0*"
    assert methods["ours"]["loss"] == "1.475 ± 0.672"
    assert not any("*" in cell for name in ("theirs", "worse") for cell in methods[name].values())
    assert clients["ours"] == {"a": "60.0 ± 0.0*", "b": "80.0 ± 0.0*", "mean": "70.0 ± 0.0*"}
    assert "no star with one seed" in build_tables([scenario], "ours")[0].caption


def test_a_run_in_which_nothing_was_trained_gets_no_star(make: Make) -> None:
    tops = {"ours": 9.0, "theirs": 5.0, "worse": 1.0}
    trials = [make(name, seed, {"a": top, "b": top}) for name, top in tops.items() for seed in (0, 1)]
    path = trials[0].path / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"updates": 4, "left_out": 4}))
    methods, clients = (as_dict(table) for table in build_tables(read_scenarios(trials), "ours")[:2])
    assert [methods[name]["score"] for name in tops] == ["9.0 ± 0.0", "5.0 ± 0.0*", "1.0 ± 0.0"]
    assert [clients[name]["a"] for name in tops] == ["9.0 ± 0.0", "5.0 ± 0.0*", "1.0 ± 0.0"]


def test_one_seed_gets_no_star(make: Make) -> None:
    [scenario] = read_scenarios([make("ours", 0, {"a": 90.0, "b": 90.0}), make("theirs", 0, {"a": 1.0, "b": 1.0})])
    assert not any("*" in cell for table in build_tables([scenario], "ours") for line in table.body for cell in line)


def test_what_is_clearly_best() -> None:
    """Interval of 1, 2, 3: 2 -+ 4.303 / sqrt(3) = -0.48 to 4.48; of 10, 11, 12: 8.5 to 13.5."""
    zero = {("c", seed): 0.0 for seed in range(3)}

    def named(*values: float) -> dict[str, dict[tuple[Any, ...], float]]:
        return {"zero": zero, "other": {("c", seed): value for seed, value in enumerate(values)}}

    assert clear_best(named(1.0, 2.0, 3.0), higher=True) is None
    assert clear_best(named(10.0, 11.0, 12.0), higher=True) == "other"
    assert clear_best(named(10.0, 11.0, 12.0), higher=False) == "zero"
    assert clear_best(named(10.0), higher=True) is None, "one seed in common"
    assert clear_best(named(math.nan, 11.0, 12.0), higher=True) is None, "a diverged run is never best"
    assert clear_best(named(0.0, 0.0, 0.0), higher=True) is None
    assert clear_best({"zero": zero}, higher=True) is None


def test_work_and_learning_rate_are_columns(make: Make) -> None:
    """Two clients and rounds of 1,500 tokens each make 3,000 per client; a run without counts has empty cells."""
    scores = {"a": 1.0, "b": 1.0}
    counts = {"forward_tokens": 20, "backward_tokens": 1500, "trained_parameters": 250_000}
    scenarios = read_scenarios([make("ours", 0, scores, at_edge=True, **counts), make("older", 0, scores)])
    lines = as_dict(build_tables(scenarios, "ours")[0])
    columns = ("forward tokens", "backward tokens", "trained parameters", "learning rate")
    assert [lines["ours"][column] for column in columns] == ["40", "3.00k", "250k", "0.01 (edge)"]
    assert [lines["older"][column] for column in columns] == ["", "", "", "0.01"]
    caption = build_tables(scenarios, "ours")[0].caption
    assert "backward tokens: read in forward and backward passes" in caption
    assert "(edge): the lowest or highest learning rate tried" in caption
    records = [record for record in as_records(scenarios, "ours") if record["table"] == "methods"]
    numbers = {(record["method"], record["measure"]): record["mean"] for record in records}
    assert numbers["ours", "backward_tokens"] == 3000.0
    assert (numbers["ours", "learning_rate_at_edge"], numbers["older", "learning_rate_at_edge"]) == (1.0, 0.0)


def test_methods_of_another_size_are_marked_where_sizes_were_to_match(make: Make) -> None:
    """Of 1,000 numbers, 1,100 are within a tenth and 1,101 are not."""
    scores, sizes = {"a": 1.0, "b": 1.0}, {"ours": 1000, "near": 1100, "far": 1101, "small": 899}
    scenarios = read_scenarios([make(name, 0, scores, trained_parameters=size) for name, size in sizes.items()])

    def column(matched: bool) -> dict[str, str]:
        return {
            name: line["trained parameters"]
            for name, line in as_dict(build_tables(scenarios, "ours", matched)[0]).items()
        }

    assert column(matched=False) == {
        "base": "",
        "majority": "",
        "ours": "1.00k",
        "near": "1.10k",
        "far": "1.10k",
        "small": "899",
    }
    assert column(matched=True) == column(matched=False) | {
        "far": "1.10k (not matched)",
        "small": "899 (not matched)",
    }
    assert "differs by more than 10% from that of ours" in build_tables(scenarios, "ours", matched=True)[0].caption


def test_a_diverged_run_is_in_the_tables(make: Make, tmp_path: Path) -> None:
    scores, lost = {"a": 1.0, "b": 1.0}, {"a": math.nan, "b": 1.0}
    scenarios = read_scenarios(
        [
            make("ours", 0, scores, lost),
            make("ours", 1, scores),
            make("theirs", 0, scores),
            make("theirs", 1, scores),
        ]
    )
    assert as_dict(build_tables(scenarios, "ours")[0])["ours"]["loss"] == "nan ± nan"
    assert as_csv(as_records(scenarios, "ours"))
    draw(tmp_path / "p.svg", scenarios)


def test_clients_of_a_scenario(two: list[Scenario]) -> None:
    """More methods than clients: methods go down; without two of them, across."""
    result = as_dict(build_tables(two, "ours")[1])
    assert result["ours"] == {"a": "55.0 ± 7.1", "b": "75.0 ± 7.1", "mean": "65.0 ± 7.1"}
    assert result["theirs"]["b"] == "65.0 ± 7.1"
    few = replace(two[0], methods={name: two[0].methods[name] for name in ("base", "ours")})
    result = as_dict(build_tables([few], "ours")[1])
    assert result["a"] == {"base": "5.0", "ours": "55.0 ± 7.1"}
    assert result["mean"]["ours"] == "65.0 ± 7.1"


def test_gains_over_pairs_and_clients(two: list[Scenario]) -> None:
    """Differences a 10, 20 and b 0, 20: mean 12.5, deviation sqrt(275 / 3), t(0.975, 3) = 3.1824."""
    score, loss = gains(two, "ours")
    assert (score.scenario, score.method, score.measure) == ("s", "theirs", "score")
    result = score.gain
    assert (result.pairs, result.wins, result.ties, result.losses) == (4, 3, 1, 0)
    assert result.mean == 12.5
    half = 3.182446305284263 * math.sqrt(275 / 3) / 2
    assert (result.low, result.high) == pytest.approx((12.5 - half, 12.5 + half))
    assert result.p_pairs == pytest.approx(stats.wilcoxon([10.0, 20.0, 0.0, 20.0]).pvalue)
    assert result.p_clients == pytest.approx(stats.wilcoxon([15.0, 10.0]).pvalue)
    # Losses: a 1 - 2, 1 - 1.5; b 2 - 2.5, 1 - 0.5: lower is better, so three wins and a loss.
    assert (loss.measure, loss.gain.mean, loss.gain.wins, loss.gain.losses) == ("loss", -0.375, 3, 1)
    assert loss.gain.p_pairs == stats.wilcoxon([-1.0, -0.5, -0.5, 0.5]).pvalue
    line = build_tables(two, "ours")[-1].body[0]
    assert line[:5] == ("s", "theirs", "score", "4", "+12.5")
    assert line[5] == "-2.7 to +27.7"
    assert line[-1] == "3 / 1 / 0"


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 10, 29, 30, 101, 2000])
def test_t_quantiles_are_those_of_scipy(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 7, 13, 14, 50, 51, 80])
@pytest.mark.parametrize("ties", [False, True])
def test_signed_rank_p_values_are_those_of_scipy(count: int, ties: bool) -> None:
    """Exact for few differences, approximate for many; ties and zeros lower the limit."""
    values = [math.sin(17 * index + 1) + 0.2 for index in range(count)]
    if ties:
        values = [float(round(3 * value)) for value in values]
    assert any(values)
    assert signed_rank(values) == pytest.approx(stats.wilcoxon(values).pvalue, rel=1e-12)


def test_six_pairs_of_one_sign_have_a_known_p() -> None:
    """All 2^6 signs are as likely: the two extreme ones make 2 / 64."""
    assert signed_rank([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx(2 / 64)
    assert signed_rank([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]) == pytest.approx(2 / 64)


def test_ties_and_single_pairs() -> None:
    tied = gain({("a", 0): 0.0, ("b", 0): 0.0}, higher=True)
    assert (tied.p_pairs, tied.p_clients, tied.ties, tied.low, tied.high) == (1.0, 1.0, 2, 0.0, 0.0)
    single = gain({("a", 0): 3.0}, higher=True)
    assert math.isnan(single.low)
    assert (single.mean, single.p_pairs) == (3.0, 1.0)
    assert math.isnan(signed_rank([1.0, math.nan]))


def test_only_pairs_that_both_have_count_and_missing_seeds_are_named(make: Make) -> None:
    [scenario] = read_scenarios(
        [
            make("ours", 0, {"a": 50.0, "b": 70.0}),
            make("ours", 1, {"a": 0.0, "b": 0.0}),
            make("theirs", 0, {"a": 40.0, "b": 50.0}),
        ]
    )
    assert gains([scenario], "ours")[0].gain.pairs == 2
    assert gains([scenario], "ours")[0].gain.mean == 15.0
    assert "theirs (1 of 2 seeds)" in as_dict(build_tables([scenario], "ours")[0])


def test_scenarios_side_by_side(make: Make) -> None:
    """Ours: 60 and 20 make 40 with seed 0, 70 and 40 make 55 with seed 1. Theirs lacks a scenario: no average."""
    scenarios = read_scenarios(
        [
            make("ours", 0, {"a": 50.0, "b": 70.0}),
            make("ours", 1, {"a": 60.0, "b": 80.0}),
            make("theirs", 0, {"a": 50.0, "b": 60.0}),
            make("ours", 0, {"x": 10.0, "y": 30.0}, scenario="t"),
            make("ours", 1, {"x": 40.0, "y": 40.0}, scenario="t"),
        ]
    )
    by_title = {table.title: table for table in build_tables(scenarios, "ours")}
    lines = as_dict(by_title["methods over scenarios"])
    assert lines["ours"] == {"s": "65.0 ± 7.1", "t": "30.0 ± 14.1", "average": "47.5 ± 10.6"}
    assert lines["theirs"] == {"s": "55.0", "t": "", "average": ""}
    assert lines["base"]["average"] == "5.0"
    assert {line.scenario for line in gains(scenarios, "ours")} == {"s"}, "one scenario alone is not pooled"


def test_pairs_of_all_scenarios_are_pooled(make: Make) -> None:
    """Differences 10, 20 in s and 30, 40 in t; clients of the same name in two scenarios stay two."""
    scenarios = read_scenarios(
        [
            make("ours", 0, {"a": 50.0, "b": 70.0}),
            make("theirs", 0, {"a": 40.0, "b": 50.0}),
            make("ours", 0, {"a": 60.0, "b": 70.0}, scenario="t"),
            make("theirs", 0, {"a": 30.0, "b": 30.0}, scenario="t"),
        ]
    )
    pooled = next(line.gain for line in gains(scenarios, "ours") if line.scenario == "all scenarios")
    assert (pooled.pairs, pooled.mean, pooled.wins) == (4, 25.0, 4)
    assert pooled.p_clients == stats.wilcoxon([10.0, 20.0, 30.0, 40.0]).pvalue


def test_other_data_make_no_table(make: Make) -> None:
    trials = [make("ours", 0, {"a": 1.0, "b": 1.0}), make("theirs", 0, {"a": 1.0, "b": 1.0}, weights="other")]
    with pytest.raises(RunError, match=r"theirs-s0 .*had different data, splits or base"):
        read_scenarios(trials)


def test_examples_read_forward_only_are_shown_where_a_method_has_them(make: Make) -> None:
    [scenario] = read_scenarios(
        [
            make("ours", 0, {"a": 1.0, "b": 1.0}, probed=10),
            make("theirs", 0, {"a": 1.0, "b": 1.0}),
        ]
    )
    lines = as_dict(build_tables([scenario], "ours")[0])
    assert (lines["ours"]["probed"], lines["theirs"]["probed"]) == ("10.0", "")


def test_rounds_that_differ_are_named_in_the_caption(make: Make) -> None:
    [scenario] = read_scenarios(
        [
            make("ours", 0, {"a": 1.0, "b": 1.0}, rounds=2),
            make("theirs", 0, {"a": 1.0, "b": 1.0}, rounds=6),
        ]
    )
    caption = build_tables([scenario], "ours")[0].caption
    assert "Rounds: ours 2, theirs 6." in caption


def test_the_choice_of_a_rate_reads_validation_at_the_best_round(make: Make) -> None:
    """Best round 1: a has 2.0 there; b sat out after round 0 (4.0), so (2 + 4) / 2 = 3. Test is unread."""
    path = make("ours", 0, {"a": 1.0, "b": 1.0}).path
    losses = [
        (-1, "base", "a", 9.0),
        (-1, "base", "b", 9.0),
        (0, "ours", "a", 8.0),
        (0, "ours", "b", 4.0),
        (1, "ours", "a", 2.0),
        (1, "ours_ft", "b", 0.0),
        (2, "ours", "b", 0.1),
    ]
    with (path / "metrics.jsonl").open("a") as file:
        for round_, method, client, loss in losses:
            line = {"round": round_, "split": "validation", "method": method, "client": client, "loss": loss}
            file.write(json.dumps(line) + "\n")
        file.write(json.dumps({"round": 1, "split": "test", "method": "ours", "client": "a", "loss": 0.0}) + "\n")
    assert best_validation_loss(path, "ours") == 3.0
    # Best rounds of each client's own: a 2.0 in round 1, b 0.1 in round 2; then b never had one, its base counts.
    summary = json.loads((path / "summary.json").read_text())
    for own, expected in (({"a": 1, "b": 2}, 1.05), ({"a": 1}, 5.5)):
        summary["rows"]["ours"]["best_round"] = own
        (path / "summary.json").write_text(json.dumps(summary))
        assert best_validation_loss(path, "ours") == pytest.approx(expected)


def test_a_run_whose_every_update_failed_is_infinitely_bad(make: Make) -> None:
    """What it scored is the untrained base; a single update that did not fail makes the loss count."""
    path = make("ours", 0, {"a": 1.0, "b": 1.0}).path
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    scored = [{"round": 0, "split": "validation", "method": "ours", "client": name, "loss": 2.0} for name in "ab"]
    for failed, expected in ((len(lines), math.inf), (len(lines) - 1, 2.0)):
        records = [line | {"failed": "diverged"} if index < failed else line for index, line in enumerate(lines)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*records, *scored]))
        assert best_validation_loss(path, "ours") == expected


def test_csv_parses_back(two: list[Scenario]) -> None:
    lines = list(csv.DictReader(io.StringIO(as_csv(as_records(two, "ours")))))
    assert tuple(lines[0]) == FIELDS
    [score] = [
        line for line in lines if (line["table"], line["method"], line["measure"]) == ("methods", "ours", "score")
    ]
    assert (float(score["mean"]), score["n"]) == (65.0, "2")
    assert float(score["sd"]) == pytest.approx(math.sqrt(50))
    [client] = [
        line
        for line in lines
        if (line["table"], line["method"], line["client"], line["measure"]) == ("clients", "theirs", "b", "score")
    ]
    assert float(client["mean"]) == 65.0
    [difference] = [line for line in lines if line["table"] == "gains" and line["measure"] == "score"]
    assert (float(difference["mean"]), difference["n"], difference["wins"]) == (12.5, "4", "3")
    assert json.loads(json.dumps(as_records(two, "ours")))[0]["table"] == "methods"


def test_latex_escapes() -> None:
    assert latex_text(r"a_b & 5% ± 1* \x {y} <") == (r"a\_b \& 5\% $\pm$ 1$^{*}$ \textbackslash{}x \{y\} $<$")
    text = as_latex([Table("t_1", "100 %", ("m", "x"), (("a_b", "1.0"),))])
    assert r"a\_b & 1.0 \\" in text
    assert r"\begin{tabular}{lr}" in text
    assert r"100 \%" in text


def test_markdown_has_as_many_cells_in_every_line(two: list[Scenario]) -> None:
    for block in as_markdown(build_tables(two, "ours")).split("### ")[1:]:
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1
    assert as_markdown([Table("t", "", ("m",), (("a|b*",),))]).splitlines()[-3] == r"| a\|b\* |"


def test_the_picture(two: list[Scenario], tmp_path: Path) -> None:
    draw(tmp_path / "p.svg", two)
    draw(tmp_path / "q.svg", two)
    draw(tmp_path / "p.png", two)
    assert (tmp_path / "p.svg").read_bytes() == (tmp_path / "q.svg").read_bytes()
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"p\.jpeg: the name must end with"):
        check_plot(tmp_path / "p.jpeg")
