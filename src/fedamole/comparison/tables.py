"""Tables of a comparison as text (terminal, Markdown, LaTeX) and as records (CSV, JSON)."""

import csv
import dataclasses
import io
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedamole.reporting.markdown import literal, literal_table
from fedamole.reporting.results import MEASURES, Measure, MethodGain, Scenario, SeedResult, gains, values_of
from fedamole.reporting.run_table import mean_and_deviation
from fedamole.reporting.significance import STAR, clear_best, deviation
from fedamole.reporting.work import short_count

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

EXPLANATIONS = {
    "probed": "Probed: examples read in forward passes only, per client and round.",
    "backward_tokens": (
        "Forward tokens: read in forward passes only; backward tokens: read in forward and backward passes; both per "
        "client over the whole run."
    ),
    "parameters": "Trained parameters: parameters that a client trains in a round.",
}
"""Explanations for the caption, by measure, of columns that not every table has."""

SIZE_TOLERANCE = 0.1
"""Relative difference of trained parameters up to which two methods count as equally large."""


@dataclass(frozen=True)
class Table:
    """One table of a comparison, as text."""

    title: str
    caption: str
    head: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    """Number of columns on the left that hold text; the others hold numbers."""


def build_tables(scenarios: Sequence[Scenario], reference: str, matched: bool = False) -> list[Table]:
    """Return all tables: methods and clients of each scenario, methods over scenarios, gains of the reference.

    Args:
        scenarios: Results of the finished trials.
        reference: Method whose gain over every other method is shown.
        matched: Whether sizes were matched to the reference; methods that differ from it are then marked.
    """
    size_reference = reference if matched else ""
    tables = [table for scenario in scenarios for table in (_methods(scenario, size_reference), _clients(scenario))]
    if len(scenarios) > 1:
        tables.append(_over_scenarios(scenarios))
    method_gains = gains(scenarios, reference)
    return [*tables, _gains(method_gains, reference)] if method_gains else tables


def _methods(scenario: Scenario, size_reference: str) -> Table:
    all_results = [result for results in scenario.methods.values() for result in results]
    shown = [measure for measure in MEASURES if any(measure.key in result.measures for result in all_results)]
    columns = [_column(scenario, measure) for measure in shown]
    unmatched = _unmatched(scenario, size_reference)
    for measure, column in zip(shown, columns, strict=True):
        if measure.key == "parameters":
            column |= {method: f"{column[method]} (not matched)" for method in unmatched}
    columns.append(
        {method: _rate(results) if method in scenario.trained else "" for method, results in scenario.methods.items()}
    )
    body = tuple((scenario.label(method), *(column[method] for column in columns)) for method in scenario.methods)
    caption = (
        f"Test split at the best validation round; mean ± standard deviation over seeds {_list(scenario.seeds)}. "
        "Score: accuracy or ROUGE-L, 0 to 100, mean over clients; spread: standard deviation over clients; loss: nats "
        "per answer token. Steps and MiB are per client and round, seconds and peak memory for the whole run; all are "
        f"means. Best rounds count from 0. {STAR}"
    )
    keys = {measure.key for measure in shown}
    for key, explanation in EXPLANATIONS.items():
        caption += f" {explanation}" if key in keys else ""
    if any(result.at_edge for result in all_results):
        caption += " (edge): the lowest or highest learning rate tried, so a better one may lie beyond."
    if unmatched:
        caption += f" (not matched): differs by more than {SIZE_TOLERANCE:.0%} from that of {size_reference}."
    return Table(
        f"{scenario.name}: methods",
        f"{caption} {_rounds(scenario)}",
        ("method", *(measure.title for measure in shown), "learning rate"),
        body,
    )


def _unmatched(scenario: Scenario, size_reference: str) -> list[str]:
    """Return the methods that train clearly more or fewer parameters than `size_reference` (empty: none)."""
    sizes = {
        method: statistics.fmean(counts)
        for method, results in scenario.trained.items()
        if (counts := [result.measures["parameters"] for result in results if "parameters" in result.measures])
    }
    target = sizes.get(size_reference)
    if target is None:
        return []
    return [method for method, size in sizes.items() if abs(size - target) > SIZE_TOLERANCE * target]


def _rate(results: Sequence[SeedResult]) -> str:
    edge = " (edge)" if any(result.at_edge for result in results) else ""
    return _list(sorted({result.learning_rate for result in results})) + edge


def _rounds(scenario: Scenario) -> str:
    """Return a sentence with the number of rounds, by method if they differ."""
    rounds = {
        method: _list(sorted({result.rounds for result in results})) for method, results in scenario.trained.items()
    }
    if len(set(rounds.values())) == 1:
        return f"Rounds: {next(iter(rounds.values()))} for all."
    return f"Rounds: {', '.join(f'{method} {number}' for method, number in rounds.items())}."


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _clients(scenario: Scenario) -> Table:
    """Return the score of every client by method; transposed if there are more methods than clients."""
    body = []
    for client in scenario.clients:
        scores = {
            method: {(result.seed,): result.scores[client] for result in results}
            for method, results in scenario.methods.items()
        }
        best = clear_best({method: scores[method] for method in scenario.candidates}, higher=True)
        cells = (mean_and_deviation([*by_seed.values()]) + "*" * (method == best) for method, by_seed in scores.items())
        body.append((scenario.labels.get(client, client), *cells))
    [score] = [measure for measure in MEASURES if measure.key == "score"]
    body.append(("mean", *_column(scenario, score).values()))
    head = ("client", *map(scenario.label, scenario.methods))
    if len(scenario.methods) > len(scenario.clients):
        head, *body = zip(("method", *head[1:]), *body, strict=True)
    return Table(
        f"{scenario.name}: clients",
        f"Test score, 0 to 100; mean ± standard deviation over seeds {_list(scenario.seeds)}; base is the untuned "
        f"model, majority a constant answer. {STAR} The star of a single client is over its seeds.",
        head,
        tuple(body),
    )


def _over_scenarios(scenarios: Sequence[Scenario]) -> Table:
    body = []
    for method in _all_methods(scenarios):
        by_scenario = [scenario.methods.get(method, ()) for scenario in scenarios]
        cells = [mean_and_deviation([result.measures["score"] for result in results]) for results in by_scenario]
        body.append((method, *cells, mean_and_deviation(_average(by_scenario))))
    return Table(
        "methods over scenarios",
        "Mean test score over clients; mean ± standard deviation over seeds. Average: over the scenarios, "
        "of the seeds that a method has finished in all of them.",
        ("method", *(scenario.name for scenario in scenarios), "average"),
        tuple(body),
    )


def _all_methods(scenarios: Sequence[Scenario]) -> list[str]:
    return list(dict.fromkeys(method for scenario in scenarios for method in scenario.methods))


def _average(by_scenario: Sequence[Sequence[SeedResult]]) -> list[float]:
    """Return the mean score over the scenarios, for each seed that all of them have."""
    scores = [{result.seed: result.measures["score"] for result in results} for results in by_scenario]
    common = set.intersection(*(set(by_seed) for by_seed in scores))
    return [statistics.fmean(by_seed[seed] for by_seed in scores) for seed in sorted(common)]


def _gains(method_gains: Sequence[MethodGain], reference: str) -> Table:
    body = []
    for line in method_gains:
        gain, digits = line.gain, 1 if line.measure == "score" else 3
        body.append(
            (
                line.scenario,
                line.method,
                line.measure,
                str(gain.pairs),
                f"{gain.mean:+.{digits}f}",
                "" if math.isnan(gain.low) else f"{gain.low:+.{digits}f} to {gain.high:+.{digits}f}",
                _p(gain.p_pairs),
                _p(gain.p_clients),
                f"{gain.wins} / {gain.ties} / {gain.losses}",
            )
        )
    return Table(
        f"{reference} minus each other method",
        "Differences of test scores in points (positive: better) and of losses in nats per answer token (negative: "
        "better) over pairs (client, seed), with a 95 % interval. p: two-sided Wilcoxon signed-rank test over the "
        "pairs, and over the clients, each averaged over its seeds. Clients of one partition are not independent "
        "samples, so both p-values are optimistic, that over pairs most of all.",
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
        text_columns=3,
    )


def _p(value: float) -> str:
    return "" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _column(scenario: Scenario, measure: Measure) -> dict[str, str]:
    """Return a measure as text by method; the best trained method has a star if it is clearly the best."""
    best = None
    if measure.best is not None:
        by_method = {method: values_of(results, measure.key) for method, results in scenario.candidates.items()}
        best = clear_best(by_method, higher=measure.best == "highest")
    column = {}
    for method, results in scenario.methods.items():
        values = [result.measures[measure.key] for result in results if measure.key in result.measures]
        if values and not measure.varies:
            values = [statistics.fmean(values)]
        text = short_count(values[0]) if values and measure.short else mean_and_deviation(values, measure.digits)
        column[method] = text + "*" * (method == best)
    return column


def as_markdown(tables: Sequence[Table]) -> str:
    """Return the tables in Markdown, each with its title above and its caption below."""
    return "\n".join(
        f"### {literal(table.title)}\n\n{literal_table(table.head, table.body, table.text_columns)}\n\n"
        f"{literal(table.caption)}\n"
        for table in tables
    )


def as_latex(tables: Sequence[Table]) -> str:
    """Return the tables in LaTeX; the document needs the package booktabs."""
    blocks = []
    for table in tables:
        columns = "l" * table.text_columns + "r" * (len(table.head) - table.text_columns)
        head, *body = [" & ".join(map(latex_text, line)) + r" \\" for line in (table.head, *table.body)]
        blocks.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    rf"\caption{{\textbf{{{latex_text(table.title)}.}} "
                    rf"{latex_text(table.caption)}}}",
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
    """Escape the characters that are commands in LaTeX."""
    names = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "*": r"$^{*}$",
        "<": "$<$",
        ">": "$>$",
    }
    return re.sub(r"[\\~^±*<>&%$#_{}]", lambda match: names.get(match[0], "\\" + match[0]), text)


def as_records(scenarios: Sequence[Scenario], reference: str) -> list[dict[str, Any]]:
    """Return every number of the tables, unrounded.

    Each record has the keys of FIELDS that apply and, where it is a mean over seeds, `values`: a list of [seed, value].
    """
    records = [record for scenario in scenarios for record in _scenario_records(scenario)]
    for method in _all_methods(scenarios) if len(scenarios) > 1 else ():
        values = _average([scenario.methods.get(method, ()) for scenario in scenarios])
        if values:
            records.append({"table": "average", "method": method, "measure": "score", **_over_seeds(values)})
    for line in gains(scenarios, reference):
        statistics_of_gain = dataclasses.asdict(line.gain)
        records.append(
            {
                "table": "gains",
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
            table: str, measure: str, by_seed: dict[int, float], client: str = "", *, origin: Any = origin
        ) -> dict[str, Any]:
            of_client = {"client": client} if client else {}
            values = {"values": [[seed, value] for seed, value in by_seed.items()]}
            over_seeds = _over_seeds([*by_seed.values()])
            return {"table": table, **origin, **of_client, "measure": measure, **over_seeds, **values}

        for measure in MEASURES:
            key = measure.key
            if by_seed := {result.seed: result.measures[key] for result in results if key in result.measures}:
                yield record("methods", key, by_seed)
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
    return {"mean": statistics.fmean(values), **spread, "n": len(values)}


def as_csv(records: Sequence[dict[str, Any]]) -> str:
    """Return records as CSV with the columns FIELDS."""
    file = io.StringIO()
    writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()
