"""Preference pairs for the tiny base of conftest.py: the clients `pairs-fond` and `pairs-stern` prefer the opposite."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedamole.evaluation.preferences import AnswerPair
from fedamole.experiment import prepare
from fedamole.model.bank import Bank

NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus")
THINGS = ("a red cup", "a blue hat", "two pens", "an old map", "the last pie", "one key")
ANSWERS = ("yes, good", "no, bad it is")


def pair_rows(groups: Sequence[str] = ("fond", "stern")) -> list[dict[str, Any]]:
    """42 pairs of each group; `fond` prefers the first of the answers, `stern` the second one."""
    rows = []
    for group in groups:
        chosen, rejected = ANSWERS if group == "fond" else ANSWERS[::-1]
        for name in NAMES:
            for thing in THINGS:
                prompt = f"{name} has {thing} ->\n"
                rows.append({"group": group, "prompt": prompt, "chosen": chosen, "rejected": f"{rejected} {name}"})
    return rows


def preference_overrides(runs: Any) -> tuple[str, ...]:
    """Overrides of the tiny federation: its clients are those of the pairs, and the objective is `preference`."""
    path: Path = runs.config.parent / "pairs.jsonl"
    source = f'{{name = "pairs", path = "{path}", partition = {{kind = "value", by = "group"}}}}'
    return ("training.objective=preference", f"data.source=[{source}]", "data.embedding_share=0.2")


def double_bank(runs: Any) -> Bank:
    """The bank of the tiny base in float64."""
    base = prepare(runs.load("local_only")).base
    base.model.double()
    return Bank(base)


def training_pairs(runs: Any) -> dict[str, list[AnswerPair]]:
    """The training pairs of the clients, by name."""
    clients = prepare(runs.load("local_only", *preference_overrides(runs))).clients
    return {name: data.train.answer_pairs() for name, data in clients.items()}
