"""Selective merging by hand: what is taken, what is refused, and in which order."""

from collections.abc import Mapping, Sequence
from functools import partial

import pytest
import torch

from fedamole.errors import ConfigError
from fedamole.merging.low_rank import LoraFactors
from fedamole.merging.selective import COEFFICIENTS, Selection, blend, merge_selectively, useful


def lora(value: float) -> LoraFactors:
    """A change of one value."""
    return {"m": (torch.tensor([[value]]), torch.ones(1, 1))}


def value(factors: LoraFactors) -> float:
    a, b = factors["m"]
    return float(b @ a)


def merged(
    values: Mapping[str, float], target: float, steps: int = 9, groups: Mapping[str, Sequence[str]] | None = None
) -> tuple[dict[str, Selection], list[set[str]]]:
    """Merge changes of one value; the loss is the distance to a target. Also returns the groups of each call."""
    loras, losses = {name: lora(x) for name, x in values.items()}, {n: abs(x - target) for n, x in values.items()}
    calls: list[set[str]] = []

    def evaluate(pairs: Mapping[str, tuple[LoraFactors, LoraFactors]]) -> dict[str, list[float]]:
        calls.append(set(pairs))
        return {group: [abs(value(blend(*pair, c, 1)) - target) for c in COEFFICIENTS] for group, pair in pairs.items()}

    return merge_selectively(
        {"g": list(values)} if groups is None else groups, loras, losses, evaluate, rank=1, steps=steps
    ), calls


def _given(answer: dict[str, list[float]], pairs: object) -> dict[str, list[float]]:
    return answer


def test_a_model_is_taken_only_if_the_loss_falls() -> None:
    """Target 1.2. Start: 1. With 2 at 0.2 it is 1.2, loss 0. With 9 no coefficient is better: refused."""
    selections, calls = merged({"x": 1.0, "y": 2.0, "z": 9.0}, 1.2)
    assert selections["g"].taken == (("x", 1.0), ("y", 0.2))
    assert selections["g"].refused == ("z",)
    assert value(selections["g"].factors) == pytest.approx(1.2)
    assert selections["g"].loss == pytest.approx(0, abs=1e-6)
    assert len(calls) == 2


def test_losses_that_are_equal_or_not_numbers_are_refused() -> None:
    loras = {"x": lora(1.0), "y": lora(2.0)}
    for loss in (0.5, float("nan"), float("inf")):
        answer = {"g": [loss] * len(COEFFICIENTS)}
        selections = merge_selectively(
            {"g": ["x", "y"]}, loras, {"x": 0.5, "y": 0.6}, partial(_given, answer), rank=1, steps=1
        )
        assert (selections["g"].taken, selections["g"].refused) == ((("x", 1.0),), ("y",))


def test_groups_take_their_steps_together() -> None:
    groups = {"g": ["x", "y"], "h": ["z"], "i": ["u", "v", "w"]}
    values = {"x": 1.0, "y": 2.0, "z": 5.0, "u": 1.0, "v": 1.0, "w": 2.0}
    _, calls = merged(values, 1.2, groups=groups)
    assert calls == [{"g", "i"}, {"i"}]
    assert len(merged(values, 1.2, steps=1, groups=groups)[1]) == 1


def test_an_empty_zoo_is_refused() -> None:
    none: list[dict[str, list[str]]] = [{}, {"g": []}]
    for groups in none:
        with pytest.raises(ConfigError, match="needs at least one model that is better than the untuned base"):
            merge_selectively(groups, {}, {}, lambda pairs: {}, rank=1, steps=1)


def test_models_that_are_not_better_than_the_base_are_of_no_use() -> None:
    """Each is compared with the base at its own client."""
    losses = {"x": 0.7, "y": 1.0, "z": 3.0, "poisoned": 9.0, "broken": float("nan")}
    untuned = {"x": 0.8, "y": 1.0, "z": 4.0, "poisoned": 2.0, "broken": 2.0}
    assert useful(losses, untuned) == ["x", "z"]
