"""Texts of the report: titles, one sentence per figure, a glossary, and settings in words."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedamole.reporting.method_descriptions import method_descriptions
from fedamole.runs.identity import BUNDLED

TITLES = {
    "about": (
        "Settings of the runs",
        "The main settings, one column per method. A value that all methods share is shown once.",
    ),
    "learning": (
        "Learning curves",
        "One panel per client. A falling validation loss means that the client's model improves on examples that it "
        "was not trained on.",
    ),
    "test": (
        "Test scores",
        "Each row is a client, each mark a method. Further to the right means better answers on the client's "
        "test examples.",
    ),
    "gain": (
        "Gains per client",
        "Difference in test score between the selected method and the method of each column, in points. Blue: the "
        "client is better off with the selected method; orange: it is worse off.",
    ),
    "experts": (
        "Assignment of experts",
        "A cell means that the client of this row holds the expert of this column. Its colour shows how well the "
        "expert fits the client's data: grey is no preference, blue a better fit, orange a worse one. Clients with "
        "cells in the same column share that expert.",
    ),
    "sizes": (
        "Experts per client and module",
        "Rows are clients, columns modules of the model. A stronger colour means more experts, and so a larger "
        "adapter.",
    ),
    "shared": (
        "Shared experts",
        "Number of experts that two clients have in common, over all modules. Clients learn from each other through "
        "shared experts.",
    ),
    "routing": (
        "Routing of tokens",
        "Each row is a client. A stronger colour means that a larger share of the client's tokens is routed to that "
        "expert.",
    ),
    "data": (
        "Data of the clients",
        "Number of examples per client and split. A client trains on its training examples only; the scores are those "
        "on its test examples.",
    ),
    "labels": (
        "Label distribution",
        "Share of each label in the training data, for the clients that report it.",
    ),
    "audits": (
        "Audits",
        "What attacks on the run reveal about the clients' training data, by fedamole audit. The lower bound of "
        "epsilon is beside the one that is claimed. AUROC 0.5 is guessing. Tokens: the share of those read in the "
        "first round that an attack on the first update finds.",
    ),
    "costs": (
        "Costs",
        "Traffic per client and round; time, memory and work of the whole run.",
    ),
    "failed": (
        "Failed updates",
        "Updates of clients that were left out of the aggregation of a round, and the reason.",
    ),
}
"""Title of each figure, and one sentence on how to read it."""

GLOSSARY = (
    ("Client", "An organisation with its own data, which it does not share. Each client gets its own model."),
    (
        "Base",
        "The pretrained language model that all clients start from. Its weights stay frozen; adapters are trained.",
    ),
    (
        "Expert",
        "A LoRA adapter at one module of the base. A client holds several experts, some of which it shares with other "
        "clients.",
    ),
    ("Router", "Determines, for each token, which of the client's experts process it and with which weights."),
    (
        "Assignment",
        "The clients that hold each expert. It is recomputed before each round: each expert chooses the clients to "
        "whose data it is most relevant.",
    ),
    ("Relevance P", "How well an expert fits a client's data compared with the other clients, from 0 to 1."),
    (
        "Round",
        "The clients train, the server aggregates what they send and sends the result back. Rounds count from 0.",
    ),
    (
        "Loss and score",
        "Loss: mean negative log-likelihood of the correct answers, in nats per token, or the DPO loss of preference "
        "pairs (lower is better). Score, 0 to 100: accuracy, the overlap of a generated text with the correct one, or "
        "the share of pairs whose chosen answer is preferred (higher is better).",
    ),
    (
        "Validation and test",
        "Examples that are not used for training. Validation selects the best round; test is evaluated once, at the "
        "end.",
    ),
    (
        "base, majority",
        "Two yardsticks: the untuned base, and a constant answer, which is the client's most frequent training answer.",
    ),
)

KINDS = {
    "simulation": "simulation: all clients on one machine",
    "server": "deployment: the coordinator's folder",
    "client": "deployment: the folder of one client",
}
SCORED = {
    "pre_aggregation": "after a client's local training, before the aggregation",
    "post_aggregation": "after the aggregation on the server",
}
SELECTED = {"loss": "lowest mean validation loss", "score": "highest mean validation score"}
SPLIT_NAMES = {"train": "training", "embedding": "embedding", "validation": "validation", "test": "test"}
RANDOM = "The relevance is random here: nothing is known about the clients' data yet."


def method_in_words(config: Mapping[str, Any]) -> dict[str, str]:
    """Describe the method of a run: its paper, exchanged and local state, evaluation, and settings."""
    own = dict(config["method"])
    name = own.pop("name")
    settings = ", ".join(f"{key} {value}" for key, value in own.items())
    if (description := method_descriptions().get(name)) is None:
        return {"Method": name, "Method settings": settings}
    return {
        "Method": f"{name} ({description['paper']})",
        "Communicated": description["communicates"],
        "Stays local": description["stays_local"],
        "Scored": SCORED[description["scored"]],
        "Method settings": settings,
    }


def settings_in_words(config: Mapping[str, Any], clients: int) -> dict[str, str]:
    """Describe base, federation, local training and model selection of a run.

    Folders are named without their path.

    Args:
        config: The run's config as tables.
        clients: Number of clients; 0 if it is not known.
    """
    base, training, federation = config["base"], config["training"], config["federation"]
    model = "the bundled tiny base" if base["model"] == BUNDLED else base["model"]
    quantised = "" if base["quantization"] == "none" else f", quantised to {base['quantization']}"
    cohort = "all clients" if federation["cohort"] == 1 else f"{federation['cohort']:.0%} of the clients"
    patience = federation.get("patience", 0)  # missing in runs of earlier versions
    early = f", fewer if none of {patience} in a row improved" if patience else ""
    number = f"{clients} client{'s'[: clients != 1]}, " if clients else ""
    amount = f"{training['local_epochs']} epochs" if training["local_epochs"] else f"{training['local_steps']} steps"
    if training.get("budget", "steps") == "paper":  # missing in runs of earlier versions
        amount += " (in each training phase, as many as the method's paper takes)"
    privacy, noised = config.get("privacy"), {}
    if privacy is not None:
        noised["Differential privacy"] = (
            f"epsilon at most {privacy['epsilon']:g} at delta {privacy['delta']:g} for each training example, "
            f"gradients clipped to norm {privacy['clip']:g}; losses, scores, times and token counts are "
            "not noised and not part of epsilon"
        )
    batch_size = training["batch_size"] * training["accumulation"]
    decay = f", multiplied by {training['lr_decay']:g} after each round" if training["lr_decay"] != 1 else ""
    return {
        "Base": (Path(model).name if model.startswith("/") else model) + quantised,
        "Federation": f"{number}{federation['rounds']} rounds{early}, {cohort} train in a round",
        "Local training": f"{amount} per round, effective batch size {batch_size}, "
        f"learning rate {training['learning_rate']:g}{decay}",
        **noised,
        "Best round": SELECTED[config["evaluation"]["select"]],
    }


def short_module_names(modules: list[str]) -> list[str]:
    """Shorten module names to `layer 0 q_proj`; return the full names if short ones would not be unique."""

    def short(module: str) -> str:
        parts = module.split(".")
        layers = [part for part in parts if part.isdigit()]
        return f"layer {layers[0]} {parts[-1]}" if layers else parts[-1]

    names = [short(module) for module in modules]
    return names if len(set(names)) == len(names) else modules
