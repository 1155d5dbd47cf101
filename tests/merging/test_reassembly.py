"""Similarity of layers by hand, groups of layers, and what candidates are built from."""

import numpy as np
import pytest
import torch

from fedamole.merging.reassembly import candidates, cka, layer_groups, mean_cosine, nearest, reassembled


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values).unsqueeze(1)


def test_cka_by_hand() -> None:
    """Of one feature, CKA is the squared correlation: 1 for (1, -1, 0) and its double, 0 for (1, 1, -2), 3/4 below."""
    states = torch.stack([column(1, -1, 0), column(2, -2, 0), column(1, 1, -2), column(1, 0, 0)])
    expected = [[1, 1, 0, 0.25 * 3], [1, 1, 0, 0.75], [0, 0, 1, 0.25], [0.75, 0.75, 0.25, 1]]
    assert torch.allclose(cka(states), torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_cka_ignores_rotation_scale_and_mean_and_is_0_beside_a_constant() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(6, 4, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    constant = torch.ones(6, 4)
    result = cka(torch.stack([states, 3 * states @ rotation + 5, constant]))
    assert float(result[0, 1]) == pytest.approx(1.0)
    assert float(result[0, 2]) == 0.0


def test_layers_that_compute_alike_form_a_group() -> None:
    similarities = torch.tensor([[1, 0.9, 0.1, 0.1], [0.9, 1, 0.1, 0.1], [0.1, 0.1, 1, 0.9], [0.1, 0.1, 0.9, 1]])
    labels = layer_groups(similarities, 2, 0)
    assert labels[0] == labels[1] != labels[2] == labels[3]
    assert len(set(layer_groups(similarities, 1, 0).tolist())) == 1
    assert layer_groups(torch.ones(3, 3), 2, 0).tolist() == [0, 0, 0], "equal layers are one group"


def test_donors_have_the_group_of_the_clients_own_layer() -> None:
    """Layer 0 of a is in the group of b's, layer 1 in that of c's, and layer 2 in nobody else's."""
    groups = {"a": [0, 1, 2], "b": [0, 0, 1], "c": [1, 1, 1]}
    drawn = candidates(groups, "a", 50, np.random.default_rng(0))
    assert set(drawn) == {("b", "c", "b"), ("b", "c", "c")}
    assert len(drawn) == 2, "each once"
    assert len(candidates(groups, "a", 1, np.random.default_rng(0))) == 1
    assert set(candidates(groups, "b", 50, np.random.default_rng(0))) == {("a", "a", "c"), ("a", "c", "c")}


def test_a_teacher_has_the_layers_of_its_donors_in_their_place() -> None:
    """Layer 10 comes after layer 9, and both modules of a layer come from one client."""
    names = ["m.9.q/shared/A", "m.9.v/shared/B", "m.10.q/shared/A"]
    loras = {client: {name: torch.tensor([value]) for name in names} for client, value in (("a", 1.0), ("b", 2.0))}
    assert [float(tensor) for tensor in reassembled(loras, ("b", "a")).values()] == [2.0, 2.0, 1.0]


def test_the_nearest_logits_have_the_highest_mean_cosine() -> None:
    """Cosines of (1, 0) and (0, 2) with (1, 1) and (0, 1): mean of 0.7071 and 1; with themselves, negated: -1."""
    own = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    near = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert mean_cosine(own, near) == pytest.approx((0.5**0.5 + 1) / 2)
    assert nearest(own, [-own, near, -near]) == 1
