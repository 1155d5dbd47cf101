"""What `fedamole choose` shows: each client's choice, its validation, and its test results against training alone."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedamole.comparison.tables import Table
from fedamole.reporting.choosing import Candidate, Choice, check_measure, cost_of
from fedamole.reporting.results import MIB
from fedamole.reporting.work import short_count

Record = dict[str, Any]
DIGITS = {"score": 1, "loss": 3}


def choice_records(choices: Sequence[Choice], measure: str) -> list[Record]:
    """Return one record per client; values that do not exist are None.

    Args:
        choices: What the clients chose.
        measure: What they chose by: loss or score.
    """
    return [_record(choice, measure) for choice in choices]


def _record(choice: Choice, measure: str) -> Record:
    chosen, alone, client = choice.chosen, choice.alone, choice.client
    sign = -1.0 if measure == "score" else 1.0
    tests = {"": chosen.test(client), "alone_": {} if alone is None else alone.test(client)}
    return {
        "client": client,
        "chosen": chosen.label,
        "run": str(chosen.run.path),
        "variant": chosen.variant,
        "untuned": client in chosen.untuned,
        "validation": sign * chosen.validation[client],
        "alone_validation": None if alone is None else sign * alone.validation[client],
        **{f"{prefix}{key}": test.get(key) for key in ("score", "loss") for prefix, test in tests.items()},
    }


def as_json(candidates: Sequence[Candidate], choices: Sequence[Choice], alone: str, margin: float) -> Record:
    """Return everything that `fedamole choose` shows, for `--json`."""
    measure = check_measure([candidate.run for candidate in candidates])
    records = choice_records(choices, measure)
    keys = ("score", "alone_score", "loss", "alone_loss")
    return {
        "measure": measure,
        "alone": alone,
        "margin": margin,
        "clients": records,
        "mean": {key: _mean(records, key) for key in keys},
        "candidates": [candidate.label for candidate in candidates],
        "cost": cost_of(candidates),
    }


def choice_table(candidates: Sequence[Candidate], choices: Sequence[Choice], alone: str, margin: float) -> Table:
    """Return the choices as a table.

    Args:
        candidates: All candidates.
        choices: What the clients chose.
        alone: Name of the run or method that stands for training alone.
        margin: See `choose`.
    """
    measure = check_measure([candidate.run for candidate in candidates])
    records = choice_records(choices, measure)
    labels: Mapping[str, str] = candidates[0].run.labels
    present = alone if any(candidate.alone for candidate in candidates) else None
    body = []
    for record in records:
        untuned = " (untuned base)" if record["untuned"] else ""
        validation = (_text(record[key], DIGITS[measure]) for key in ("validation", "alone_validation"))
        name = labels.get(record["client"], record["client"])
        body.append((name, record["chosen"] + untuned, *validation, *_tests(record)))
    means = {f"{prefix}{key}": _mean(records, f"{prefix}{key}") for key in DIGITS for prefix in ("", "alone_")}
    body.append(("mean", "", "", "", *_tests(means)))
    against = tuple(f"{key}{name}" for key in DIGITS for name in ("", f" - {alone}"))
    return Table(
        f"chosen by each client's validation {measure}",
        f"{explanation(measure, present, margin)} Score and loss are those on test. {cost(candidates)}",
        ("client", "chosen", f"validation {measure}", f"of {alone}", *against),
        tuple(body),
        text_columns=2,
        clients=tuple(labels.get(record["client"], record["client"]) for record in records),
    )


def explanation(measure: str, alone: str | None, margin: float) -> str:
    """Return sentences that say how the clients chose; `alone` is None if training alone was no candidate."""
    best = "highest" if measure == "score" else "lowest"
    unless = (
        f", which it leaves only for a lead of more than {margin:g} standard error{'s'[: margin != 1]}"
        if margin
        else ""
    )
    model = f"Each client takes the model with the {best} value of its own validation {measure} at the best round"
    if alone is None:
        return f"{model}. Of equal models it takes the cheaper one."
    return f"{model}, {alone} included{unless}. Of equal models it takes {alone}, then the cheaper one."


def cost(candidates: Sequence[Candidate]) -> str:
    """Return a sentence with the cost of training all candidates."""
    total = cost_of(candidates)
    tokens = f"{short_count(total['tokens'])} tokens of training" if total["tokens"] else "tokens unknown"
    runs = f"All {total['runs']:.0f} runs" if total["runs"] > 1 else "One run"
    return f"{runs} had to be trained for it: {tokens} and {total['bytes'] / MIB:.3g} MiB of traffic per client."


def _tests(record: Mapping[str, float | None]) -> list[str]:
    cells = []
    for key, digits in DIGITS.items():
        value, of_alone = record[key], record[f"alone_{key}"]
        difference = "" if value is None or of_alone is None else f"{value - of_alone:+.{digits}f}"
        cells += [_text(value, digits), difference]
    return cells


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _mean(records: Sequence[Record], key: str) -> float | None:
    """Return the mean over the clients; None if one of them has no value."""
    values = [record[key] for record in records]
    if any(value is None or not math.isfinite(value) for value in values):
        return None
    return statistics.fmean(values)
