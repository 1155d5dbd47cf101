"""Content of a report as plain data: computed once from the folders, drawn by page.js and by figures.py."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedamole import __version__
from fedamole.federation.summary import stopped_early
from fedamole.reporting.page.names import note_on_short_names, short_names
from fedamole.reporting.page.reading import RunData
from fedamole.reporting.page.scale import scale_of
from fedamole.reporting.page.words import (
    GLOSSARY,
    KINDS,
    RANDOM,
    SPLIT_NAMES,
    TITLES,
    method_in_words,
    settings_in_words,
    short_module_names,
)
from fedamole.reporting.results import Scenario, TrialResult, differences, scenario_of
from fedamole.reporting.run_table import as_text, mean_and_deviation, run_tables
from fedamole.reporting.runs import untrained_warning
from fedamole.reporting.significance import gain
from fedamole.reporting.work import short_count, work_of
from fedamole.runs.run_files import BASE, MAJORITY, SPLITS
from fedamole.terminal import printable

Json = dict[str, Any]
GAIN_KEYS = ("pairs", "mean", "low", "high", "p_clients", "wins", "ties")
"""Fields of a `Gain` that the page shows."""
COSTS = (
    ("bytes_down_per_client_round", "KiB to a client per round", 1024, 0),
    ("bytes_up_per_client_round", "KiB from a client per round", 1024, 0),
    ("seconds_update", "seconds of training and aggregation", 1, 1),
    ("seconds_evaluate", "seconds of evaluation", 1, 1),
    ("peak_memory_mib", "peak memory in MiB", 1, 0),
    ("forward_tokens", "tokens in forward passes only, per client", 1, None),
    ("backward_tokens", "tokens trained on, per client", 1, None),
    ("parameters", "trained parameters per client", 1, None),
)
"""Key in summary.json or of `work_of`, title of the column, divisor, digits (None: shown as a large count)."""


def content(runs: Sequence[RunData]) -> Json:
    """Return everything that a report shows; sections without data are left out."""
    runs = sorted(runs, key=lambda data: data.label.startswith("fedamole"))  # the order of `fedamole show`
    clients = sorted(set().union(*(data.clients for data in runs)))
    finished = [data for data in runs if data.finished]
    models = _models(runs)
    labels = {name: label for data in runs for name, label in data.run.labels.items()}
    short = short_names([printable(labels.get(name, name)) for name in clients])
    sections = {
        "about": _about(runs, len(clients)),
        "learning": _learning(runs, models, clients),
        **(_tested(finished, models) if finished else {}),
        "experts": [_experts(data, clients) for data in runs if data.assignment],
        "routing": [_routing(data) for data in runs if data.routing],
        "data": _data(runs, clients),
        "labels": _labels(runs),
        "audits": [line for data in runs for line in _audits(data)],
        "costs": _costs(runs),
        "failed": [
            [data.label, line["round"], line["client"], line["failed"]]
            for data in runs
            for line in data.lines
            if "failed" in line
        ],
    }
    whole: Json = _for_json(
        {
            "version": __version__,
            "title": f"Report on {_listed(models)}",
            "states": list(_states(runs)),
            "glossary": GLOSSARY,
            "titles": TITLES,
            "random": RANDOM,
            "clients": clients,
            "short": short,
            "shortened": note_on_short_names(short),
            "models": models,
            "unfinished": sorted({data.label for data in runs if not data.finished}),
            **{key: value for key, value in sections.items() if value},
        },
        labels,
    )
    return whole


def _audits(data: RunData) -> Iterator[list[str]]:
    """Yield a line for each client with the numbers of its audits."""
    for client, audits in data.audits.items():
        bound, membership, inversion = (audits[name] for name in ("canaries", "membership", "inversion"))
        values = [
            bound.get("claimed"),
            bound.get("bound"),
            membership.get("own", {}).get("auroc"),
            membership.get("others", {}).get("auroc"),
            inversion.get("recall"),
            inversion.get("chance"),
        ]
        yield [data.label, client, *("-" if value is None else f"{value:.2f}" for value in values)]


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _for_json(value: Any, labels: Mapping[str, str]) -> Any:
    """Replace numbers that are not finite by None, make texts printable, and show labels in place of client names.

    A name that has a label ends with a hash of the client's value, so no other text is equal to it.
    """
    if isinstance(value, dict):
        return {
            printable(labels.get(key, key)) if isinstance(key, str) else key: _for_json(item, labels)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_for_json(inner, labels) for inner in value]
    if isinstance(value, str):
        return printable(labels.get(value, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _models(runs: Sequence[RunData]) -> list[str]:
    """Return the labels of all trained models, in the order of `fedamole show`."""
    labels = dict.fromkeys(data.run.label(variant) for data in runs for variant in data.variants)
    return sorted(labels, key=lambda label: label.startswith("fedamole"))


def _states(runs: Sequence[RunData]) -> Iterator[tuple[str, str]]:
    """Yield a mark and a sentence for each run that is not finished, and for each with updates that failed."""
    for data in runs:
        name = data.run.path.name
        if not data.finished:
            rounds = f"{data.done} of {data.rounds} rounds are done"
            yield "Not finished", f"{name} is not finished: {rounds}. It has no test scores and is not in the verdict."
        failed = [line for line in data.lines if "failed" in line]
        if warning := untrained_warning(data.run.path, data.run.summary):
            yield "Failed", f"{warning}."
        elif failed:
            updates = "1 update of a client" if len(failed) == 1 else f"{len(failed)} updates of clients"
            of_clients = _listed(sorted({line["client"] for line in failed}))
            yield "Failed updates", f"{name} left out {updates} ({of_clients}); see Failed updates for the reasons."


def _by_label(runs: Sequence[RunData]) -> dict[str, list[RunData]]:
    groups: dict[str, list[RunData]] = {}
    for data in runs:
        groups.setdefault(data.label, []).append(data)
    return groups


def _about(runs: Sequence[RunData], clients: int) -> Json:
    """Return the settings in words: a column per label, a line per setting with one value per column."""
    groups = _by_label(runs)
    columns = []
    for of_label in groups.values():
        first = of_label[0]
        rounds = [_rounds_done(data) for data in of_label]
        columns.append(
            {
                **method_in_words(first.config),
                **settings_in_words(first.config, 0 if first.kind == "client" else clients),
                "Seed": ", ".join(str(data.run.seed) for data in of_label),
                "Kind of run": KINDS[first.kind],
                "Rounds done": ", ".join(dict.fromkeys(rounds)),
            }
        )
    names = dict.fromkeys(name for column in columns for name in column)
    return {"head": list(groups), "lines": [[name, [column.get(name, "") for column in columns]] for name in names]}


def _rounds_done(data: RunData) -> str:
    if not data.finished:
        return f"{data.done} of {data.rounds}"
    return stopped_early(data.run.summary) or f"all {data.rounds}"


def _learning(runs: Sequence[RunData], models: Sequence[str], clients: Sequence[str]) -> Json | None:
    """Return validation values by model, seed, client and round. The client "" is the mean over all clients."""
    measures, before, curves = dict[str, None](), dict[str, float](), []
    for data in runs:
        validation = [line for line in data.lines if line["split"] == "validation"]
        measures |= dict.fromkeys(
            key for line in validation if line["method"] != BASE for key in ("loss", "score") if key in line
        )
        start = {line["client"]: line for line in validation if line["method"] == BASE}
        before |= {name: line["loss"] for name, line in start.items()}
        for variant in data.variants:
            values: dict[str, dict[str, list[float | None]]] = {}
            scored = [line for line in validation if line["method"] == variant]
            for key in measures:
                by_client: dict[str, list[float | None]] = {name: [None] * data.done for name in clients}
                for line in scored:
                    by_client[line["client"]][line["round"]] = line.get(key)
                first = {name: line[key] for name, line in start.items() if key in line}
                values[key] = {**by_client, "": _means(by_client, first)}
            if scored:
                model = models.index(data.run.label(variant))
                curves.append({"model": model, "seed": data.run.seed, "values": values})
    if not curves:
        return None
    rounds = max(data.done for data in runs)
    selected = {data.config["evaluation"]["select"] for data in runs}
    order = sorted(measures, key=lambda key: key not in selected)
    return {"measures": order, "rounds": rounds, "before": before, "lines": curves}


def _means(by_client: dict[str, list[float | None]], start: dict[str, float]) -> list[float | None]:
    """Return the mean over the clients in each round; a client not scored in a round counts with its latest value."""
    latest, means = dict(start), []
    for values in zip(*by_client.values(), strict=True):
        latest |= {name: value for name, value in zip(by_client, values, strict=True) if value is not None}
        scored = any(value is not None for value in values)
        means.append(statistics.fmean(latest.values()) if scored else None)
    return means


def _tested(finished: Sequence[RunData], models: Sequence[str]) -> Json:
    """Return the table of `fedamole show`, the same numbers for marks, and the gains of every model."""
    [table] = run_tables([data.run for data in finished])
    head, *body = as_text(table)
    marks = {
        column.label: {client: statistics.fmean(values) for client, values in column.clients.items() if values}
        for column in table.columns
    }
    trials = [
        TrialResult("", data.run.label(variant), variant, data.run.seed, data.run.path)
        for data in finished
        for variant in data.run.summary["rows"]
        if variant not in (BASE, MAJORITY)
    ]
    scenario = scenario_of("", trials, {data.run.path: data.run for data in finished})
    return {
        "verdict": table.verdict or table.on_yardsticks,
        "test": {
            "head": head,
            "body": body,
            "clients": table.clients,
            "seeds": table.seeds,
            "marks": marks,
            "caption": table.caption,
        },
        "gain": [gains for model in models if (gains := _gains(scenario, model))],
    }


def _gains(scenario: Scenario, reference: str) -> Json | None:
    """Return the gains of one model over all others: of each client, averaged over seeds, and over all pairs."""
    if reference not in scenario.trained:
        return None
    columns = []
    for other in scenario.methods:
        pairs = differences(scenario, reference, other, "score")
        if other == reference or not pairs:
            continue
        by_client: dict[str, list[float]] = {}
        for (client, _), value in pairs.items():
            by_client.setdefault(client, []).append(value)
        over_pairs = gain(pairs, higher=True)
        columns.append(
            {
                "other": other,
                "clients": {name: statistics.fmean(values) for name, values in by_client.items()},
                **{key: getattr(over_pairs, key) for key in GAIN_KEYS},
            }
        )
    return {"reference": reference, "columns": columns}


def _experts(data: RunData, clients: Sequence[str]) -> Json:
    """Return the experts held, by round, module and client, as a flat list: expert, 10,000 x relevance, and so on."""
    modules = list(dict.fromkeys(line["module"] for line in data.assignment))
    rounds = sorted({line["round"] for line in data.assignment})
    held: list[Any] = [[[[] for _ in clients] for _ in modules] for _ in rounds]
    index_of = {
        name: {key: index for index, key in enumerate(keys)}
        for name, keys in (("module", modules), ("round", rounds), ("client", clients))
    }
    for line in data.assignment:
        pairs = zip(line["experts"], line["relevance"], strict=True)
        flat = [value for expert, relevance in pairs for value in (expert, round(10_000 * relevance))]
        indices = [index_of[key][line[key]] for key in ("round", "module", "client")]
        held[indices[0]][indices[1]][indices[2]] = flat
    return {
        "label": _label_with_seed(data),
        "modules": short_module_names(modules),
        "rounds": rounds,
        "held": held,
        "experts": 1 + max((expert for line in data.assignment for expert in line["experts"]), default=0),
        "always_random": data.config["method"].get("assignment") == "random",
        "scale": scale_of(data.config, len(clients)),
    }


def _label_with_seed(data: RunData) -> str:
    return f"{data.label}, seed {data.run.seed}"


def _routing(data: RunData) -> Json:
    """Return the shares of the tokens by module, client and expert."""
    modules = list(dict.fromkeys(module for shares in data.routing.values() for module in shares))
    names = {expert for shares in data.routing.values() for by_expert in shares.values() for expert in by_expert}
    experts = sorted(names, key=lambda expert: (not expert.isdigit(), int(expert) if expert.isdigit() else 0, expert))
    shares = [{client: by_module.get(module, {}) for client, by_module in data.routing.items()} for module in modules]
    return {
        "label": _label_with_seed(data),
        "modules": short_module_names(modules),
        "experts": experts,
        "shares": shares,
        "clients": sorted(data.routing),
    }


def _data(runs: Sequence[RunData], clients: Sequence[str]) -> Json | None:
    amounts = {name: counts for data in runs for name, counts in data.amounts.items()}
    if not amounts:
        return None
    splits = [split for split in SPLITS if any(counts.get(split) for counts in amounts.values())]
    sources = {name: source for data in runs for name, source in data.sources.items()}
    lines = [
        [name, sources.get(name, ""), [amounts[name].get(split, 0) for split in splits]]
        for name in clients
        if name in amounts
    ]
    with_sources = any(name != source for name, source in sources.items())
    return {"splits": [SPLIT_NAMES[split] for split in splits], "lines": lines, "sources": with_sources}


def _labels(runs: Sequence[RunData]) -> Json | None:
    shared = {name: counts for data in runs for name, counts in data.labels.items()}
    if not shared:
        return None
    labels = sorted({label for counts in shared.values() for label in counts})
    lines = [[name, [counts.get(label, 0) for label in labels]] for name, counts in sorted(shared.items())]
    return {"labels": labels, "lines": lines}


def _costs(runs: Sequence[RunData]) -> Json | None:
    """Return a line per label, the mean over its seeds; columns without any value are left out."""
    grouped: dict[str, list[Json]] = {}
    for label, of_label in _by_label(runs).items():
        for data in of_label:
            method = data.run.summary["method"]
            work = work_of(data.lines, method, max(1, len(data.clients)), max(1, data.done))
            grouped.setdefault(label, []).append({**data.costs, **work})
    all_costs = [costs for of_label in grouped.values() for costs in of_label]
    columns = [
        column
        for column in COSTS
        if any(column[0] in costs if column[3] is None else costs.get(column[0]) for costs in all_costs)
    ]
    lines = []
    for label, of_runs in grouped.items():
        means, texts = [], []
        for key, _, divisor, digits in columns:
            numbers = [costs[key] / divisor for costs in of_runs if key in costs]
            means.append(statistics.fmean(numbers) if numbers else 0.0)
            if digits is not None:
                texts.append(mean_and_deviation(numbers, digits))
            else:
                texts.append(short_count(means[-1]) if numbers else "")
        lines.append([label, means, texts])
    return {"columns": [title for _, title, _, _ in columns], "lines": lines} if columns else None
