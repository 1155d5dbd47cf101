"""Everything a report says in words: titles, one sentence per figure, a glossary, and settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedamole.methods import METHODS, described
from fedamole.model.base import BUNDLED

TITLES = {
    "about": (
        "What was run",
        "The settings that matter, one column per method; what all methods have in common stands there once.",
    ),
    "learning": (
        "How the models learn",
        "Each small picture is one client: a falling loss means that its model does better and better on examples it "
        "was not trained on.",
    ),
    "test": (
        "How good the final models are",
        "Each line is a client, each mark a method: the further to the right, the better the answers on the client's "
        "test examples.",
    ),
    "gain": (
        "Who gains, and how much",
        "A blue cell is a client that is better off with the chosen method than with the one of that column, an "
        "orange cell one that is worse off; numbers are points of test score.",
    ),
    "experts": (
        "Who holds which expert",
        "A coloured square means that the client of this line holds the expert of this column, and a stronger "
        "colour that it suits the client's data better; two squares in one column are clients that share an expert.",
    ),
    "sizes": (
        "How many experts each client holds",
        "Each line is a client, each column a part of the model: the stronger the colour, the more experts the client "
        "holds there, so the larger its model is.",
    ),
    "shared": (
        "Who shares experts with whom",
        "The stronger the colour where two clients meet, the more experts they hold in common, and the more they can "
        "learn from each other.",
    ),
    "routing": (
        "Which expert the words go to",
        "Each line is a client's words: a stronger colour means that a larger share of them is sent to that expert.",
    ),
    "data": (
        "How much data each client has",
        "The longer the bar, the more examples the client has; it learns from the training examples alone, and is "
        "judged by the test examples.",
    ),
    "labels": (
        "Which answers are how frequent",
        "Each bar is the training data of a client that tells it: the longer a piece, the more often that answer "
        "is the right one.",
    ),
    "costs": (
        "What it cost",
        "The longer a bar, the more bytes every client sends and receives per round, or the more time or memory "
        "the whole run took.",
    ),
    "failed": (
        "Who was left out",
        "Each line is a client whose work did not count in a round, and why.",
    ),
}
"""Title of each figure, and what to see in it, in one sentence for somebody who has not read the paper."""

GLOSSARY = (
    ("Client", "An organisation with data of its own, which stay with it. Each client gets a model of its own."),
    ("Base", "The language model that everybody starts from; it is never changed, small additions to it are trained."),
    (
        "Expert",
        "Such an addition (a LoRA adapter) at one part of the base. A client holds several, and shares some of them "
        "with other clients.",
    ),
    ("Router", "Decides for each word which of the client's experts work on it, and how much each of them counts."),
    (
        "Assignment",
        "Who holds which expert. It is made anew before each round: each expert chooses the clients whose data it "
        "suits best.",
    ),
    ("Relevance P", "How well an expert suits a client's data, compared with the other clients: from 0 to 1."),
    (
        "Round",
        "Clients train, the server merges what they send, and hands the result out again. Rounds count from 0.",
    ),
    (
        "Loss and score",
        "The loss says how surprised a model is by the right answers (lower is better). The score, 0 to 100, says how "
        "many answers are right, or how much a free text has in common with the right one (higher is better).",
    ),
    (
        "Validation and test",
        "Examples that are not trained on: by validation the best round is chosen; test is read once, at the end.",
    ),
    (
        "base, majority",
        "Two yardsticks: the base as it was before, and always giving the client's most frequent answer.",
    ),
)

KINDS = {
    "simulation": "simulation: all clients on one machine",
    "server": "deployment: what the coordinator knows",
    "client": "deployment: what one client knows",
}
SCORED = {
    "pre_aggregation": "right after a client's own training",
    "post_aggregation": "after the server has merged the replies",
}
SELECTED = {"loss": "lowest mean validation loss", "score": "highest mean validation score"}
SPLIT_NAMES = {"train": "training", "embedding": "for the relevance", "validation": "validation", "test": "test"}
RANDOM = "Relevance is a random draw here: nothing was known of the clients' data yet."


def method_in_words(config: Mapping[str, Any]) -> dict[str, str]:
    """What a method is: its source, what travels, what stays, which model is scored, its own settings."""
    own = dict(config["method"])
    name = own.pop("name")
    settings = ", ".join(f"{key} {value}" for key, value in own.items())
    if name not in METHODS:
        return {"Method": name, "Its settings": settings}
    about = described(name)
    return {
        "Method": f"{name} ({about['paper']})",
        "What travels": about["communicates"],
        "What stays": about["stays_local"],
        "Scored": SCORED[about["scored"]],
        "Its settings": settings,
    }


def settings_in_words(config: Mapping[str, Any], clients: int) -> dict[str, str]:
    """Base, rounds, local training and selection of a run; 0 clients where nobody here knows how many there are.

    Folders are told by their names, not by where they lie.
    """
    base, training, federation = config["base"], config["training"], config["federation"]
    model = "the bundled tiny one" if base["model"] == BUNDLED else base["model"]
    quantised = "" if base["quantization"] == "none" else f", held in {base['quantization']}"
    share = "all clients" if federation["cohort"] == 1 else f"{federation['cohort']:.0%} of the clients"
    who = f"{clients} client{'s'[: clients != 1]}, " if clients else ""
    passes = (
        f"{training['local_epochs']} passes over the client's data"
        if training["local_epochs"]
        else f"{training['local_steps']} steps"
    )
    if training.get("budget", "steps") == "paper":  # runs of earlier versions have no such setting
        passes += " (of each of its trainings as many as the method's paper takes)"
    decay = f", times {training['lr_decay']:g} after each round" if training["lr_decay"] != 1 else ""
    return {
        "Base": (Path(model).name if model.startswith("/") else model) + quantised,
        "Federation": f"{who}{federation['rounds']} rounds, {share} train in a round",
        "Local training": f"{passes} of {training['batch_size'] * training['accumulation']} examples in a round, "
        f"learning rate {training['learning_rate']:g}{decay}",
        "Best round": SELECTED[config["evaluation"]["select"]],
    }


def short_names(modules: list[str]) -> list[str]:
    """Names of modules as `layer 0 q_proj`; the full ones where that would make two of them equal."""

    def short(module: str) -> str:
        parts = module.split(".")
        layers = [part for part in parts if part.isdigit()]
        return f"layer {layers[0]} {parts[-1]}" if layers else parts[-1]

    names = [short(module) for module in modules]
    return names if len(set(names)) == len(names) else modules
