"""Formats of the JSON files in a run folder; docs/run-folder.md explains their fields.

Unknown keys are allowed, because a newer version may write more of them.
"""

import re

from fedamole.received.forms import (
    MOST_WHOLE,
    Form,
    FormError,
    boolean,
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
"""Data that the clients of a deployment report: amounts of data, device, and labels if they share them."""
CHOICE = "choice.json"
"""Which run's model each client has, in a folder of `fedamole choose --out`."""
TRACKERS = "trackers.json"
"""By tracker: the last step that it has, and the id of the run there."""
ROUTING = "routing.json"
"""Shares of each client's tokens by expert, written by `fedamole explain`."""
AUDIT = "audit.json"
"""Results of `fedamole audit`."""

SPLITS = ("train", "embedding", "validation", "test")
"""The four splits of a client's data."""
LONGEST_VALUE = 200
"""Maximum number of characters of a client's `value`."""
BASE, MAJORITY = "base", "majority"
"""Columns of every table: the untuned base, and a constant answer (the most frequent training answer)."""

MOST_ROUNDS = 100_000
"""Maximum number of rounds of a run."""

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
"""Format of a client in a manifest."""

_identity = record({"weights": _hash, "tokenizer": _hash, "targets": _hash}, closed=True)
_about = record(
    {
        "format": whole(),
        "fedamole": text(100),
        "id": text(64, re.compile(r"[A-Za-z0-9._-]+")),
        "method": name,
        "base": _identity,
    },
    {
        "kind": choice("simulation", "server", "client"),
        "base_model": text(4096),
        "server_base": _identity,
        "started": text(30),
        "sessions": listed(record({"started": text(30), "seconds": _amount, "command": text(4096)}), 100_000),
        "commit": text(64),
        "modified": boolean,
        "versions": mapping(text(100), text(100)),
        "hardware": record(
            {},
            {
                "system": text(100),
                "machine": text(100),
                "cpus": whole(1),
                "memory_gib": _amount,
                "gpus": listed(text(200), 1000),
            },
        ),
    },
)
_summary_row = record(
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
    {"format": whole(), "method": name, "rounds": whole(0, MOST_ROUNDS), "rows": mapping(_summary_row), **_costs},
    {
        "updates": whole(),
        "left_out": whole(),
        "epsilon": mapping(_amount),
        "stopped": record({"rounds": whole(1, MOST_ROUNDS), "patience": whole(0, MOST_ROUNDS)}),
    },
)

_client = {"client": name}
_line_forms = {
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
            "epsilon": _amount,
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
    "server": record(
        {"steps": whole(), "forward_tokens": whole(), "backward_tokens": whole(), "seconds": _amount},
        {"probed": whole(), "consensus_agreement": number(0, 1)},
    ),
    "round": record({"seconds_update": _amount, "seconds_evaluate": _amount}, {"cohort": listed(name)}),
    "test": record({**_client, "method": name}, {"which": choice("best", "last"), "loss": _number, "score": _number}),
}
_line_head = record({"round": _round, "split": choice(*_line_forms)})


def _metrics(value: object, where: str) -> None:
    _line_head(value, where)
    assert isinstance(value, dict)  # checked by the form above
    _line_forms[value["split"]](value, where)


_assignment_line = record(
    {
        "round": _round,
        "module": _module,
        "client": name,
        "experts": listed(whole(0, MOST_EXPERTS - 1), MOST_EXPERTS),
        "relevance": listed(number(0, 1.000001), MOST_EXPERTS),
    }
)


def _assignment(value: object, where: str) -> None:
    _assignment_line(value, where)
    assert isinstance(value, dict)  # checked by the form above
    if len(value["experts"]) != len(value["relevance"]):
        raise FormError(f"{len(value['experts'])} experts, but {len(value['relevance'])} values of relevance")


_STATE_PATH = re.compile(r"clients/[A-Za-z0-9][A-Za-z0-9._-]*/state/round-\d{4,6}(-exchange-\d{1,2})?\.safetensors")
_progress = record(
    {"best_round": _round, "best": _number, "latest": mapping(_scores)},
    {"own_rounds": mapping(_round), "own_best": mapping(_number)},
)
checkpoint_form = record(
    {
        "run": text(64),
        "round": whole(0, MOST_ROUNDS),
        "server_sha256": _hash,
        "clients": mapping(_hash, text(500, _STATE_PATH)),
        "progress": record(
            {}, {"rows": mapping(_progress), "answered": mapping(listed(_round, 2)), "examples": mapping(whole())}
        ),
    },
)
"""Format of a checkpoint. `progress` belongs to the training loop, which may store more keys in it."""

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
    {
        "deployment": record({}, {"clients": listed(name)}),
        "privacy": record({"epsilon": _amount, "delta": _amount, "clip": _amount}),
        "data": record({}, {"source": listed(record({"name": name}, {"label_noise": number(0, 1)}))}),
    },
)
"""The part of a run's config that reports and cards read; `fedamole.config` checks all of it."""

table_form = record({"name": text(1000), "rows": whole(), "sha256": text(100)})
"""A file of rows, as a manifest stores it."""
_labels = mapping(whole(), text(1000))
_not_applicable = record({"not_applicable": text()}, closed=True)
_share = number(0, 1)
_attack = record({"auroc": _share, "error": _amount, "tpr": _share})
_canaries = record(
    {
        "claimed": either(nothing, _amount),
        "bound": _amount,
        "delta": _share,
        "canaries": whole(1),
        "guesses": whole(),
        "correct": whole(),
        "steps": whole(1),
        "noise": either(nothing, _amount),
        "noise_repeats": boolean,
    },
    closed=True,
)
_audited_client = record(
    {
        "canaries": either(_not_applicable, _canaries),
        "membership": either(
            _not_applicable,
            record(
                {"train": whole(1), "test": whole(1), "own": _attack},
                {"others": record({"models": whole(1), "auroc": _share, "error": _amount, "tpr": _share})},
                closed=True,
            ),
        ),
        "inversion": either(
            _not_applicable,
            record(
                {"recall": _share, "chance": _share, "highest": _share, "tokens": whole(1), "vocabulary": whole(1)},
                closed=True,
            ),
        ),
    }
)
_attribute = record(
    {
        "attribute": choice("category", "source", "task"),
        "accuracy": _share,
        "chance": _share,
        "p_value": _share,
        "clients": whole(1),
        "values": whole(1),
    },
    closed=True,
)
_audit = record(
    {
        "format": whole(1, 1),
        "method": name,
        "clients": mapping(_audited_client),
        "attribute": either(_not_applicable, _attribute),
    }
)
FORMS: dict[str, Form] = {
    RUN: _about,
    MANIFEST: record({"clients": either(listed(name), listed(client_form))}, {"public": table_form}),
    SUMMARY: _summary,
    CLIENTS: mapping(record({}, {"examples": mapping(whole()), "labels": either(nothing, _labels)})),
    CHOICE: record(
        {
            "format": whole(1, 1),
            "clients": mapping(
                record({"run": text(4096), "id": text(64), "variant": name, "untuned": boolean}, closed=True)
            ),
        }
    ),
    ROUTING: record({"clients": mapping(mapping(mapping(number(0, 1.000001), text(100)), _module))}),
    TRACKERS: mapping(record({"step": whole(-1, MOST_ROUNDS + 1)}, {"id": text(200), "finished": boolean}), text(100)),
    AUDIT: _audit,
    METRICS: _metrics,
    ASSIGNMENT: _assignment,
    "best.json": mapping(_round),
}
"""Format of each file by its name; for .jsonl files, the format of a line."""
