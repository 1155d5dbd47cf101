"""Every number of a comparison's tables as records, for JSON and CSV."""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedamole.comparison.tables import all_methods, average_over_scenarios
from fedamole.reporting.results import CHOSEN, MEASURES, MethodGain, Scenario, gains
from fedamole.reporting.significance import deviation

FIELDS = (
    "table",
    "scenario",
    "method",
    "client",
    "measure",
    "mean",
    "sd",
    "n",
    "low",
    "high",
    "p_pairs",
    "p_clients",
    "wins",
    "ties",
    "losses",
)
"""Columns of the CSV: one line per number of the tables, unrounded; fields that do not apply are empty."""


def as_records(scenarios: Sequence[Scenario], reference: str) -> list[dict[str, Any]]:
    """Return every number of the tables, unrounded.

    Each record has the keys of FIELDS that apply and, where it is a mean over seeds, `values`: a list of [seed, value].
    A seed that did not reach the target has no cost to target: its value is None and not in the mean; `n` is the number
    of seeds that did, and with none of them there is no mean.
    """
    records = [record for scenario in scenarios for record in _scenario_records(scenario)]
    for method in all_methods(scenarios) if len(scenarios) > 1 else ():
        values = average_over_scenarios([scenario.methods.get(method, ()) for scenario in scenarios])
        if values:
            records.append({"table": "average", "method": method, "measure": "score", **_over_seeds(values)})
    for table, name in (("gains", reference), ("gains of chosen", CHOSEN)):
        records += _gain_records(table, gains(scenarios, name))
    return records


def _gain_records(table: str, method_gains: Sequence[MethodGain]) -> list[dict[str, Any]]:
    records = []
    for line in method_gains:
        statistics_of_gain = dataclasses.asdict(line.gain)
        records.append(
            {
                "table": table,
                "scenario": line.scenario,
                "method": line.method,
                "measure": line.measure,
                "n": statistics_of_gain.pop("pairs"),
                **statistics_of_gain,
            }
        )
    return records


def _scenario_records(scenario: Scenario) -> Iterator[dict[str, Any]]:
    for method, results in scenario.methods.items():
        origin = {"scenario": scenario.name, "method": method}

        def record(
            table: str, measure: str, by_seed: Mapping[int, float | None], client: str = "", *, origin: Any = origin
        ) -> dict[str, Any]:
            of_client = {"client": client} if client else {}
            values = {"values": [[seed, value] for seed, value in by_seed.items()]}
            over_seeds = _over_seeds([value for value in by_seed.values() if value is not None])
            return {"table": table, **origin, **of_client, "measure": measure, **over_seeds, **values}

        for measure in MEASURES:
            key = measure.key
            if by_seed := {result.seed: result.measures[key] for result in results if key in result.measures}:
                # A target that was not reached has no cost.
                reached = {seed: value if math.isfinite(value) else None for seed, value in by_seed.items()}
                yield record("methods", key, reached if measure.to_target else by_seed)
        if method in scenario.trained:
            yield record("methods", "rounds", {result.seed: result.rounds for result in results})
            yield record("methods", "learning_rate", {result.seed: result.learning_rate for result in results})
            yield record("methods", "learning_rate_at_edge", {result.seed: float(result.at_edge) for result in results})
        for client in scenario.clients:
            yield record("clients", "score", {result.seed: result.scores[client] for result in results}, client)
            if losses := {result.seed: result.losses[client] for result in results if client in result.losses}:
                yield record("clients", "loss", losses, client)


def _over_seeds(values: Sequence[float]) -> dict[str, float]:
    spread = {"sd": deviation(values)} if len(values) > 1 else {}
    mean = {"mean": statistics.fmean(values)} if values else {}
    return {**mean, **spread, "n": len(values)}


def as_csv(records: Sequence[dict[str, Any]]) -> str:
    """Return records as CSV with the columns FIELDS."""
    file = io.StringIO()
    writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()
