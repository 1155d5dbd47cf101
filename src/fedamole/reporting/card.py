"""Model cards (README.md) of the personal models of a finished run, computed from run files.

A card contains no data rows, texts, labels or paths, and no names of other clients. Equal runs give identical cards.
"""

import json
import math
from dataclasses import asdict
from typing import Any

from fedamole.data.client_labels import client_labels
from fedamole.data.manifest import ClientRecord, read_manifest
from fedamole.errors import RunError
from fedamole.federation.best import best_round_of
from fedamole.federation.summary import nothing_trained, stopped_early
from fedamole.files import write_atomic
from fedamole.methods import METHODS
from fedamole.model.adapter_files import read_config
from fedamole.model.pretrained import read_identity
from fedamole.received.names import quoted
from fedamole.reporting.markdown import code, literal, table
from fedamole.reporting.runs import label_noise
from fedamole.runs.adapter_folder import CARD, IDENTITY
from fedamole.runs.adapter_folder import CONFIG as ADAPTER_CONFIG
from fedamole.runs.identity import BUNDLED
from fedamole.runs.run_files import BASE, MAJORITY, SPLITS
from fedamole.runs.run_folder import MANIFEST, RUN, SUMMARY, RunFolder

Json = dict[str, Any]

SHOWN_TABLES = ("method", "federation", "training")
"""Tables of a config that a card shows."""


METRIC_TYPES = {"preference": "accuracy", "rouge_l": "rouge", "token_f1": "f1"}
"""Types of metrics on the hub, for scores whose name there is another."""


def write_cards(folder: RunFolder) -> None:
    """Write the card of every saved model of a finished run; keep existing cards, which may have been edited."""
    summary = folder.read_json(SUMMARY)
    config = folder.tables()
    if folder.about["method"] not in METHODS:
        raise RunError(
            f"{folder.path / RUN}: {quoted(folder.about['method'])} is not a method of this version of fedamole"
        )
    clients = read_manifest(folder.place(MANIFEST)).clients
    labels = client_labels(client.to_dict() for client in clients)
    for client in clients:
        for variant in summary["rows"]:
            path = folder.adapter(client.client, variant)
            if (path / ADAPTER_CONFIG).exists() and not (path / CARD).exists():
                adapter, identity = read_config(path), asdict(read_identity(path))
                label = labels.get(client.client, "")
                text = card(folder.about, config, summary, client, variant, adapter, identity, label)
                write_atomic(path / CARD, text)


def card(
    about: Json,
    config: Json,
    summary: Json,
    client: ClientRecord,
    variant: str,
    adapter: Json,
    identity: Json,
    label: str = "",
) -> str:
    """Return the card of a client's model.

    Args:
        about: run.json of the run.
        config: config.toml of the run.
        summary: summary.json of the run.
        client: The client's entry in the manifest.
        variant: Variant (scored model) of the run.
        adapter: adapter_config.json of the model.
        identity: base_identity.json of the model.
        label: The client's label in tables, if it differs from its name.
    """
    name, base, mixture = client.client, str(adapter["base_model_name_or_path"]), adapter["peft_type"] == "AMOLE"
    public = None if base.startswith("/") else base
    bundled = config["base"]["model"] == BUNDLED
    shipped = f"the bundled base of fedamole {about['fedamole']}"
    base_name = public or (shipped if bundled else "without a public name; identified by its hashes")
    parts = (
        _front_matter(public, about["method"], model_index(about, config, summary, name, variant)),
        f"# A personal model of {literal(label or name)}\n\n{_introduction(about, config, summary, name, variant)}",
        "## Base\n\n"
        + table(
            ("", ""),
            [
                ("base", literal(base_name)),
                ("weights", literal(identity["weights"])),
                ("tokenizer", literal(identity["tokenizer"])),
                ("adapted modules", literal(identity["targets"])),
            ],
        )
        + f"\n\nThe hashes are computed by fedamole and are in `{IDENTITY}` too. The model works on this base only.",
        f"## Data\n\n{_data(config, client, summary, variant)}",
        f"## Method\n\n{_method(about['method'], config)}",
        f"## Test scores\n\n{_scores(config, summary, name, variant)}",
        f"## Load it\n\n{_load(public, bundled, mixture)}",
        f"## Privacy\n\n{_privacy(about['method'], adapter, public, _epsilon(config, summary, name))}",
    )
    return "\n\n".join(parts) + "\n"


def model_index(about: Json, config: Json, summary: Json, name: str, variant: str) -> list[Json]:
    """Return the test results of a client's model as the hub's `model-index`; empty without scores."""
    own = summary["rows"][variant]["clients"].get(name, {})
    headline = score_name_of(config, own)
    metrics = [
        {"type": METRIC_TYPES.get(headline, headline), "name": f"{headline} (0 to 100)", "value": own.get("score")},
        {"type": "loss", "name": "loss per token of the correct answer, in nats", "value": own.get("loss")},
    ]
    if "preference" in own:
        metrics[1]["name"] = "loss of DPO per pair"
    metrics = [metric for metric in metrics if isinstance(metric["value"], float) and math.isfinite(metric["value"])]
    if not metrics or nothing_trained(summary):
        return []
    result = {
        "task": {"type": "text-generation", "name": "Text generation"},
        "dataset": {"type": "private", "name": "test split of the client's own data"},
        "metrics": metrics,
    }
    return [{"name": f"{about['method']} {name}", "results": [result]}]


def score_name_of(config: Json, scores: Json) -> str:
    """Return the name of the headline score of a client's test scores."""
    return next((key for key in ("accuracy", "preference") if key in scores), config["evaluation"]["generation_score"])


def _front_matter(public: str | None, method: str, index: list[Json]) -> str:
    """Return the YAML metadata for the Hugging Face hub. Values are written as JSON, which is valid YAML."""
    fields: Json = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "unspecified",
        "tags": list(dict.fromkeys(("fedamole", "federated-learning", "personalised", method))),
        **({} if public is None else {"base_model": public}),
        **({"model-index": index} if index else {}),
    }
    return "\n".join(("---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"))


def _introduction(about: Json, config: Json, summary: Json, name: str, variant: str) -> str:
    best, by = best_round_of(summary["rows"][variant], name), config["evaluation"]["select"]
    stopped = f" The run {text}." if (text := stopped_early(summary)) else ""
    early = "" if variant == about["method"] else " It is the model after local training, before the aggregation."
    warning = ""
    if nothing_trained(summary):
        warning = f"**Not trained: all {summary['updates']} updates of its run failed. Do not use this model.**\n\n"
    return (
        f"{warning}A PEFT adapter for a frozen language model, trained by fedamole {literal(about['fedamole'])} in a "
        f"federation of clients that did not share their data. It is the model of the client {code(name)}. It was "
        f"saved in round {best} of 0 to {summary['rounds'] - 1}, the round with the best validation "
        f"{by}.{stopped}{early}\n\n"
        "No licence has been chosen: the owner fills in `license` and `license_name` above. The terms of the base's "
        "licence apply to this model too."
    )


def _data(config: Json, client: ClientRecord, summary: Json, variant: str) -> str:
    scores = summary["rows"][variant]["clients"].get(client.client, {})
    closed, pairs = "accuracy" in scores, "preference" in scores
    kind = "answers chosen from a closed list" if closed else "answers in free text"
    kind = "pairs of a chosen and a rejected answer" if pairs else kind
    rows = [(split, str(len(getattr(client, split).rows))) for split in SPLITS]
    share = label_noise(config).get(client.source, 0.0)
    noise = (
        f" **For an experiment, {share:.0%} of the answers of the training and the embedding split are wrong on "
        "purpose** (`label_noise` of its data source)."
    )
    return (
        f"The client's own data, which are not in this folder: prompts with {kind}.{noise if share else ''}\n\n"
        + table(("split", "examples"), rows)
    )


def _method(method_name: str, config: Json) -> str:
    method = METHODS[method_name]
    settings = [
        (code(f"{name}.{key}"), literal(", ".join(map(str, value)) if isinstance(value, list) else value))
        for name in SHOWN_TABLES
        for key, value in config[name].items()
        if key != "name" and not isinstance(value, dict)
    ]
    return (
        f"`{method_name}`: {method.paper}. Communicated between client and server: {method.communicates}. Stays with "
        f"the client: {method.stays_local}.\n\n" + table(("setting", "value"), settings)
    )


def _scores(config: Json, summary: Json, name: str, variant: str) -> str:
    rows = summary["rows"]
    own = rows[variant]["clients"].get(name, {})
    score_name = score_name_of(config, own)
    loss = "of DPO per pair" if score_name == "preference" else "per token of the correct answer"
    models = ((BASE, "untuned base"), (MAJORITY, "constant answer (the most frequent)"), (variant, "this model"))
    scores = [(title, rows.get(key, {}).get("clients", {}).get(name, {})) for key, title in models]
    lines = [(title, _number(values.get("score"), 1), _number(values.get("loss"), 4)) for title, values in scores]
    unnoised = " They are not noised, and not covered by the epsilon below." if "epsilon" in summary else ""
    return table(("model", literal(score_name), "loss"), lines) + (
        "\n\nOn the client's test split, which is evaluated once, at the end. Scores are 0 to 100, losses in nats "
        f"{loss}.{unnoised}"
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _load(public: str | None, bundled: bool, mixture: bool) -> str:
    base_path = json.dumps(public or "path/to/the/base")
    base_argument = "" if public or bundled else f", base={base_path}"
    resources = ["from importlib.resources import files", ""] if bundled else []
    register = ["import fedamole  # registers the adapter type with PEFT"] if mixture else []
    base = 'str(files("fedamole") / "bundled" / "base")' if bundled else base_path
    return "\n".join(
        (
            "With fedamole, which checks that the base is the right one:",
            "",
            "```python",
            "from fedamole import load_personal_model",
            "",
            f'model, tokenizer = load_personal_model("path/to/this/folder"{base_argument})',
            "```",
            "",
            f"With PEFT{'' if mixture else ' alone'}, without this check:",
            "",
            "```python",
            *resources,
            *register,
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"base = {base}",
            'folder = "path/to/this/folder"  # or its name on the hub',
            "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)",
            "tokenizer = AutoTokenizer.from_pretrained(base)",
            "```",
            "",
            "A prompt is a data row in the client's template, which usually ends with a line break. An answer ends "
            "with the tokenizer's end-of-text token.",
        )
    )


def _epsilon(config: Json, summary: Json, name: str) -> str:
    """Return what the client has spent of its privacy budget, and what that covers; empty without `[privacy]`."""
    if (epsilon := summary.get("epsilon", {}).get(name)) is None:
        return ""
    method = METHODS[summary["method"]]
    covered = "trained" in method.releases.values() and method.released_share == 1
    model = (
        "This model is computed from noised values alone, but the round was chosen by the client's validation split "
        "without noise."
        if covered
        else "This model was also trained without noise, at the client; epsilon does not cover it: do not publish it."
    )
    return (
        f"Differential privacy: what the client sent in the run has epsilon {epsilon:.2f} at delta "
        f"{config['privacy']['delta']:g} for each of its training examples. {model} The scores and losses of this card "
        "are not noised, and not covered: they are figures for the experimenter."
    )


def _privacy(method: str, adapter: Json, public: str | None, epsilon: str) -> str:
    points = [
        *filter(None, [epsilon]),
        "It was trained on private data and may have memorised some of it. A person with the model may be able to find "
        "out whether a text was in the training data, or to extract parts of a rare text.",
        f"Clients exchanged {METHODS[method].communicates}, so it may also hold parts of the other clients' data. "
        "Ask them before you publish the model.",
        "This card shows how many examples the client has, and how difficult they are.",
    ]
    if METHODS[method].communicates == "nothing":
        del points[-2]
    if adapter.get("references"):
        points.append(
            f"`{ADAPTER_CONFIG}` holds the base's hidden states for {len(adapter['references'])} of the client's own "
            "prompts. It may be possible to reconstruct the texts from them."
        )
    if public is None:
        points.append(
            f"`{ADAPTER_CONFIG}` names the base by its folder on the machine that trained it "
            "(`base_model_name_or_path`): replace it by a public name before you publish the model."
        )
    return "\n".join(f"- {point}" for point in points)
