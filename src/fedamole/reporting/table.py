"""The table of `fedamole show`: clients down, methods across, the score of the best validation round on test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedamole.federation.best import mean_best_round
from fedamole.federation.loop import BASE, MAJORITY
from fedamole.reporting.markdown import literal
from fedamole.reporting.markdown import table as as_table
from fedamole.reporting.runs import Run, untrained_warning

SCORE_LINES = ("mean", "worst client", "spread", "mean, last round")
SUMMARY_LINES = (*SCORE_LINES, "mean loss", "best round", "KiB down / up")
"""Lines under the clients. The loss (nats per answer token, mean over clients) tells models apart before scores do."""


@dataclass(frozen=True)
class Column:
    """One method (or variant) over its seeds."""

    label: str
    clients: dict[str, list[float]]
    """Score of each client, one per seed."""
    lines: dict[str, list[float]]
    """Values of SUMMARY_LINES, one per seed."""
    traffic: tuple[float, float]
    """Bytes down and up per client and round."""
    untrained: bool = False
    """Whether every update of one of its runs failed; such a column gets no star."""


@dataclass(frozen=True)
class Comparison:
    """Runs on one partition, side by side."""

    clients: tuple[str, ...]
    columns: tuple[Column, ...]
    seeds: tuple[int, ...]
    warnings: tuple[str, ...] = ()
    """A sentence on each run in which every update failed; they stand above the table."""

    def as_json(self) -> dict[str, object]:
        """The table for machines."""
        return {
            "seeds": list(self.seeds),
            "warnings": list(self.warnings),
            "columns": {column.label: {"clients": column.clients, **column.lines} for column in self.columns},
        }


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """Group runs by partition, then by label; runs that differ in the seed alone become one column."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.partition, []).append(run)
    return [_comparison(group) for group in groups.values()]


def _comparison(runs: Sequence[Run]) -> Comparison:
    found: dict[str, list[tuple[Run, str]]] = {}
    for run in runs:
        for row in run.summary["rows"]:
            shared = row in (BASE, MAJORITY)
            entries = found.setdefault(row if shared else run.label(row), [])
            if not (shared and entries):
                entries.append((run, row))
    common = (BASE, MAJORITY)
    order = sorted(found, key=lambda label: (label not in common, label != BASE, label.startswith("fedamole")))
    clients = tuple(sorted(runs[0].summary["rows"][BASE]["clients"]))
    columns = tuple(_column(label, found[label], clients) for label in order)
    warnings = tuple(filter(None, (untrained_warning(run.path, run.summary) for run in runs)))
    return Comparison(clients, columns, tuple(sorted({run.seed for run in runs})), warnings)


def _column(label: str, entries: Sequence[tuple[Run, str]], clients: Sequence[str]) -> Column:
    rows = [run.summary["rows"][row] for run, row in entries]
    trained = label not in (BASE, MAJORITY)
    first = entries[0][0].summary
    lines = {
        "mean": [row["mean"] for row in rows],
        "worst client": [row["worst"] for row in rows],
        "spread": [row["spread"] for row in rows],
    }
    losses = [[found["loss"] for found in row["clients"].values() if "loss" in found] for row in rows]
    if all(losses):
        lines["mean loss"] = [sum(found) / len(found) for found in losses]
    if trained:
        lines["mean, last round"] = [row["last_mean"] for row in rows]
        lines["best round"] = [mean_best_round(row) for row in rows]
    traffic = (first["bytes_down_per_client_round"], first["bytes_up_per_client_round"]) if trained else (0.0, 0.0)
    # A client of a deployment whose last answer never came has no score.
    scores = {
        client: [row["clients"][client]["score"] for row in rows if client in row["clients"]] for client in clients
    }
    untrained = trained and any(run.untrained for run, _ in entries)
    return Column(label, scores, lines, traffic, untrained)


def cell(values: Sequence[float], digits: int = 1) -> str:
    """Mean over seeds, with its standard deviation where there are several."""
    if not values:
        return ""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def grid(comparison: Comparison, with_clients: bool = True) -> list[list[str]]:
    """The table as text: a head, a line per client, the summary lines; the best trained score of a line is starred."""
    head = ["client", *(column.label for column in comparison.columns)]
    body: list[list[str]] = []
    if with_clients:
        body += [
            [client, *_starred(comparison, [column.clients[client] for column in comparison.columns])]
            for client in comparison.clients
        ]
    for name in SCORE_LINES:
        values = [column.lines.get(name, []) for column in comparison.columns]
        body.append([name, *(map(cell, values) if name == "spread" else _starred(comparison, values))])
    losses = [column.lines.get("mean loss", []) for column in comparison.columns]
    body.append(["mean loss", *_starred(comparison, losses, digits=3, lowest=True)])
    body.append(["best round", *(cell(column.lines.get("best round", []), 0) for column in comparison.columns)])
    body.append(["KiB down / up", *(_traffic(column) for column in comparison.columns)])
    return [head, *body]


def _starred(
    comparison: Comparison, values: Sequence[Sequence[float]], digits: int = 1, lowest: bool = False
) -> list[str]:
    sign = -1 if lowest else 1
    means = [
        sign * sum(found) / len(found)
        if found and column.label not in (BASE, MAJORITY) and not column.untrained
        else -math.inf
        for column, found in zip(comparison.columns, values, strict=True)
    ]
    best = max(means)
    return [
        cell(found, digits) + ("*" if mean == best and best > -math.inf else "")
        for found, mean in zip(values, means, strict=True)
    ]


def _traffic(column: Column) -> str:
    down, up = column.traffic
    return f"{down / 1024:.0f} / {up / 1024:.0f}" if down or up else ""


def markdown(comparison: Comparison) -> str:
    """The table in Markdown."""
    head, *body = grid(comparison)
    rule = ["---"] + ["---:"] * (len(head) - 1)
    above = "".join(f"**{literal(warning)}**\n\n" for warning in comparison.warnings)
    return above + as_table([*map(literal, head)], [[literal(cell) for cell in line] for line in body], rule)
