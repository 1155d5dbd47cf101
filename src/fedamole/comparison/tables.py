"""Tables of a comparison as text: for a terminal, Markdown, LaTeX; and as records for CSV and JSON."""

import csv
import dataclasses
import io
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedamole.reporting.markdown import literal, table
from fedamole.reporting.results import MEASURES, Against, Measure, Result, Scenario, gains
from fedamole.reporting.significance import STAR, clear_best, deviation
from fedamole.reporting.table import cell
from fedamole.reporting.work import short

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
"""Columns of the CSV: one line per number of the tables, unrounded; what does not apply is empty."""


EXPLAINED = {
    "probed": "Probed: examples read forward only, per client and round.",
    "backward_tokens": (
        "Forward tokens: read in forward passes alone; backward tokens: read in forward and backward passes; each per "
        "client over the whole run."
    ),
    "parameters": "Trained parameters: numbers that a client trains in a round.",
}
"""What the caption says of columns that not every table has, by measure."""


@dataclass(frozen=True)
class Sheet:
    """One table."""

    title: str
    caption: str
    head: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    words: int = 1
    """Columns on the left that hold words."""


NEARLY = 0.1
"""Relative difference of trained parameters up to which two methods count as equally large."""


def sheets(scenarios: Sequence[Scenario], reference: str, matched: bool = False) -> list[Sheet]:
    """All tables: methods and clients of each scenario, methods over scenarios, gains of the reference.

    `matched` says that all methods were meant to train as many parameters as the reference; those that do not are
    marked.
    """
    size_of = reference if matched else ""
    made = [sheet for found in scenarios for sheet in (_methods(found, size_of), _clients(found))]
    if len(scenarios) > 1:
        made.append(_over_scenarios(scenarios))
    found = gains(scenarios, reference)
    return [*made, _gains(found, reference)] if found else made


def _methods(scenario: Scenario, size_of: str) -> Sheet:
    shown = [
        measure
        for measure in MEASURES
        if any(measure.key in result.measures for found in scenario.methods.values() for result in found)
    ]
    columns = [_cells(scenario, measure) for measure in shown]
    unmatched = _unmatched(scenario, size_of)
    for measure, column in zip(shown, columns, strict=True):
        column |= {method: f"{column[method]} (not matched)" for method in unmatched if measure.key == "parameters"}
    columns.append(
        {method: _rate(found) if method in scenario.trained else "" for method, found in scenario.methods.items()}
    )
    body = tuple((scenario.label(method), *(column[method] for column in columns)) for method in scenario.methods)
    caption = (
        f"Test split at the best validation round; mean ± standard deviation over seeds {_list(scenario.seeds)}. "
        "Score: accuracy or ROUGE-L, 0 to 100, mean over clients; spread: standard deviation over clients; loss: nats "
        "per answer token. Steps and MiB are per client and round, seconds and peak memory of the whole run: all "
        f"of them means. Best rounds count from 0. {STAR}"
    )
    keys = {measure.key for measure in shown}
    for key, told in EXPLAINED.items():
        caption += f" {told}" if key in keys else ""
    if any(result.at_edge for found in scenario.trained.values() for result in found):
        caption += " (edge): the lowest or highest learning rate that was tried, so a better one may lie beyond."
    if unmatched:
        caption += f" (not matched): differs by more than {NEARLY:.0%} from that of {size_of}."
    return Sheet(
        f"{scenario.name}: methods",
        f"{caption} {_rounds(scenario)}",
        ("method", *(measure.title for measure in shown), "learning rate"),
        body,
    )


def _unmatched(scenario: Scenario, size_of: str) -> list[str]:
    """Methods that train clearly more or fewer parameters than one of them, `size_of`; none where that is empty."""
    sizes = {
        method: statistics.fmean(found)
        for method, results in scenario.trained.items()
        if (found := [result.measures["parameters"] for result in results if "parameters" in result.measures])
    }
    wanted = sizes.get(size_of)
    return [] if wanted is None else [name for name, size in sizes.items() if abs(size - wanted) > NEARLY * wanted]


def _rate(results: Sequence[Result]) -> str:
    edge = " (edge)" if any(result.at_edge for result in results) else ""
    return _list(sorted({result.learning_rate for result in results})) + edge


def _rounds(scenario: Scenario) -> str:
    """How many rounds each method had, by method where they differ."""
    values = {method: _list(sorted({result.rounds for result in found})) for method, found in scenario.trained.items()}
    if len(set(values.values())) == 1:
        return f"Rounds: {next(iter(values.values()))} for all."
    return f"Rounds: {', '.join(f'{method} {value}' for method, value in values.items())}."


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _clients(scenario: Scenario) -> Sheet:
    """Every client's score: methods across, or down where they are more than the clients."""
    body = []
    for client in scenario.clients:
        scores = {
            method: {(result.seed,): result.scores[client] for result in found}
            for method, found in scenario.methods.items()
        }
        star = clear_best({method: scores[method] for method in scenario.candidates}, higher=True)
        cells = (cell([*found.values()]) + "*" * (method == star) for method, found in scores.items())
        body.append((scenario.labels.get(client, client), *cells))
    [score] = [measure for measure in MEASURES if measure.key == "score"]
    body.append(("mean", *_cells(scenario, score).values()))
    head = ("client", *map(scenario.label, scenario.methods))
    if len(scenario.methods) > len(scenario.clients):
        head, *body = zip(("method", *head[1:]), *body, strict=True)
    return Sheet(
        f"{scenario.name}: clients",
        f"Test score, 0 to 100; mean ± standard deviation over seeds {_list(scenario.seeds)}; base is the untuned "
        f"model, majority a constant answer. {STAR} A client's own star is over its seeds.",
        head,
        tuple(body),
    )


def _over_scenarios(scenarios: Sequence[Scenario]) -> Sheet:
    body = []
    for method in _all_methods(scenarios):
        found = [scenario.methods.get(method, ()) for scenario in scenarios]
        cells = [cell([result.measures["score"] for result in results]) for results in found]
        body.append((method, *cells, cell(_average(found))))
    return Sheet(
        "methods over scenarios",
        "Mean test score over clients; mean ± standard deviation over seeds. Average: over the scenarios, "
        "of the seeds that a method has finished in all of them.",
        ("method", *(scenario.name for scenario in scenarios), "average"),
        tuple(body),
    )


def _all_methods(scenarios: Sequence[Scenario]) -> list[str]:
    return list(dict.fromkeys(method for scenario in scenarios for method in scenario.methods))


def _average(found: Sequence[Sequence[Result]]) -> list[float]:
    """Mean over the scenarios, for each seed that is there in all of them."""
    scores = [{result.seed: result.measures["score"] for result in results} for results in found]
    common = set.intersection(*(set(values) for values in scores))
    return [statistics.fmean(values[seed] for values in scores) for seed in sorted(common)]


def _gains(found: Sequence[Against], reference: str) -> Sheet:
    body = []
    for line in found:
        gain, digits = line.gain, 1 if line.measure == "score" else 3
        spread = "" if math.isnan(gain.low) else f"{gain.low:+.{digits}f} to {gain.high:+.{digits}f}"
        counts = f"{gain.wins} / {gain.ties} / {gain.losses}"
        body.append(
            (
                line.scenario,
                line.method,
                line.measure,
                str(gain.pairs),
                f"{gain.mean:+.{digits}f}",
                spread,
                _p(gain.p_pairs),
                _p(gain.p_clients),
                counts,
            )
        )
    return Sheet(
        f"{reference} minus each other method",
        "Differences of test scores in points (positive: better) and of losses in nats per answer token (negative: "
        "better) over pairs (client, seed), with a 95 % interval. p: two-sided Wilcoxon signed-rank test over the "
        "pairs, and over the clients, each averaged over its seeds. Clients of one partition are no independent draws, "
        "so p is optimistic, over the pairs above all.",
        (
            "scenario",
            "against",
            "measure",
            "pairs",
            "difference",
            "95 % interval",
            "p (pairs)",
            "p (clients)",
            "wins / ties / losses",
        ),
        tuple(body),
        words=3,
    )


def _p(value: float) -> str:
    return "" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _cells(scenario: Scenario, measure: Measure) -> dict[str, str]:
    """Cells of a measure by method; the best of the trained methods is starred where it is clearly so."""
    star = None
    if measure.best is not None:
        by_method = {
            method: {key: value for result in found for key, value in result.values(measure.key).items()}
            for method, found in scenario.candidates.items()
        }
        star = clear_best(by_method, higher=measure.best == "highest")
    cells = {}
    for method, results in scenario.methods.items():
        values = [result.measures[measure.key] for result in results if measure.key in result.measures]
        if values and not measure.varies:
            values = [statistics.fmean(values)]
        text = short(values[0]) if values and measure.short else cell(values, measure.digits)
        cells[method] = text + "*" * (method == star)
    return cells


def as_markdown(made: Sequence[Sheet]) -> str:
    """The tables in Markdown, each with its title above and its caption below."""
    blocks = []
    for sheet in made:
        rule = ["---"] * sheet.words + ["---:"] * (len(sheet.head) - sheet.words)
        body = table([*map(literal, sheet.head)], [[literal(cell) for cell in line] for line in sheet.body], rule)
        blocks.append(f"### {literal(sheet.title)}\n\n{body}\n\n{literal(sheet.caption)}\n")
    return "\n".join(blocks)


def as_latex(made: Sequence[Sheet]) -> str:
    """The tables in LaTeX; the document needs the package booktabs."""
    blocks = []
    for sheet in made:
        columns = "l" * sheet.words + "r" * (len(sheet.head) - sheet.words)
        head, *body = [" & ".join(map(latex_text, line)) + r" \\" for line in (sheet.head, *sheet.body)]
        blocks.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    rf"\caption{{\textbf{{{latex_text(sheet.title)}.}} "
                    rf"{latex_text(sheet.caption)}}}",
                    rf"\begin{{tabular}}{{{columns}}}",
                    r"\toprule",
                    head,
                    r"\midrule",
                    *body,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                    "",
                ]
            )
        )
    return "% needs \\usepackage{booktabs}\n" + "\n".join(blocks)


def latex_text(text: str) -> str:
    """Escape what LaTeX reads as a command."""
    names = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "*": r"$^{*}$",
        "<": "$<$",
        ">": "$>$",
    }
    return re.sub(r"[\\~^±*<>&%$#_{}]", lambda found: names.get(found[0], "\\" + found[0]), text)


def records(scenarios: Sequence[Scenario], reference: str) -> list[dict[str, Any]]:
    """Every number of the tables, unrounded, with the keys of FIELDS and `values`: one per seed, of [seed, value]."""
    listed = [record for scenario in scenarios for record in _scenario_records(scenario)]
    for method in _all_methods(scenarios) if len(scenarios) > 1 else ():
        values = _average([scenario.methods.get(method, ()) for scenario in scenarios])
        if values:
            listed.append({"table": "average", "method": method, "measure": "score", **_over_seeds(values)})
    for line in gains(scenarios, reference):
        told = dataclasses.asdict(line.gain)
        listed.append(
            {
                "table": "gains",
                "scenario": line.scenario,
                "method": line.method,
                "measure": line.measure,
                "n": told.pop("pairs"),
                **told,
            }
        )
    return listed


def _scenario_records(scenario: Scenario) -> Iterator[dict[str, Any]]:
    for method, results in scenario.methods.items():
        where = {"scenario": scenario.name, "method": method}

        def line(table: str, measure: str, found: dict[int, float], client: str = "", *, where: Any = where) -> Any:
            who = {"client": client} if client else {}
            values = {"values": [[seed, value] for seed, value in found.items()]}
            return {"table": table, **where, **who, "measure": measure, **_over_seeds([*found.values()]), **values}

        for measure in (one.key for one in MEASURES):
            if found := {row.seed: row.measures[measure] for row in results if measure in row.measures}:
                yield line("methods", measure, found)
        if method in scenario.trained:
            yield line("methods", "rounds", {row.seed: row.rounds for row in results})
            yield line("methods", "learning_rate", {row.seed: row.learning_rate for row in results})
            yield line("methods", "learning_rate_at_edge", {row.seed: float(row.at_edge) for row in results})
        for client in scenario.clients:
            yield line("clients", "score", {row.seed: row.scores[client] for row in results}, client)
            if losses := {row.seed: row.losses[client] for row in results if client in row.losses}:
                yield line("clients", "loss", losses, client)


def _over_seeds(values: Sequence[float]) -> dict[str, float]:
    spread = {"sd": deviation(values)} if len(values) > 1 else {}
    return {"mean": statistics.fmean(values), **spread, "n": len(values)}


def as_csv(listed: Sequence[dict[str, Any]]) -> str:
    """Records as CSV with the columns FIELDS."""
    file = io.StringIO()
    writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return file.getvalue()
