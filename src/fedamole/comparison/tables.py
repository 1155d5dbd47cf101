"""Tables of a comparison as text: terminal, Markdown, LaTeX."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fedamole.reporting.markdown import literal, literal_table
from fedamole.reporting.results import (
    CHOSEN,
    MEASURES,
    Measure,
    MethodGain,
    Scenario,
    SeedResult,
    gains,
    values_of,
)
from fedamole.reporting.run_table import mean_and_deviation
from fedamole.reporting.significance import STAR, clear_best
from fedamole.reporting.work import short_count

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
    clients: tuple[str, ...] = ()
    """Names of clients in the table; a narrow terminal shortens them."""


def build_tables(
    scenarios: Sequence[Scenario], reference: str, matched: bool = False, chosen: str = "", target: str = ""
) -> list[Table]:
    """Return all tables: methods and clients of each scenario, methods over scenarios, gains.

    Args:
        scenarios: Results of the finished trials.
        reference: Method whose gain over every other method is shown.
        matched: Whether sizes were matched to the reference; methods that differ from it are then marked.
        chosen: Explanation of the row CHOSEN, if the scenarios have it; its gains are then shown too.
        target: Method whose lowest validation loss is the target of the costs to target.
    """
    size_reference = reference if matched else ""
    tables = []
    for scenario in scenarios:
        explanation = chosen if CHOSEN in scenario.methods else ""
        tables += [_methods(scenario, size_reference, explanation, target), _clients(scenario)]
    if len(scenarios) > 1:
        tables.append(_over_scenarios(scenarios))
    for name in (reference, CHOSEN):
        if method_gains := gains(scenarios, name):
            tables.append(_gains(method_gains, name))
    return tables


def _methods(scenario: Scenario, size_reference: str, chosen: str, target: str) -> Table:
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
        "Score: accuracy, ROUGE-L or preference, 0 to 100, mean over clients; spread: standard deviation over clients; "
        "loss: nats per answer token, or of DPO per pair. Steps and MiB are per client and round, seconds and peak "
        f"memory for the whole run; all are means. Best rounds count from 0. {STAR}"
    )
    keys = {measure.key for measure in shown}
    for key, explanation in EXPLANATIONS.items():
        caption += f" {explanation}" if key in keys else ""
    if any(measure.to_target for measure in shown):
        caption += (
            f" Steps and tokens to target: optimiser steps and backward tokens per client up to the first round whose "
            f"mean validation loss is at most the lowest one of {target} with the same seed; -: no round reached it."
        )
    caption += f" {chosen}" if chosen else ""
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
        clients=tuple(scenario.labels.get(client, client) for client in scenario.clients),
    )


def _over_scenarios(scenarios: Sequence[Scenario]) -> Table:
    body = []
    for method in all_methods(scenarios):
        by_scenario = [scenario.methods.get(method, ()) for scenario in scenarios]
        cells = [mean_and_deviation([result.measures["score"] for result in results]) for results in by_scenario]
        body.append((method, *cells, mean_and_deviation(average_over_scenarios(by_scenario))))
    return Table(
        "methods over scenarios",
        "Mean test score over clients; mean ± standard deviation over seeds. Average: over the scenarios, "
        "of the seeds that a method has finished in all of them.",
        ("method", *(scenario.name for scenario in scenarios), "average"),
        tuple(body),
    )


def all_methods(scenarios: Sequence[Scenario]) -> list[str]:
    """Return the rows of all scenarios together, each once, in their order."""
    return list(dict.fromkeys(method for scenario in scenarios for method in scenario.methods))


def average_over_scenarios(by_scenario: Sequence[Sequence[SeedResult]]) -> list[float]:
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
        if measure.to_target:
            column[method] = _to_target(values)
            continue
        if values and not measure.varies:
            values = [statistics.fmean(values)]
        text = short_count(values[0]) if values and measure.short else mean_and_deviation(values, measure.digits)
        column[method] = text + "*" * (method == best)
    return column


def _to_target(values: Sequence[float]) -> str:
    """Return the mean cost over the seeds that reached the target, with their number if others did not."""
    reached = [value for value in values if math.isfinite(value)]
    if not reached:
        return "-" if values else ""
    missing = f" ({len(reached)} of {len(values)} seeds)" if len(reached) < len(values) else ""
    return short_count(statistics.fmean(reached)) + missing


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
