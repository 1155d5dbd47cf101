"""Attribute inference from mean embeddings."""

import numpy as np
import pytest
import torch

from fedamole.auditing.attribute import category_of, chosen_attribute, infer_attribute, nearest_centroids
from fedamole.auditing.release import NotApplicableError
from fedamole.data.examples import Example


def attributes(**tasks: str) -> dict[str, dict[str, str | None]]:
    return {client: {"category": None, "source": client, "task": task} for client, task in tasks.items()}


def test_the_nearest_centroid_by_hand() -> None:
    """Without itself, 3 is nearer to the centroid of 0 and 1 than to 9; the other three are nearer to their own."""
    vectors = np.array([[0.0], [1.0], [3.0], [9.0]])
    assert nearest_centroids(vectors, ["x", "x", "y", "y"]) == 0.75


def test_the_attribute_is_one_that_several_clients_share() -> None:
    kind, values = chosen_attribute(attributes(a="x", b="x", c="y", d="y", e="z"))
    assert (kind, values) == ("task", {"a": "x", "b": "x", "c": "y", "d": "y"})
    shared = {client: {**values, "category": client[0]} for client, values in attributes(a1="x", a2="x").items()}
    shared |= {client: {**values, "category": client[0]} for client, values in attributes(b1="x", b2="x").items()}
    assert chosen_attribute(shared)[0] == "category"
    with pytest.raises(NotApplicableError, match="do not form groups"):
        chosen_attribute(attributes(a="x", b="x", c="y"))


def test_embeddings_that_depend_on_the_task_reveal_it() -> None:
    tasks = {f"c{i}": "xy"[i % 2] for i in range(12)}
    generator = torch.Generator().manual_seed(0)
    for strength, known in ((3.0, True), (0.0, False)):
        embeddings = {
            module: {
                client: torch.randn(4, generator=generator) + strength * (task == "y") for client, task in tasks.items()
            }
            for module in ("m", "n")
        }
        result = infer_attribute(embeddings, attributes(**tasks))
        assert (result["p_value"] <= 0.05) is known
        assert (result["clients"], result["values"], result["attribute"]) == (12, 2, "task")
        assert 0.2 < result["chance"] < 0.6


def test_the_category_of_a_client() -> None:
    free = Example("", "", "", "text")
    assert category_of([free]) is None
    options = [Example("", "", "", answer, options=("a", "b")) for answer in ("a", "b", "b")]
    assert category_of(options) == "b"
    assert category_of([Example("", "", "", "t", category=c) for c in ("x", "y", "x")]) == "x"
