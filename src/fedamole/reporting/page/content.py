"""What is on the page, as plain data: built once from the folders, drawn by page.js and by figures.py."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedamole import __version__
from fedamole.reporting.page.reading import Told
from fedamole.reporting.page.words import (
    GLOSSARY,
    KINDS,
    RANDOM,
    SPLIT_NAMES,
    TITLES,
    method_in_words,
    settings_in_words,
    short_names,
)
from fedamole.reporting.results import Entry, Result, Scenario, read_scenarios
from fedamole.reporting.runs import untrained_warning
from fedamole.reporting.significance import gain
from fedamole.reporting.table import CAPTION, cell, compare, grid
from fedamole.reporting.work import short, work_of
from fedamole.runs.run_files import BASE, MAJORITY, SPLITS
from fedamole.terminal import printable

Json = dict[str, Any]
COSTS = (
    ("bytes_down_per_client_round", "KiB to a client per round", 1024, 0),
    ("bytes_up_per_client_round", "KiB from a client per round", 1024, 0),
    ("seconds_update", "seconds of training and merging", 1, 1),
    ("seconds_evaluate", "seconds of scoring", 1, 1),
    ("peak_memory_mib", "MiB of memory at the peak", 1, 0),
    ("forward_tokens", "tokens read forward only, per client", 1, None),
    ("backward_tokens", "tokens trained on, per client", 1, None),
    ("parameters", "parameters trained, per client", 1, None),
)
"""Key in summary.json or of `work_of`, what the column is called, its unit, digits (None: as a large count)."""


def content(told: Sequence[Told]) -> Json:
    """All that a report shows; sections without data are left out."""
    told = sorted(told, key=lambda one: one.label.startswith("fedamole"))  # as in the table of `fedamole show`
    clients = sorted(set().union(*(one.clients for one in told)))
    done = [one for one in told if one.finished]
    models = _models(told)
    sections = {
        "about": _about(told, len(clients)),
        "learning": _learning(told, models, clients),
        **(_tested(done, models) if done else {}),
        "experts": [_experts(one, clients) for one in told if one.assignment],
        "routing": [_routing(one) for one in told if one.routing],
        "data": _data(told, clients),
        "labels": _labels(told),
        "costs": _costs(told),
        "failed": [
            [one.label, line["round"], line["client"], line["failed"]]
            for one in told
            for line in one.lines
            if "failed" in line
        ],
    }
    made: Json = _fit_for_a_page(
        {
            "version": __version__,
            "title": f"Report on {_listed(models)}",
            "states": list(_states(told)),
            "glossary": GLOSSARY,
            "titles": TITLES,
            "random": RANDOM,
            "clients": clients,
            "models": models,
            **{key: value for key, value in sections.items() if value},
        },
        {name: label for one in told for name, label in one.run.labels.items()},
    )
    return made


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _fit_for_a_page(value: Any, labels: Mapping[str, str]) -> Any:
    """Return the same with None for numbers that are not finite, printable texts, and labels in place of client names.

    Such a name ends with a hash of the client's value, so that no other text is equal to it.
    """
    if isinstance(value, dict):
        return {
            printable(labels.get(key, key)) if isinstance(key, str) else key: _fit_for_a_page(item, labels)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_fit_for_a_page(inner, labels) for inner in value]
    if isinstance(value, str):
        return printable(labels.get(value, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _models(told: Sequence[Told]) -> list[str]:
    """Labels of all trained models, in the order of `fedamole show`."""
    labels = dict.fromkeys(one.run.label(row) for one in told for row in one.rows)
    return sorted(labels, key=lambda label: label.startswith("fedamole"))


def _states(told: Sequence[Told]) -> Iterator[str]:
    """A sentence for each run that is not finished, and for each in which every update failed."""
    for one in told:
        if warning := untrained_warning(one.run.path, one.run.summary):
            yield f"{warning}."
        if not one.finished:
            yield f"{one.run.path.name} is not finished: {one.done} of {one.rounds} rounds are done."


def _about(told: Sequence[Told], clients: int) -> Json:
    """Settings in words: a column per label, a line per setting, each with one value per column."""
    columns: dict[str, list[Told]] = {}
    for one in told:
        columns.setdefault(one.label, []).append(one)
    said = []
    for found in columns.values():
        config = found[0].config
        rounds = [f"{one.done} of {one.rounds}" if not one.finished else f"all {one.rounds}" for one in found]
        said.append(
            {
                **method_in_words(config),
                **settings_in_words(config, 0 if found[0].kind == "client" else clients),
                "Seed": ", ".join(str(one.run.seed) for one in found),
                "Seen from": KINDS[found[0].kind],
                "Rounds done": ", ".join(dict.fromkeys(rounds)),
            }
        )
    names = dict.fromkeys(name for column in said for name in column)
    return {"head": list(columns), "lines": [[name, [column.get(name, "") for column in said]] for name in names]}


def _learning(told: Sequence[Told], models: Sequence[str], clients: Sequence[str]) -> Json | None:
    """Validation by model, seed, client and round; `mean` is over all clients, each with its latest model."""
    measures, before, lines = dict[str, None](), dict[str, float](), []
    for one in told:
        found = [line for line in one.lines if line["split"] == "validation"]
        measures |= dict.fromkeys(
            key for line in found if line["method"] != BASE for key in ("loss", "score") if key in line
        )
        start = {line["client"]: line for line in found if line["method"] == BASE}
        before |= {name: line["loss"] for name, line in start.items()}
        for row in one.rows:
            values: dict[str, dict[str, list[float | None]]] = {}
            scored = [line for line in found if line["method"] == row]
            for key in measures:
                by_client: dict[str, list[float | None]] = {name: [None] * one.done for name in clients}
                for line in scored:
                    by_client[line["client"]][line["round"]] = line.get(key)
                first = {name: line[key] for name, line in start.items() if key in line}
                values[key] = {**by_client, "": _means(by_client, first)}
            if scored:
                lines.append({"model": models.index(one.run.label(row)), "seed": one.run.seed, "values": values})
    if not lines:
        return None
    rounds = max(one.done for one in told)
    chosen = {one.config["evaluation"]["select"] for one in told}
    order = sorted(measures, key=lambda key: key not in chosen)
    return {"measures": order, "rounds": rounds, "before": before, "lines": lines}


def _means(by_client: dict[str, list[float | None]], start: dict[str, float]) -> list[float | None]:
    """Mean over the clients in each round, a client that was not scored counting with its latest value."""
    latest, means = dict(start), []
    for values in zip(*by_client.values(), strict=True):
        latest |= {name: value for name, value in zip(by_client, values, strict=True) if value is not None}
        scored = any(value is not None for value in values)
        means.append(statistics.fmean(latest.values()) if scored else None)
    return means


def _tested(done: Sequence[Told], models: Sequence[str]) -> Json:
    """The table of `fedamole show`, the same as marks, and every model against every other."""
    [comparison] = compare([one.run for one in done])
    head, *body = grid(comparison)
    columns = {column.label: column.clients for column in comparison.columns}
    marks = {
        label: {client: statistics.fmean(values) for client, values in by_client.items() if values}
        for label, by_client in columns.items()
    }
    [scenario] = read_scenarios(
        [
            Entry("", one.run.label(row), row, one.run.seed, one.run.path)
            for one in done
            for row in one.run.summary["rows"]
            if row not in (BASE, MAJORITY)
        ]
    )
    gains = [found for model in models if (found := _gains(scenario, model))]
    return {
        "test": {
            "head": head,
            "body": body,
            "clients": comparison.clients,
            "seeds": comparison.seeds,
            "marks": marks,
            "caption": CAPTION,
        },
        "gain": gains,
    }


def _gains(scenario: Scenario, reference: str) -> Json | None:
    """One model against all others: each client's gain, averaged over seeds, and what gains.py says of all pairs."""
    if reference not in scenario.trained:
        return None
    columns = []
    for other, theirs in scenario.methods.items():
        pairs = _pairs(scenario.methods[reference], theirs, once=other in (BASE, MAJORITY))
        if other == reference or not pairs:
            continue
        by_client: dict[str, list[float]] = {}
        for (client, _), value in pairs.items():
            by_client.setdefault(client, []).append(value)
        found = gain(pairs, higher=True)
        columns.append(
            {
                "other": other,
                "clients": {name: statistics.fmean(values) for name, values in by_client.items()},
                **{key: getattr(found, key) for key in ("pairs", "mean", "low", "high", "p_clients", "wins", "ties")},
            }
        )
    return {"reference": reference, "columns": columns}


def _pairs(ours: Sequence[Result], theirs: Sequence[Result], once: bool) -> dict[tuple[str, int], float]:
    """Differences of test scores by (client, seed); base and majority are there `once`, as they know no seed."""
    known = {result.seed: result.scores for result in theirs}
    return {
        (client, result.seed): score - other[client]
        for result in ours
        if (other := theirs[0].scores if once else known.get(result.seed, {}))
        for client, score in sorted(result.scores.items())
        if client in other
    }


def _experts(one: Told, clients: Sequence[str]) -> Json:
    """Who holds what, by round, module and client: expert, 10,000 times its relevance, and so on."""
    modules = list(dict.fromkeys(line["module"] for line in one.assignment))
    rounds = sorted({line["round"] for line in one.assignment})
    held: list[Any] = [[[[] for _ in clients] for _ in modules] for _ in rounds]
    place = {
        name: {key: index for index, key in enumerate(keys)}
        for name, keys in (("module", modules), ("round", rounds), ("client", clients))
    }
    for line in one.assignment:
        pairs = zip(line["experts"], line["relevance"], strict=True)
        flat = [value for expert, relevance in pairs for value in (expert, round(10_000 * relevance))]
        indices = [place[key][line[key]] for key in ("round", "module", "client")]
        held[indices[0]][indices[1]][indices[2]] = flat
    return {
        "label": _label(one),
        "modules": short_names(modules),
        "rounds": rounds,
        "held": held,
        "experts": 1 + max((expert for line in one.assignment for expert in line["experts"]), default=0),
        "always_random": one.config["method"].get("assignment") == "random",
    }


def _label(one: Told) -> str:
    return f"{one.label}, seed {one.run.seed}"


def _routing(one: Told) -> Json:
    """Shares of the tokens by module, client and expert."""
    modules = list(dict.fromkeys(module for shares in one.routing.values() for module in shares))
    named = {expert for shares in one.routing.values() for found in shares.values() for expert in found}
    experts = sorted(named, key=lambda expert: (not expert.isdigit(), int(expert) if expert.isdigit() else 0, expert))
    shares = [{client: found.get(module, {}) for client, found in one.routing.items()} for module in modules]
    return {
        "label": _label(one),
        "modules": short_names(modules),
        "experts": experts,
        "shares": shares,
        "clients": sorted(one.routing),
    }


def _data(told: Sequence[Told], clients: Sequence[str]) -> Json | None:
    amounts = {name: found for one in told for name, found in one.amounts.items()}
    if not amounts:
        return None
    splits = [split for split in SPLITS if any(found.get(split) for found in amounts.values())]
    sources = {name: source for one in told for name, source in one.sources.items()}
    lines = [
        [name, sources.get(name, ""), [amounts[name].get(split, 0) for split in splits]]
        for name in clients
        if name in amounts
    ]
    told_apart = any(name != source for name, source in sources.items())
    return {"splits": [SPLIT_NAMES[split] for split in splits], "lines": lines, "sources": told_apart}


def _labels(told: Sequence[Told]) -> Json | None:
    shared = {name: found for one in told for name, found in one.labels.items()}
    if not shared:
        return None
    known = sorted({label for found in shared.values() for label in found})
    lines = [[name, [found.get(label, 0) for label in known]] for name, found in sorted(shared.items())]
    return {"labels": known, "lines": lines}


def _costs(told: Sequence[Told]) -> Json | None:
    """A line per label, the mean over its seeds; columns that are empty for everybody are left out."""
    grouped: dict[str, list[Json]] = {}
    for one in told:
        work = work_of(one.lines, one.run.summary["method"], max(1, len(one.clients)), max(1, one.done))
        grouped.setdefault(one.label, []).append({**one.costs, **work})
    known = [found for costs in grouped.values() for found in costs]
    columns = [one for one in COSTS if any(one[0] in found if one[3] is None else found.get(one[0]) for found in known)]
    lines = []
    for label, costs in grouped.items():
        means, texts = [], []
        for key, _, unit, digits in columns:
            numbers = [found[key] / unit for found in costs if key in found]
            means.append(statistics.fmean(numbers) if numbers else 0.0)
            texts.append(cell(numbers, digits) if digits is not None else short(means[-1]) if numbers else "")
        lines.append([label, means, texts])
    return {"columns": [title for _, title, _, _ in columns], "lines": lines} if columns else None
