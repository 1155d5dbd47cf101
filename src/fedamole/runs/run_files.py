"""What the JSON files of a run's folder look like; docs/run-folder.md tells what their fields mean.

Keys that are not named here are left alone: a newer version may write more of them.
"""

import re

from fedamole.received.forms import (
    MOST_WHOLE,
    Form,
    FormError,
    choice,
    either,
    listed,
    mapping,
    name,
    nothing,
    number,
    record,
    text,
    whole,
)
from fedamole.runs.adapter_folder import MOST_EXPERTS

RUN, CONFIG, MANIFEST = "run.json", "config.toml", "manifest.json"
METRICS, ASSIGNMENT, SUMMARY = "metrics.jsonl", "assignment.jsonl", "summary.json"
CLIENTS = "clients.json"
"""What the clients of a deployment told of themselves: amounts, device, and labels where they share them."""
ROUTING = "routing.json"
"""How the tokens of each client's data are routed, where it has been worked out."""

SPLITS = ("train", "embedding", "validation", "test")
"""The four parts of a client's data."""
LONGEST_VALUE = 200
"""Characters of a client's `value` that are kept."""
BASE, MAJORITY = "base", "majority"
"""Columns of every table: the untuned base, and the most frequent training answer."""

MOST_ROUNDS = 100_000
"""Rounds of a run that are read."""

_number = number(finite=False)
_round = whole(-1, MOST_ROUNDS)
_amount = number(0)
_module = text(1000)
_hash = text(200)
_scores = mapping(_number, text(100))

_split_form = record(
    {
        "table": choice("train", "test"),
        "rows": listed(whole(), 100_000_000),
        "sha256": text(100),
    }
)
client_form = record(
    {"client": name, "source": name, **dict.fromkeys(SPLITS, _split_form)},
    {"value": text(LONGEST_VALUE)},
)
"""What a client of a manifest looks like in JSON."""

_about = record(
    {
        "format": whole(),
        "fedamole": text(100),
        "id": text(64, re.compile(r"[A-Za-z0-9._-]+")),
        "method": name,
        "base": record({"weights": _hash, "tokenizer": _hash, "targets": _hash}, closed=True),
    },
    {"kind": choice("simulation", "server", "client"), "base_model": text(4096)},
)
_row_of_summary = record(
    {
        "best_round": either(nothing, mapping(_round), _round),
        "mean": _number,
        "worst": _number,
        "spread": _number,
        "last_mean": _number,
        "clients": mapping(record({"score": _number}, {"loss": _number})),
    },
    {"worst_client": name},
)
_costs = dict.fromkeys(
    (
        "bytes_down_per_client_round",
        "bytes_up_per_client_round",
        "seconds_update",
        "seconds_evaluate",
        "peak_memory_mib",
    ),
    _amount,
)
_summary = record(
    {"format": whole(), "method": name, "rounds": whole(0, MOST_ROUNDS), "rows": mapping(_row_of_summary), **_costs},
    {"updates": whole(), "left_out": whole()},
)

_client = {"client": name}
_line = {
    "train": record(
        {**_client, "bytes_down": _amount},
        {
            "bytes_up": _amount,
            "exchange": whole(),
            "loss": _number,
            "steps": whole(),
            "probed": whole(),
            "group": whole(),
            "forward_tokens": whole(),
            "backward_tokens": whole(),
            "trained_parameters": whole(),
            "peak_memory_mib": _amount,
            "seconds": _amount,
            "failed": text(),
        },
    ),
    "validation": record(
        {**_client, "method": name, "loss": _number},
        {
            "score": _number,
            "exchange": whole(),
            "probed": whole(),
            "forward_tokens": whole(),
            "bytes_down": _amount,
        },
    ),
    "round": record({"seconds_update": _amount, "seconds_evaluate": _amount}, {"cohort": listed(name)}),
    "test": record({**_client, "method": name}, {"which": choice("best", "last"), "loss": _number, "score": _number}),
}
_any_line = record({"round": _round, "split": choice(*_line)})


def _metrics(value: object, where: str) -> None:
    _any_line(value, where)
    assert isinstance(value, dict)  # the form before saw to it
    _line[value["split"]](value, where)


_held = record(
    {
        "round": _round,
        "module": _module,
        "client": name,
        "experts": listed(whole(0, MOST_EXPERTS - 1), MOST_EXPERTS),
        "relevance": listed(number(0, 1.000001), MOST_EXPERTS),
    }
)


def _assignment(value: object, where: str) -> None:
    _held(value, where)
    assert isinstance(value, dict)  # the form before saw to it
    if len(value["experts"]) != len(value["relevance"]):
        raise FormError(f"there are {len(value['experts'])} experts and {len(value['relevance'])} numbers of relevance")


_STATE = re.compile(r"clients/[A-Za-z0-9][A-Za-z0-9._-]*/state/round-\d{4,6}(-exchange-\d{1,2})?\.safetensors")
_progress = record(
    {"best_round": _round, "best": _number, "latest": mapping(_scores)},
    {"own_rounds": mapping(_round), "own_best": mapping(_number)},
)
checkpoint_form = record(
    {
        "run": text(64),
        "round": whole(0, MOST_ROUNDS),
        "server_sha256": _hash,
        "clients": mapping(_hash, text(500, _STATE)),
        "progress": record(
            {}, {"rows": mapping(_progress), "answered": mapping(listed(_round, 2)), "examples": mapping(whole())}
        ),
    },
)
"""The end of a round; `progress` is the loop's, and of what it adds to it nothing is known here."""

config_form = record(
    {
        "run": record({"name": text(1000), "seed": whole(-MOST_WHOLE)}),
        "method": record({"name": name}, {"experts": either(nothing, whole(1, MOST_EXPERTS))}),
        "base": record({"model": text(4096), "quantization": text(100)}),
        "federation": record({"rounds": whole(1, MOST_ROUNDS), "cohort": number(0, 1)}),
        "training": record(
            {
                "local_epochs": _amount,
                "local_steps": _amount,
                "batch_size": whole(1),
                "accumulation": whole(1),
                "learning_rate": number(),
                "lr_decay": number(),
            }
        ),
        "evaluation": record({"select": choice("loss", "score"), "generation_score": text(100)}),
    },
    {"deployment": record({}, {"clients": listed(name)})},
)
"""What reports and cards read of a run's config; `fedamole.config` checks the whole of it."""

_labels = mapping(whole(), text(1000))
FORMS: dict[str, Form] = {
    RUN: _about,
    MANIFEST: record({"clients": either(listed(name), listed(client_form))}),
    SUMMARY: _summary,
    CLIENTS: mapping(record({}, {"examples": mapping(whole()), "labels": either(nothing, _labels)})),
    ROUTING: record({"clients": mapping(mapping(mapping(number(0, 1.000001), text(100)), _module))}),
    METRICS: _metrics,
    ASSIGNMENT: _assignment,
    "best.json": mapping(_round),
}
"""By name of the file; of a file of lines, the form of each."""
