"""The table of `fedamole show`: clients down, methods across, test scores at the best validation round."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedamole.federation.best import mean_best_round
from fedamole.federation.summary import stopped_early
from fedamole.reporting.markdown import literal, literal_table
from fedamole.reporting.runs import Run, untrained_warning
from fedamole.reporting.significance import STAR, clear_best, deviation
from fedamole.reporting.verdict import verdict, verdict_on_yardsticks
from fedamole.reporting.work import short_count
from fedamole.runs.run_files import BASE, MAJORITY

SCORE_LINES = ("mean", "worst client", "spread", "mean, last round")
WORK_LINES = {
    "forward tokens": "forward_tokens",
    "backward tokens": "backward_tokens",
    "trained parameters": "parameters",
}
"""Lines with the work of a client, a mean over the clients, and their keys in `work_of`."""
SUMMARY_LINES = (*SCORE_LINES, "mean loss", "best round", "KiB down / up", *WORK_LINES)
"""Lines below those of the clients. The loss is in nats per answer token, a mean over the clients."""
CAPTION = (
    "Scores: accuracy (answers from options), ROUGE-L or preference (pairs), 0 to 100. Loss: nats per answer token, or "
    "of DPO per pair. KiB: per client and round. Forward tokens: read in forward passes only; backward tokens: read in "
    "forward and backward passes; both per client over the whole run. Trained parameters: parameters that a "
    f"client trains in a round. {STAR}"
)
"""Caption of the table."""
PRIVATE = (
    "Epsilon: what the client has spent of its privacy budget, at delta {delta:g}, for each of its training examples; "
    "the line of the worst client has the largest. It covers what clients have sent. Losses and scores are not noised "
    "and not covered by it: they are figures for the experimenter, not for publication as private values."
)
"""End of the caption if a run had `[privacy]`."""


@dataclass(frozen=True)
class Column:
    """One method (or variant of a run) over its seeds."""

    label: str
    clients: dict[str, list[float]]
    """Test scores of each client, one per seed."""
    lines: dict[str, list[float]]
    """Values of SUMMARY_LINES, one per seed."""
    traffic: tuple[float, float]
    """Bytes down and up per client and round."""
    rows: Mapping[tuple[int, int], Mapping[str, Any]]
    """Its entry in `rows` of each run's summary, by (index among the runs with the same seed, seed)."""
    untrained: bool = False
    """Whether every update of one of its runs failed; such a column has no star."""
    epsilon: Mapping[str, float] = field(default_factory=dict)
    """Largest epsilon that each client has spent in one of its runs; empty without `[privacy]`."""
    delta: float = 0.0
    """Delta of `[privacy]`."""


@dataclass(frozen=True)
class RunTable:
    """Runs on one partition, side by side."""

    clients: tuple[str, ...]
    columns: tuple[Column, ...]
    seeds: tuple[int, ...]
    warnings: tuple[str, ...] = ()
    """A sentence for each run in which every update failed; shown above the table."""
    notes: tuple[str, ...] = ()
    """A sentence for each run that stopped early; shown below the table."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels of clients in the table, for those whose label is not their name."""
    verdict: str = ""
    """Whether the best method is better than training alone (see `verdict`); shown below the table."""
    on_yardsticks: str = ""
    """How the best method compares with the untuned base, for runs without training alone; shown in the report."""

    @property
    def private(self) -> list[Column]:
        """The columns whose runs had `[privacy]`."""
        return [column for column in self.columns if column.epsilon]

    @property
    def caption(self) -> str:
        """What the values of the table are."""
        deltas = sorted({column.delta for column in self.private}, reverse=True)
        return " ".join([CAPTION, *(PRIVATE.format(delta=delta) for delta in deltas[:1])])

    def as_json(self) -> dict[str, object]:
        """Return the table for `--json`."""
        return {
            "seeds": list(self.seeds),
            "verdict": self.verdict,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "columns": {
                column.label: {
                    "clients": column.clients,
                    **column.lines,
                    **({"epsilon": dict(column.epsilon), "delta": column.delta} if column.epsilon else {}),
                }
                for column in self.columns
            },
        }


def run_tables(runs: Sequence[Run]) -> list[RunTable]:
    """Return one table per partition. Runs that differ only in the seed share a column."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.partition, []).append(run)
    return [_run_table(group) for group in groups.values()]


def _run_table(runs: Sequence[Run]) -> RunTable:
    yardsticks = (BASE, MAJORITY)
    entries: dict[str, list[tuple[Run, str]]] = {}
    for run in runs:
        for variant in run.summary["rows"]:
            if variant in yardsticks:
                entries.setdefault(variant, [(run, variant)])  # the same in all runs
            else:
                entries.setdefault(run.label(variant), []).append((run, variant))
    order = sorted(entries, key=lambda label: (label not in yardsticks, label != BASE, label.startswith("fedamole")))
    clients = tuple(sorted(runs[0].summary["rows"][BASE]["clients"]))
    columns = tuple(_column(label, entries[label], clients) for label in order)
    warnings = tuple(filter(None, (untrained_warning(run.path, run.summary) for run in runs)))
    notes = tuple(f"{run.path} {text}" for run in runs if (text := stopped_early(run.summary)))
    seeds = tuple(sorted({run.seed for run in runs}))
    against_alone = verdict(entries)
    on_yardsticks = "" if against_alone else verdict_on_yardsticks(entries)
    return RunTable(clients, columns, seeds, warnings, notes, runs[0].labels, against_alone, on_yardsticks)


def _column(label: str, entries: Sequence[tuple[Run, str]], clients: Sequence[str]) -> Column:
    entries = sorted(entries, key=lambda entry: entry[0].seed)
    rows = [run.summary["rows"][variant] for run, variant in entries]
    trained = label not in (BASE, MAJORITY)
    first = entries[0][0].summary
    lines = {
        "mean": [row["mean"] for row in rows],
        "worst client": [row["worst"] for row in rows],
        "spread": [row["spread"] for row in rows],
    }
    losses = [[scores["loss"] for scores in row["clients"].values() if "loss" in scores] for row in rows]
    if all(losses):
        lines["mean loss"] = [sum(of_run) / len(of_run) for of_run in losses]
    if trained:
        lines["mean, last round"] = [row["last_mean"] for row in rows]
        lines["best round"] = [mean_best_round(row) for row in rows]
        work = [run.work[variant] for run, variant in entries]
        lines |= {name: [of_run[key] for of_run in work if key in of_run] for name, key in WORK_LINES.items()}
    traffic = (first["bytes_down_per_client_round"], first["bytes_up_per_client_round"]) if trained else (0.0, 0.0)
    # A client of a deployment that did not reply in the end has no score.
    scores = {
        client: [row["clients"][client]["score"] for row in rows if client in row["clients"]] for client in clients
    }
    seeds = [run.seed for run, _ in entries]
    keys = [(seeds[:index].count(seed), seed) for index, seed in enumerate(seeds)]
    untrained = trained and any(run.untrained for run, _ in entries)
    spent: dict[str, float] = {}
    for run, variant in entries:
        if variant == run.summary["method"]:  # another variant is the same training, scored at another moment
            of_run = run.summary.get("epsilon", {})
            spent |= {client: max(spent.get(client, 0.0), epsilon) for client, epsilon in of_run.items()}
    delta = max((run.config["privacy"]["delta"] for run, _ in entries if "privacy" in run.config), default=0.0)
    return Column(label, scores, lines, traffic, dict(zip(keys, rows, strict=True)), untrained, spent, delta)


def mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    """Format values over seeds as `mean ± standard deviation`; the mean alone for one value, empty for none."""
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {deviation(values):.{digits}f}"


def as_text(table: RunTable, with_clients: bool = True) -> list[list[str]]:
    """Return the table as text: the head, a line per client, the summary lines. A clearly best value has a star.

    On the right there is a column with epsilon for each method whose runs had `[privacy]`.
    """
    columns = table.columns
    head = ["client", *(column.label for column in columns)]
    body: list[list[str]] = []
    if with_clients:
        for client in table.clients:
            by_run = [_by_client_and_run(column, "score", client) for column in columns]
            cells = _starred(columns, [column.clients[client] for column in columns], by_run)
            body.append([table.labels.get(client, client), *cells])
    scores = [_by_client_and_run(column, "score") for column in columns]
    by_run_of_line = {
        "worst client": [{key: row["worst"] for key, row in column.rows.items()} for column in columns],
        "mean, last round": [{key: row["last_mean"] for key, row in column.rows.items()} for column in columns],
    }
    for name in SCORE_LINES:
        values = [column.lines.get(name, []) for column in columns]
        if name == "spread":
            body.append([name, *map(mean_and_deviation, values)])
        else:
            body.append([name, *_starred(columns, values, by_run_of_line.get(name, scores))])
    losses = [column.lines.get("mean loss", []) for column in columns]
    by_run = [_by_client_and_run(column, "loss") for column in columns]
    body.append(["mean loss", *_starred(columns, losses, by_run, digits=3, higher=False)])
    body.append(["best round", *(mean_and_deviation(column.lines.get("best round", []), 0) for column in columns)])
    body.append(["KiB down / up", *(_traffic(column) for column in columns)])
    for name in WORK_LINES:
        counts = [column.lines.get(name, []) for column in columns]
        body.append([name, *(short_count(statistics.fmean(values)) if values else "" for values in counts)])
    private = table.private
    spent = [{table.labels.get(name, name): value for name, value in column.epsilon.items()} for column in private]
    head += [f"epsilon of {column.label}" if len(private) > 1 else "epsilon" for column in private]
    clients = len(table.clients) if with_clients else 0
    for number, line in enumerate(body):
        for of_client in spent:
            of_line = max(of_client.values()) if line[0] == "worst client" else None
            value = of_client.get(line[0]) if number < clients else of_line
            line.append("" if value is None else f"{value:.2f}")
    return [head, *body]


def _by_client_and_run(column: Column, measure: str, only: str = "") -> dict[tuple[Any, ...], float]:
    """Return the values of a measure by (client, index of the run, seed), of one client or of all."""
    return {
        (client, *key): values[measure]
        for key, row in column.rows.items()
        for client, values in row["clients"].items()
        if measure in values and only in ("", client)
    }


def _starred(
    columns: Sequence[Column],
    values: Sequence[Sequence[float]],
    by_run: Sequence[Mapping[tuple[Any, ...], float]],
    digits: int = 1,
    higher: bool = True,
) -> list[str]:
    """Return the cells of a line, with a star for the clearly best column.

    Args:
        columns: Columns of the table.
        values: Values shown in each column, one per seed.
        by_run: Values of each column that decide on the star, by (..., seed).
        digits: Digits after the decimal point.
        higher: Whether higher values are better.
    """
    candidates = {
        column.label: paired
        for column, paired in zip(columns, by_run, strict=True)
        if column.label not in (BASE, MAJORITY) and not column.untrained
    }
    best = clear_best(candidates, higher=higher)
    return [
        mean_and_deviation(over_seeds, digits) + "*" * (column.label == best)
        for column, over_seeds in zip(columns, values, strict=True)
    ]


def _traffic(column: Column) -> str:
    down, up = column.traffic
    return f"{down / 1024:.0f} / {up / 1024:.0f}" if down or up else ""


def as_markdown(table: RunTable) -> str:
    """Return the table in Markdown, with its warnings above it, and its verdict and notes below it."""
    head, *body = as_text(table)
    warnings = "".join(f"**{literal(warning)}**\n\n" for warning in table.warnings)
    below = [*filter(None, [table.verdict]), *table.notes, *([table.caption] if table.private else [])]
    return warnings + literal_table(head, body) + "".join(f"\n\n{literal(line)}" for line in below)
