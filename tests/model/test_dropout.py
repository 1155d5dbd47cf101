"""Masks as hashes of their place: against integer arithmetic written out, and as good as coins."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedamole.model.batch import TokenPair, collate
from fedamole.model.dropout import column_keys, dropped, row_keys

GOLDEN, MASK = 0x9E3779B97F4A7C15, 2**64 - 1


def splitmix(z: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on Python's integers; its 31 highest bits."""
    z &= MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return (z ^ (z >> 31)) >> 33


def signed(z: int) -> int:
    """What 32 bits mean as a signed number."""
    return (z + 2**31) % 2**32 - 2**31


def test_keys_by_integer_arithmetic() -> None:
    seeds = [5, 2**63 - 1, 12345678901234567]
    keys = row_keys(np.array(seeds), np.array([0, 3, 7]), np.array([0, 99, 511]))
    positions = [example * 2**20 + position + 1 for example, position in ((0, 0), (3, 99), (7, 511))]
    assert keys.tolist() == [splitmix(seed + key * GOLDEN) for seed, key in zip(seeds, positions, strict=True)]
    assert column_keys(4, 3).tolist() == [splitmix((feature + 5 * 2**32) * GOLDEN) for feature in range(3)]


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_masks_by_integer_arithmetic(share: float) -> None:
    rows, columns = row_keys(np.full(6, 9), np.arange(6), np.arange(6)), column_keys(0, 5)
    for row, result in zip(rows.tolist(), dropped(rows, columns, share).tolist(), strict=True):
        for column, drop in zip(columns.tolist(), result, strict=True):
            z = signed((row ^ column) * 0x7FEB352D)
            z = signed((z ^ (z >> 15)) * 0x846CA68B)
            assert drop == (z < round(share * 2**32) - 2**31)


def deviations(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Correlations of the rows of two masks, in standard deviations of independent coins."""
    return ((a.double() - share) * (b.double() - share)).mean(1) / (share * (1 - share)) * math.sqrt(a.shape[1])


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
def test_masks_are_as_good_as_coins(share: float) -> None:
    """Shares and correlations between neighbours in every direction are within 5 deviations of coins' (512 draws)."""
    positions = np.arange(512)
    rows = row_keys(np.full(512, 77), positions // 64, positions % 64)
    mask = dropped(rows, column_keys(0, 2048), share)
    for axis, draws in ((0, 512), (1, 2048)):
        means = mask.double().mean(axis)
        assert ((means - share).abs() < 5.5 * (share * (1 - share) / draws) ** 0.5).all()
    assert mask.double().mean().item() == pytest.approx(share, abs=2e-3)
    others = {
        "next position": mask.roll(1, 0),
        "next feature": mask.roll(1, 1),
        "next module": dropped(rows, column_keys(1, 2048), share),
        "next step": dropped(row_keys(np.full(512, 78), positions // 64, positions % 64), column_keys(0, 2048), share),
        "next example": dropped(
            row_keys(np.full(512, 77), positions // 64 + 1, positions % 64), column_keys(0, 2048), share
        ),
    }
    for name, other in others.items():
        result = deviations(mask, other, share)
        assert result.abs().max() < 5.5, name
        assert result.std().item() == pytest.approx(1, abs=0.2), name


def test_nothing_and_nearly_everything() -> None:
    rows, columns = row_keys(np.full(200, 3), np.zeros(200, int), np.arange(200)), column_keys(2, 200)
    assert not dropped(rows, columns, 0.0).any()
    assert dropped(rows, columns, 0.999).double().mean().item() == pytest.approx(0.999, abs=1e-3)
    few, many = dropped(rows, columns, 0.1), dropped(rows, columns, 0.4)
    assert not (few & ~many).any(), "what is dropped at one share is dropped at every larger one"


def test_keys_of_many_places_do_not_meet() -> None:
    """2000 steps of one token, 2000 tokens of one step, 20 examples of 100 tokens: of n keys of 31 bits about
    n^2 / 2^32 = 1 in 1000 pairs of such sets would meet once; 32 modules of 64 features are as far apart.
    """
    zeros, indices = np.zeros(2000, int), np.arange(2000)
    sets = {
        "steps": row_keys(indices, zeros, zeros),
        "positions": row_keys(zeros + 5, zeros, indices),
        "examples": row_keys(zeros + 5, indices // 100, indices % 100),
        "columns": torch.cat([column_keys(module, 64) for module in range(32)]),
    }
    for name, keys in sets.items():
        assert len(keys.unique()) >= len(keys) - 1, name
        assert keys.dtype == torch.int32
        assert bool((keys >= 0).all())


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_token_has_the_same_mask_alone_in_a_group_packed_and_padded(share: float) -> None:
    rows: list[TokenPair] = [((5, 6, 7), (8,)), ((9,), (10, 11))]
    other: list[TokenPair] = [((1,), (2, 3)), ((4, 5, 6, 7, 8), (9,)), ((2,), (2,))]
    columns = column_keys(3, 64)

    def masks(clients: list[list[TokenPair]], seeds: list[int], packed: bool, client: int) -> Tensor:
        batch = collate(clients, 0, packed, seeds)
        assert batch.dropout_keys is not None
        owner = batch.segments.owner
        real = owner == owner if batch.not_padding is None else batch.not_padding
        return dropped(batch.dropout_keys, columns, share)[real & (owner == client)]

    expected = masks([rows], [11], True, 0)
    assert expected.shape == (7, 64)
    assert len({tuple(row) for row in expected.tolist()}) == 7, "every token has a mask of its own"
    for packed in (True, False):
        assert torch.equal(masks([rows], [11], packed, 0), expected)
        assert torch.equal(masks([rows, other], [11, 12], packed, 0), expected)
        assert torch.equal(masks([other, rows], [12, 11], packed, 1), expected)
        assert not torch.equal(masks([other, rows], [12, 13], packed, 1), expected), "another step, another mask"
