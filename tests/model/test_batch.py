"""Rows as padded tensors, and the loss of answers on them, worked by hand."""

import math

import pytest
import torch

from fedamole.model.batch import answer_losses, collate


def test_collate_predicts_answers_only() -> None:
    """Row 0: prompt 5 6, answer 7 0. Row 1: prompt 8, answer 9. Padded to length 4 with 1.

    The logits at place 1 predict 7, at 2 predict 0; those of row 1, which begins at place 4, predict 9 at 4.
    """
    batch = collate([((5, 6), (7, 0)), ((8,), (9,))], pad_id=1)
    assert batch.ids.tolist() == [[5, 6, 7, 0], [8, 9, 1, 1]]
    assert batch.counted.tolist() == [True] * 4 + [True, True, False, False]
    assert batch.positions.tolist() == [1, 2, 4]
    assert batch.labels.tolist() == [7, 0, 9]
    assert batch.rows.tolist() == [0, 0, 1]


def test_without_a_prompt_the_first_answer_token_cannot_be_predicted() -> None:
    batch = collate([((), (7, 8, 0))], pad_id=1)
    assert batch.positions.tolist() == [0, 1]
    assert batch.labels.tolist() == [8, 0]
    assert batch.rows.tolist() == [0, 0]


def test_the_padding_token_counts_where_it_is_a_token() -> None:
    """A tokenizer without a padding token pads with its end-of-text token, which real answers end with."""
    batch = collate([((5,), (0,)), ((5, 6), (7, 0))], pad_id=0)
    assert batch.counted.tolist() == [True, True, False, False, True, True, True, True]


def test_answer_losses() -> None:
    """Logits 0 but ln 3 for the right token among V = 4: p = 3/6, a loss of ln 2; all 0: ln 4."""
    batch = collate([((1,), (2, 3)), ((0,), (1,))], pad_id=0)
    logits = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    logits[0, 0, 2] = math.log(3)
    logits[1, 2] = 50.0  # a padded place has no say
    losses = answer_losses(logits, batch)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([math.log(2), math.log(4), math.log(4)], abs=2e-3)
