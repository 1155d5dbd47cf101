"""The sentence that compares the best method with training alone, from results with known differences."""

import json
from typing import Any

import pytest
from tests.reporting.test_run_table import run

from fedamole.reporting.learning import RoundState
from fedamole.reporting.run_table import as_markdown, run_tables
from fedamole.reporting.runs import Run


def with_validation(finished: Run, *losses: float) -> Run:
    """The run with these mean validation losses after its rounds."""
    vars(finished)["curves"] = {finished.summary["method"]: [RoundState(loss, 1.0, 1.0) for loss in losses]}
    return finished


def runs(**by_method: tuple[float, list[tuple[float, float]]]) -> list[Run]:
    """One run per method and seed, with a validation loss and the scores of clients a and b by seed."""
    return [
        with_validation(run(method, seed, a=a, b=b), loss + 1, loss)
        for method, (loss, scores) in by_method.items()
        for seed, (a, b) in enumerate(scores)
    ]


def verdict(finished: list[Run]) -> str:
    [table] = run_tables(finished)
    assert table.as_json()["verdict"] == table.verdict
    return table.verdict


ALONE = (2.0, [(10.0, 20.0), (10.0, 20.0)])


def test_a_clear_gain_has_its_interval() -> None:
    """Differences 5, 1, 6, 4: mean 4, deviation sqrt(14 / 3), t(3) = 3.1824, half width 3.4376."""
    actual = verdict(runs(local_only=ALONE, fedit=(1.0, [(15.0, 21.0), (16.0, 24.0)])))
    assert actual == (
        "fedit is better than training alone for 2 of 2 clients: +4.0 points (95 % interval +0.6 to +7.4; 2 clients, "
        "2 seeds); no client is worse."
    )


def test_a_clear_loss_and_an_unclear_difference() -> None:
    clear = verdict(runs(local_only=ALONE, fedit=(1.0, [(5.0, 19.0), (4.0, 16.0)])))
    assert clear.startswith(
        "Training alone is better than fedit, the best other method by validation loss: -4.0 points"
    )
    assert clear.endswith(
        "(95 % interval -7.4 to -0.6; 2 clients, 2 seeds); better for 0 and worse for 2 of 2 clients."
    )
    unclear = verdict(runs(local_only=ALONE, fedit=(1.0, [(30.0, 19.0), (10.0, 20.0)])))
    assert unclear.startswith(
        "fedit, the best method by validation loss, is not clearly better than training alone: +4.8 points"
    )
    assert unclear.endswith("; better for 1 and worse for 1 of 2 clients.")


def test_the_best_method_is_that_of_the_validation_loss() -> None:
    """ditto has the better test score and the worse validation."""
    both = runs(local_only=ALONE, ditto=(1.5, [(90.0, 90.0)] * 2), fedit=(1.0, [(15.0, 21.0)] * 2))
    assert verdict(both).startswith("fedit, the best method")


@pytest.mark.parametrize("missing", ["training alone", "another method", "validation"])
def test_without_a_comparison_there_is_no_verdict(missing: str) -> None:
    results: dict[str, Any] = {"local_only": ALONE, "fedit": ALONE}
    results.pop({"training alone": "local_only", "another method": "fedit"}.get(missing, ""), None)
    finished = runs(**results)
    if missing == "validation":
        for entry in finished:
            vars(entry)["curves"] = {entry.summary["method"]: []}
    assert verdict(finished) == ""
    assert as_markdown(run_tables(finished)[0]).endswith("|")


def test_a_run_in_which_nothing_was_trained_is_not_the_best() -> None:
    finished = runs(local_only=ALONE, fedit=(1.0, [(15.0, 21.0)] * 2))
    finished[2].summary.update(updates=4, left_out=4)
    assert verdict(finished) == ""


def test_a_single_pair_has_no_interval() -> None:
    finished = [with_validation(run(name, a=value), 1.0) for name, value in (("local_only", 10.0), ("fedit", 12.0))]
    assert verdict(finished) == (
        "fedit, the best method by validation loss, against training alone: +2.0 points (1 client, 1 seed, no "
        "interval); better for 1 and worse for 0 of 1 client."
    )
    assert as_markdown(run_tables(finished)[0]).endswith("of 1 client.")
    assert json.dumps(run_tables(finished)[0].as_json())


def test_without_training_alone_the_yardsticks_are_the_measure() -> None:
    """Against base: 14, 20, 15, 23: mean 18, deviation sqrt(54 / 3), half width 3.1824 * 4.2426 / 2 = 6.75."""
    [table] = run_tables(runs(fedit=(1.0, [(15.0, 21.0), (16.0, 24.0)]), ditto=(1.5, [(90.0, 90.0)] * 2)))
    assert table.verdict == ""
    assert table.on_yardsticks == (
        "fedit, the best method by validation loss, has a mean test score of 19.0 (2 clients, 2 seeds): +18.0 points "
        "against the untuned base (95 % interval +11.2 to +24.8) and +17.0 points against the most frequent training "
        "answer (95 % interval +10.2 to +23.8); a run of local_only would show what sharing adds."
    )


def test_training_alone_has_nothing_to_be_compared_with() -> None:
    finished = [with_validation(run("local_only", a=10.0), 1.0)]
    assert run_tables(finished)[0].on_yardsticks == (
        "local_only has a mean test score of 10.0 (1 client, 1 seed): +9.0 points against the untuned base and +8.0 "
        "points against the most frequent training answer; no federated method is in this report."
    )
    finished[0].summary.update(updates=4, left_out=4)
    assert run_tables(finished)[0].on_yardsticks == "", "nothing was trained"
