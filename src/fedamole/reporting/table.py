"""The table of `fedamole show`: clients down, methods across, the score of the best validation round on test."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedamole.federation.best import mean_best_round
from fedamole.reporting.markdown import literal
from fedamole.reporting.markdown import table as as_table
from fedamole.reporting.runs import Run, untrained_warning
from fedamole.reporting.significance import STAR, clear_best
from fedamole.reporting.work import short, work_of
from fedamole.runs.run_files import BASE, MAJORITY
from fedamole.runs.run_folder import METRICS, RunFolder

SCORE_LINES = ("mean", "worst client", "spread", "mean, last round")
WORK_LINES = {
    "forward tokens": "forward_tokens",
    "backward tokens": "backward_tokens",
    "trained parameters": "parameters",
}
"""Lines of a client's work, a mean over the clients, with the key in `work_of`."""
SUMMARY_LINES = (*SCORE_LINES, "mean loss", "best round", "KiB down / up", *WORK_LINES)
"""Lines under the clients. The loss (nats per answer token, mean over clients) tells models apart before scores do."""
CAPTION = (
    "Scores: accuracy (answers from options) or ROUGE-L, 0 to 100. Loss: nats per answer token. KiB: per client and "
    "round. Forward tokens: read in forward passes alone; backward tokens: read in forward and backward passes; each "
    f"per client over the whole run. Trained parameters: numbers that a client trains in a round. {STAR}"
)
"""What stands below a table."""


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
    rows: Mapping[tuple[int, int], Mapping[str, Any]]
    """Its part of each run's summary, by (number of the run among those of its seed, seed)."""
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
    labels: Mapping[str, str] = field(default_factory=dict)
    """What clients are called in the table, where that is not their name."""

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
    return Comparison(clients, columns, tuple(sorted({run.seed for run in runs})), warnings, runs[0].labels)


def _column(label: str, entries: Sequence[tuple[Run, str]], clients: Sequence[str]) -> Column:
    entries = sorted(entries, key=lambda entry: entry[0].seed)  # so that values stand in the order of the seeds
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
        work = [_work(run, row) for run, row in entries]
        lines |= {name: [one[key] for one in work if key in one] for name, key in WORK_LINES.items()}
    traffic = (first["bytes_down_per_client_round"], first["bytes_up_per_client_round"]) if trained else (0.0, 0.0)
    # A client of a deployment whose last answer never came has no score.
    scores = {
        client: [row["clients"][client]["score"] for row in rows if client in row["clients"]] for client in clients
    }
    seeds = [run.seed for run, _ in entries]
    keys = [(seeds[:place].count(seed), seed) for place, seed in enumerate(seeds)]
    untrained = trained and any(run.untrained for run, _ in entries)
    return Column(label, scores, lines, traffic, dict(zip(keys, rows, strict=True)), untrained)


def _work(run: Run, row: str) -> dict[str, float]:
    clients = len(run.summary["rows"][row]["clients"])
    return work_of(RunFolder(run.path).lines(METRICS), row, clients, run.summary["rounds"])


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
    """The table as text: a head, a line per client, the summary lines; a clearly best value of a line is starred."""
    columns = comparison.columns
    head = ["client", *(column.label for column in columns)]
    body: list[list[str]] = []
    if with_clients:
        for client in comparison.clients:
            scores = [_of_clients(column, "score", client) for column in columns]
            cells = _starred(columns, [column.clients[client] for column in columns], scores)
            body.append([comparison.labels.get(client, client), *cells])
    by_client = [_of_clients(column, "score") for column in columns]
    over_seeds = {
        "worst client": [{key: row["worst"] for key, row in column.rows.items()} for column in columns],
        "mean, last round": [{key: row["last_mean"] for key, row in column.rows.items()} for column in columns],
    }
    for name in SCORE_LINES:
        values = [column.lines.get(name, []) for column in columns]
        paired = over_seeds.get(name, by_client)
        body.append([name, *(map(cell, values) if name == "spread" else _starred(columns, values, paired))])
    losses = [column.lines.get("mean loss", []) for column in columns]
    paired = [_of_clients(column, "loss") for column in columns]
    body.append(["mean loss", *_starred(columns, losses, paired, digits=3, higher=False)])
    body.append(["best round", *(cell(column.lines.get("best round", []), 0) for column in columns)])
    body.append(["KiB down / up", *(_traffic(column) for column in columns)])
    for name in WORK_LINES:
        found = [column.lines.get(name, []) for column in columns]
        body.append([name, *(short(sum(values) / len(values)) if values else "" for values in found)])
    return [head, *body]


def _of_clients(column: Column, measure: str, only: str = "") -> dict[tuple[Any, ...], float]:
    """Values of a measure by (client, number of the run, seed), of one client or of all."""
    return {
        (client, *key): values[measure]
        for key, row in column.rows.items()
        for client, values in row["clients"].items()
        if measure in values and only in ("", client)
    }


def _starred(
    columns: Sequence[Column],
    values: Sequence[Sequence[float]],
    paired: Sequence[Mapping[tuple[Any, ...], float]],
    digits: int = 1,
    higher: bool = True,
) -> list[str]:
    """Cells of a line, `values` by column; the star is decided on `paired`, whose keys end with the seed."""
    trained = {
        column.label: found
        for column, found in zip(columns, paired, strict=True)
        if column.label not in (BASE, MAJORITY) and not column.untrained
    }
    star = clear_best(trained, higher=higher)
    return [cell(found, digits) + "*" * (column.label == star) for column, found in zip(columns, values, strict=True)]


def _traffic(column: Column) -> str:
    down, up = column.traffic
    return f"{down / 1024:.0f} / {up / 1024:.0f}" if down or up else ""


def markdown(comparison: Comparison) -> str:
    """The table in Markdown."""
    head, *body = grid(comparison)
    rule = ["---"] + ["---:"] * (len(head) - 1)
    above = "".join(f"**{literal(warning)}**\n\n" for warning in comparison.warnings)
    return above + as_table([*map(literal, head)], [[literal(cell) for cell in line] for line in body], rule)
