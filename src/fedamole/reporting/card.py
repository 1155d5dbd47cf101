"""A model card, README.md, beside each personal model of a finished run; nothing but run files is read here.

It tells what a stranger needs, and nothing that is not the model's: no rows, texts, labels or paths, no other client.
Two equal runs write the same card, to the byte.
"""

import json
from dataclasses import asdict
from typing import Any

from fedamole.data.client_labels import client_labels
from fedamole.data.manifest import ClientRecord, read_manifest
from fedamole.errors import RunError
from fedamole.federation.best import best_round_of
from fedamole.federation.summary import nothing_trained
from fedamole.files import write_atomic
from fedamole.methods import METHODS
from fedamole.model.adapter_files import read_config
from fedamole.model.base import BUNDLED
from fedamole.model.pretrained import read_identity
from fedamole.received.names import quoted
from fedamole.reporting.markdown import code, literal
from fedamole.reporting.markdown import table as _table
from fedamole.runs.adapter_folder import CARD, IDENTITY
from fedamole.runs.adapter_folder import CONFIG as ADAPTER_CONFIG
from fedamole.runs.run_files import BASE, MAJORITY, SPLITS
from fedamole.runs.run_folder import MANIFEST, RUN, SUMMARY, RunFolder

Json = dict[str, Any]

TABLES = ("method", "federation", "training")
"""Tables of a config that a card repeats."""


def write_cards(folder: RunFolder) -> None:
    """Write the card of every saved model of a finished run that has none yet; the owner may have edited one."""
    summary = folder.read_json(SUMMARY)
    config = folder.tables()
    if folder.about["method"] not in METHODS:
        raise RunError(f"{folder.path / RUN}: {quoted(folder.about['method'])} is no method that is known here")
    clients = read_manifest(folder.place(MANIFEST)).clients
    labels = client_labels(client.to_dict() for client in clients)
    for client in clients:
        for row in summary["rows"]:
            place = folder.adapter(client.client, row)
            if (place / ADAPTER_CONFIG).exists() and not (place / CARD).exists():
                adapter, identity = read_config(place), asdict(read_identity(place))
                label = labels.get(client.client, "")
                text = card(folder.about, config, summary, client, row, adapter, identity, label)
                write_atomic(place / CARD, text)


def card(
    about: Json,
    config: Json,
    summary: Json,
    client: ClientRecord,
    row: str,
    adapter: Json,
    identity: Json,
    label: str = "",
) -> str:
    """The card of one client's model of one row of a run.

    `about`, `config` and `summary` are the run's files, `adapter` and `identity` the two JSON files beside the model.
    `label` is what the client is called where its name does not hold its value in a partition by value.
    """
    name, base, mixture = client.client, str(adapter["base_model_name_or_path"]), adapter["peft_type"] == "AMOLE"
    public = None if base.startswith("/") else base
    bundled = config["base"]["model"] == BUNDLED
    shipped = f"the one that comes with fedamole {about['fedamole']}"
    where = public or (shipped if bundled else "of no public name: told by its hashes alone")
    parts = (
        _front_matter(public, about["method"]),
        f"# A personal model of {literal(label or name)}\n\n{_what(about, config, summary, name, row)}",
        "## Base\n\n"
        + _table(
            ("", ""),
            [
                ("base", literal(where)),
                ("weights", literal(identity["weights"])),
                ("tokenizer", literal(identity["tokenizer"])),
                ("adapted modules", literal(identity["targets"])),
            ],
        )
        + f"\n\nThe hashes are fedamole's and stand in `{IDENTITY}` too. On another base the model is useless.",
        f"## Data\n\n{_data(client, summary, row)}",
        f"## Method\n\n{_method(about['method'], config)}",
        f"## Test scores\n\n{_scores(config, summary, name, row)}",
        f"## Load it\n\n{_load(public, bundled, mixture)}",
        f"## What it may reveal\n\n{_reveals(about['method'], adapter, public)}",
    )
    return "\n\n".join(parts) + "\n"


def _front_matter(public: str | None, method: str) -> str:
    """What the Hugging Face hub reads; values are written as JSON, which is YAML in which nothing needs escaping."""
    fields: Json = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "unspecified",
        "tags": list(dict.fromkeys(("fedamole", "federated-learning", "personalised", method))),
        **({} if public is None else {"base_model": public}),
    }
    return "\n".join(("---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"))


def _what(about: Json, config: Json, summary: Json, name: str, row: str) -> str:
    best, by = best_round_of(summary["rows"][row], name), config["evaluation"]["select"]
    early = "" if row == about["method"] else " It is the model after local training, before the round's aggregation."
    warning = ""
    if nothing_trained(summary):
        warning = f"**Not trained: all {summary['updates']} updates of its run failed. Do not use it.**\n\n"
    return (
        f"{warning}A PEFT adapter for a frozen language model, trained by fedamole {literal(about['fedamole'])} in a "
        f"federation of clients that kept their data, for one of them: {code(name)}. It was saved in round {best} of 0 "
        f"to {summary['rounds'] - 1}, the one with the best {by} on validation.{early}\n\n"
        "No licence has been chosen: `license` and `license_name` above are for the owner to fill in. What the base's "
        "licence asks for holds for this model too."
    )


def _data(client: ClientRecord, summary: Json, row: str) -> str:
    found = summary["rows"][row]["clients"].get(client.client, {})
    kind = "answers chosen from a closed list" if "accuracy" in found else "answers in free text"
    rows = [(split, str(len(getattr(client, split).rows))) for split in SPLITS]
    return f"The client's own, and no part of this folder: prompts with {kind}.\n\n" + _table(
        ("split", "examples"), rows
    )


def _method(name: str, config: Json) -> str:
    method = METHODS[name]
    settings = [
        (code(f"{table}.{key}"), literal(", ".join(map(str, value)) if isinstance(value, list) else value))
        for table in TABLES
        for key, value in config[table].items()
        if key != "name" and not isinstance(value, dict)
    ]
    return (
        f"`{name}`: {method.paper}. Between client and server: {method.communicates}. What stays with the client: "
        f"{method.stays_local}.\n\n" + _table(("setting", "value"), settings)
    )


def _scores(config: Json, summary: Json, name: str, row: str) -> str:
    rows = summary["rows"]
    chosen = "accuracy" in rows[row]["clients"].get(name, {})
    headline = "accuracy" if chosen else config["evaluation"]["generation_score"]
    told = ((BASE, "the untuned base"), (MAJORITY, "the most frequent answer, always"), (row, "this model"))
    found = [(text, rows.get(key, {}).get("clients", {}).get(name, {})) for key, text in told]
    lines = [(text, _number(one.get("score"), 1), _number(one.get("loss"), 4)) for text, one in found]
    return _table(("model", literal(headline), "loss"), lines) + (
        "\n\nOn the client's test split, which is read once, at the end; scores are 0 to 100, losses nats per token of "
        "the right answer."
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _load(public: str | None, bundled: bool, mixture: bool) -> str:
    named = json.dumps(public or "path/to/the/base")
    elsewhere = "" if public or bundled else f", base={named}"
    shipped = ["from importlib.resources import files", ""] if bundled else []
    taught = ["import fedamole  # teaches PEFT this kind of adapter"] if mixture else []
    base = 'str(files("fedamole") / "bundled" / "base")' if bundled else named
    return "\n".join(
        (
            "With fedamole, which makes sure that the base is the right one:",
            "",
            "```python",
            "from fedamole import load_personal_model",
            "",
            f'model, tokenizer = load_personal_model("path/to/this/folder"{elsewhere})',
            "```",
            "",
            f"With PEFT{'' if mixture else ' alone'}, which does not:",
            "",
            "```python",
            *shipped,
            *taught,
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"base = {base}",
            'folder = "path/to/this/folder"  # or its name on the hub',
            "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)",
            "tokenizer = AutoTokenizer.from_pretrained(base)",
            "```",
            "",
            "A prompt is a row in the client's template, usually with a line end at its end. An answer ends with the "
            "tokenizer's end-of-text token.",
        )
    )


def _reveals(method: str, adapter: Json, public: str | None) -> str:
    points = [
        "It was trained on private data and can have learnt some of it by heart. Whoever has it may find out whether a "
        "text was among the training data, or get parts of a rare one out of it.",
        f"Clients exchanged {METHODS[method].communicates}, so it may also hold parts of the other clients' data. "
        "Ask them before you publish it.",
        "This card tells how many examples the client has, and how hard they are.",
    ]
    if METHODS[method].communicates == "nothing":
        del points[1]
    if adapter.get("references"):
        points.append(
            f"`{ADAPTER_CONFIG}` holds the base's hidden states for {len(adapter['references'])} of the client's own "
            "prompts, which may be turned back into text."
        )
    if public is None:
        points.append(
            f"`{ADAPTER_CONFIG}` names the base by its folder on the machine that trained it "
            "(`base_model_name_or_path`): write its public name there before you publish it."
        )
    return "\n".join(f"- {point}" for point in points)
