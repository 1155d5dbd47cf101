"""The table of `fedamole show`, from summaries with known results."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedamole.errors import RunError
from fedamole.reporting.run_table import as_markdown, as_text, mean_and_deviation, run_tables
from fedamole.reporting.runs import Run, read_runs
from fedamole.reporting.work import short_count


def row(best_round: int | dict[str, int] | None, last_mean: float, **scores: float) -> dict[str, Any]:
    values = list(scores.values())
    mean = sum(values) / len(values)
    spread = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
    clients = {name: {"score": value} for name, value in scores.items()}
    results = {"best_round": best_round, "mean": mean, "worst": min(values), "spread": spread}
    return {**results, "last_mean": last_mean, "clients": clients}


def run(method: str, seed: int = 0, name: str = "run", partition: str = "p", **scores: float) -> Run:
    shared = {"base": row(None, 1.0, a=1.0, b=1.0), "majority": row(None, 2.0, a=2.0, b=2.0)}
    traffic = {"bytes_down_per_client_round": 2048.0, "bytes_up_per_client_round": 1024.0}
    summary = {"method": method, "rounds": 4, "rows": {method: row(3, 9.0, **scores), **shared}, **traffic}
    return Run(Path(f"{method}-{seed}"), {"run": {"name": name, "seed": seed}}, partition, summary)


def test_a_cell_is_mean_and_sample_deviation() -> None:
    """Mean of 10, 20, 30 is 20; the sample deviation is sqrt((100 + 0 + 100) / 2) = 10."""
    assert mean_and_deviation([]) == ""
    assert mean_and_deviation([1.25]) == "1.2"
    assert mean_and_deviation([10.0, 20.0, 30.0]) == "20.0 ± 10.0"
    assert mean_and_deviation([3.0, 5.0], 0) == "4 ± 1"


def test_seeds_of_one_method_are_one_column() -> None:
    [table] = run_tables(
        [run("fedit", 0, a=10.0, b=20.0), run("fedit", 1, a=30.0, b=40.0), run("fedamole", a=5.0, b=5.0)]
    )
    assert [column.label for column in table.columns] == ["base", "majority", "fedit", "fedamole"]
    assert table.seeds == (0, 1)
    fedit = table.columns[2]
    assert fedit.clients == {"a": [10.0, 30.0], "b": [20.0, 40.0]}
    assert fedit.lines["mean"] == [15.0, 35.0]
    assert fedit.lines["worst client"] == [10.0, 30.0]
    assert table.columns[0].clients == {"a": [1.0], "b": [1.0]}, "the base is the same for all, and there once"


def test_individual_best_rounds_are_shown_as_their_mean() -> None:
    own = run("fedit", a=10.0, b=20.0)
    own.summary["rows"]["fedit"]["best_round"] = {"a": 1, "b": 4}
    [table] = run_tables([own])
    assert table.columns[2].lines["best round"] == [2.5]
    nobody = run("fedit", a=10.0, b=20.0)
    nobody.summary["rows"]["fedit"]["best_round"] = {}
    assert run_tables([nobody])[0].columns[2].lines["best round"] == [-1.0]


def test_named_variants_are_columns_of_their_own() -> None:
    [table] = run_tables([run("fedamole", a=1.0, b=1.0), run("fedamole", name="fedamole-static", a=2.0, b=2.0)])
    assert [column.label for column in table.columns][2:] == ["fedamole", "fedamole-static"]


def test_runs_on_different_data_are_never_in_one_table() -> None:
    assert len(run_tables([run("fedit", a=1.0, b=1.0), run("local_only", partition="q", a=1.0, b=1.0)])) == 2


def test_a_star_needs_a_difference_that_is_clear_over_the_seeds() -> None:
    """Client a: fedit leads by 8, 10 and 12, whose interval excludes 0. Client b: by 9, 0 and 0, whose does not."""
    leads = [(8.0, 9.0), (10.0, 0.0), (12.0, 0.0)]
    ours = [run("fedit", seed, a=20.0 + lead, b=5.0 + other) for seed, (lead, other) in enumerate(leads)]
    theirs = [run("local_only", seed, a=20.0, b=5.0) for seed in range(3)]
    [result] = run_tables([*ours, *theirs])
    table = {line[0]: line[1:] for line in as_text(result)}
    assert table["a"] == ["1.0", "2.0", "30.0 ± 2.0*", "20.0 ± 0.0"]
    assert table["b"] == ["1.0", "2.0", "8.0 ± 5.2", "5.0 ± 0.0"]
    assert table["mean"] == ["1.0", "2.0", "19.0 ± 1.8*", "12.5 ± 0.0"]
    assert table["worst client"][2] == "8.0 ± 5.2"
    assert table["mean, last round"] == ["", "", "9.0 ± 0.0", "9.0 ± 0.0"], "equal values: nobody is best"


def test_one_seed_gets_no_star() -> None:
    [result] = run_tables([run("fedit", a=10.0, b=1.0), run("local_only", a=1.0, b=0.5)])
    table = {line[0]: line[1:] for line in as_text(result)}
    assert table["a"] == ["1.0", "2.0", "10.0", "1.0"]
    assert table["mean"] == ["1.0", "2.0", "5.5", "0.8"]
    assert table["spread"] == ["0.0", "0.0", "4.5", "0.2"]
    assert table["best round"] == ["", "", "3", "3"]
    assert table["KiB down / up"] == ["", "", "2 / 1", "2 / 1"]
    assert table["backward tokens"] == ["", "", "", ""], "these runs have no counts"
    assert "a" not in [line[0] for line in as_text(result, with_clients=False)]


def test_the_yardsticks_take_no_part_in_the_stars() -> None:
    """The constant answer is best at 2.0 and is not trained; of the others one is clearly better."""
    runs = [run(name, seed, a=value, b=value) for seed in (0, 1) for name, value in (("fedit", 1.5), ("ditto", 0.5))]
    [result] = run_tables(runs)
    table = {line[0]: line[1:] for line in as_text(result)}
    assert table["mean"] == ["1.0", "2.0", "1.5 ± 0.0*", "0.5 ± 0.0"]


def test_a_run_in_which_nothing_was_trained_gets_no_star() -> None:
    runs = [run(name, seed, a=value, b=value) for seed in (0, 1) for name, value in (("fedit", 1.5), ("ditto", 0.5))]
    for result in runs:
        result.summary.update(updates=4, left_out=4 if result.summary["method"] == "fedit" else 0)
    runs += [run("fedrep", seed, a=0.1, b=0.1) for seed in (0, 1)]
    [table] = run_tables(runs)
    lines = {line[0]: line[1:] for line in as_text(table)}
    assert lines["mean"] == ["1.0", "2.0", "1.5 ± 0.0", "0.5 ± 0.0*", "0.1 ± 0.0"]
    assert len(table.warnings) == 2


def test_a_run_that_stopped_early_says_so() -> None:
    early = run("fedit", a=10.0, b=20.0)
    early.summary["stopped"] = {"rounds": 9, "patience": 2}
    [actual] = run_tables([early, run("fedamole", a=5.0, b=5.0)])
    text = "fedit-0 stopped after 4 of 9 rounds: no improvement for 2 rounds"
    assert actual.notes == (text,)
    assert actual.as_json()["notes"] == [text]
    assert as_markdown(actual).endswith(f"\n\n{text}")


def test_markdown_is_a_table() -> None:
    [table] = run_tables([run("fedit", a=10.0, b=1.0)])
    lines = as_markdown(table).splitlines()
    assert lines[0] == "| client | base | majority | fedit |"
    assert {line.count("|") for line in lines} == {5}


@pytest.mark.parametrize("name", ["run", "mine"])
def test_a_run_without_a_name_is_called_by_its_method(name: str) -> None:
    result = run("fedit", name=name, a=1.0, b=1.0)
    assert result.label("fedit") == ("fedit" if name == "run" else "mine")
    assert result.label("fedit_ft") == "fedit_ft"


def test_unfinished_runs_in_a_folder_are_left_out(runs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import shutil

    shutil.copytree(runs("fedit"), tmp_path / "done")
    shutil.copytree(runs("fedit"), tmp_path / "torn")
    (tmp_path / "torn" / "summary.json").unlink()
    assert [run.path.name for run in read_runs([tmp_path])] == ["done"]
    assert "torn is not finished" in caplog.text
    (tmp_path / "done" / "summary.json").unlink()
    with pytest.raises(RunError, match="no finished run"):
        read_runs([tmp_path])
    with pytest.raises(RunError, match="fedamole resume"):
        read_runs([tmp_path / "torn"])


def test_the_lowest_mean_loss_is_starred() -> None:
    """Losses 1 and 3 make 2, losses 0.5 and 2.4 make 1.45, with both seeds; the base's 0.5 takes no part."""
    runs = [run(method, seed, a=1.0, b=1.0) for seed in (0, 1) for method in ("fedit", "local_only")]
    for result in runs:
        losses = {"fedit": (1.0, 3.0), "local_only": (0.5, 2.4)}[result.summary["method"]]
        for name, values in ((result.summary["method"], losses), ("base", (0.5, 0.5))):
            clients = result.summary["rows"][name]["clients"]
            clients["a"]["loss"], clients["b"]["loss"] = values
    [comparison] = run_tables(runs)
    table = {line[0]: line[1:] for line in as_text(comparison)}
    assert table["mean loss"] == ["0.500", "", "2.000 ± 0.000", "1.450 ± 0.000*"]


def test_the_work_of_a_run_is_in_its_table(runs: Any) -> None:
    """The lines say what metrics.jsonl says; two rows of one run share the training."""
    folder = runs("fedit", "evaluation.pre_aggregation=true")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    [result] = run_tables(read_runs([folder]))
    columns = {column.label: column.lines for column in result.columns}
    tokens = sum(line["backward_tokens"] for line in trained) / 4
    assert tokens > 0
    assert columns["fedit"]["backward tokens"] == columns["fedit_ft"]["backward tokens"] == [tokens]
    assert columns["fedit"]["trained parameters"] == [trained[0]["trained_parameters"]]
    table = {line[0]: line[1:] for line in as_text(result)}
    assert table["backward tokens"] == ["", "", short_count(tokens), short_count(tokens)]
    assert table["forward tokens"] == ["", "", "0", "0"]
    as_json: Any = result.as_json()["columns"]
    assert as_json["fedit"]["backward tokens"] == [tokens]


def private(method: str, seed: int, epsilon: dict[str, float]) -> Run:
    made = run(method, seed, a=10.0, b=1.0)
    config = {**made.config, "privacy": {"epsilon": 8.0, "delta": 1e-5, "clip": 1.0}}
    return replace(made, config=config, summary={**made.summary, "epsilon": epsilon})


def test_epsilon_of_each_client_is_a_column_and_the_caption_marks_what_is_not_noised() -> None:
    """The largest over the seeds of a method: 8 and 7.5 for a, 2 for b; b has spent nothing in the second run."""
    runs = [private("fedit", 0, {"a": 7.5, "b": 2.0}), private("fedit", 1, {"a": 8.0})]
    [result] = run_tables([*runs, run("local_only", a=1.0, b=1.0)])
    head, *body = as_text(result)
    table = {line[0]: line[1:] for line in body}
    assert head == ["client", "base", "majority", "fedit", "local_only", "epsilon"]
    assert [table[name][-1] for name in ("a", "b", "mean", "worst client", "best round")] == [
        "8.00",
        "2.00",
        "",
        "8.00",
        "",
    ]
    assert "Losses and scores are not noised and not covered by it" in result.caption
    assert "at delta 1e-05" in result.caption
    assert "not noised" in as_markdown(result)
    assert result.as_json()["columns"]["fedit"]["epsilon"] == {"a": 8.0, "b": 2.0}  # type: ignore[index]
    assert [line[-1] for line in as_text(result, with_clients=False)[1:3]] == ["", "8.00"]


def test_two_private_methods_have_a_column_each_and_runs_without_privacy_none() -> None:
    [two] = run_tables([private("fedit", 0, {"a": 1.0, "b": 1.0}), private("ditto", 0, {"a": 2.0, "b": 2.0})])
    assert as_text(two)[0][-2:] == ["epsilon of fedit", "epsilon of ditto"]
    [none] = run_tables([run("fedit", a=10.0, b=1.0)])
    assert as_text(none)[0] == ["client", "base", "majority", "fedit"]
    assert "psilon" not in none.caption + as_markdown(none)
