"""Rows as tensors, padded or packed, and the loss of answers on them, worked by hand."""

import math

import numpy as np
import pytest
import torch

from fedamole.model.batch import batches, collate, token_losses


def test_collate_predicts_answers_only() -> None:
    """Row 0: prompt 5 6, answer 7 0. Row 1: prompt 8, answer 9. Padded to length 4 with 1.

    The logits at place 1 predict 7, at 2 predict 0; those of row 1, which begins at place 4, predict 9 at 4.
    """
    batch = collate([[((5, 6), (7, 0)), ((8,), (9,))]], pad_id=1)
    assert batch.ids.tolist() == [[5, 6, 7, 0], [8, 9, 1, 1]]
    assert batch.not_padding is not None
    assert batch.not_padding.tolist() == [True] * 4 + [True, True, False, False]
    assert (batch.positions, batch.sequences, batch.dropout_keys) == (None, None, None)
    assert batch.logit_indices.tolist() == [1, 2, 4]
    assert batch.labels.tolist() == [7, 0, 9]
    assert (batch.segments.lengths, batch.answers.lengths) == ((8,), (3,))


def test_packed_rows_stand_one_behind_the_other() -> None:
    """Two rows of client 0, none of client 1, one of client 2: 4 + 2 + 3 tokens, positions begin anew in each."""
    batch = collate([[((5, 6), (7, 0)), ((8,), (9,))], [], [((3, 4), (2,))]], pad_id=1, packed=True)
    assert batch.ids.tolist() == [[5, 6, 7, 0, 8, 9, 3, 4, 2]]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert batch.sequences is not None
    assert batch.sequences.lengths == (4, 2, 3)
    assert batch.not_padding is None
    assert batch.logit_indices.tolist() == [1, 2, 4, 7]
    assert batch.labels.tolist() == [7, 0, 9, 2]
    assert (batch.segments.lengths, batch.answers.lengths) == ((6, 0, 3), (3, 0, 1))


def test_keys_of_a_token_are_the_same_packed_padded_and_in_a_group() -> None:
    first, other = [((5, 6), (7,)), ((8,), (9,))], [((1,), (2,))]
    alone, padded = (collate([first], 0, packed, seeds=[11]) for packed in (True, False))
    group = collate([other, first], 0, True, seeds=[12, 11])
    assert alone.dropout_keys is not None
    assert padded.dropout_keys is not None
    assert group.dropout_keys is not None
    assert (
        padded.dropout_keys[padded.not_padding].tolist()
        == alone.dropout_keys.tolist()
        == group.dropout_keys[2:].tolist()
    )
    assert len({*group.dropout_keys.tolist()}) == 7


@pytest.mark.parametrize("packed", [True, False])
def test_batches_hold_every_row_once_within_the_limit(packed: bool) -> None:
    rng = np.random.default_rng(0)
    clients = [
        [((1,) * int(rng.integers(1, 9)), (client, index)) for index in range(7 + 5 * client)] for client in range(3)
    ]
    results: list[list[int]] = []
    for batch in batches(clients, 0, packed, 24):
        assert batch.ids.numel() <= 24
        labels = batch.labels.view(-1, 2).tolist()
        results += labels
        owners = [label[0] for label in labels]
        assert [2 * owners.count(client) for client in range(3)] == list(batch.answers.lengths)
    assert sorted(results) == [[client, index] for client in range(3) for index in range(7 + 5 * client)]
    assert len(list(batches(clients, 0, packed, 1))) == 36


def test_without_a_prompt_the_first_answer_token_cannot_be_predicted() -> None:
    batch = collate([[((), (7, 8, 0))]], pad_id=1)
    assert batch.logit_indices.tolist() == [0, 1]
    assert batch.labels.tolist() == [8, 0]


def test_the_padding_token_counts_where_it_is_a_token() -> None:
    """A tokenizer without a padding token pads with its end-of-text token, which real answers end with."""
    batch = collate([[((5,), (0,)), ((5, 6), (7, 0))]], pad_id=0)
    assert batch.not_padding is not None
    assert batch.not_padding.tolist() == [True, True, False, False, True, True, True, True]


def test_token_losses() -> None:
    """Logits 0 but ln 3 for the right token among V = 4: p = 3/6, a loss of ln 2; all 0: ln 4."""
    logits = torch.zeros(3, 4, dtype=torch.bfloat16)
    logits[0, 2] = math.log(3)
    losses = token_losses(logits, torch.tensor([2, 3, 1]))
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([math.log(2), math.log(4), math.log(4)], abs=2e-3)
