"""Membership inference: can somebody who has a model tell a client's training examples from examples it did not see?

The score of an example is its loss under the model over its loss under the untuned base: a model has learned its own
training examples better than others (calibration by difficulty, Watson et al., ICLR 2022,
https://arxiv.org/abs/2111.08440, here as a ratio of losses).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from fedamole.evaluation.likelihood import by_length
from fedamole.federation.randomness import numpy_generator
from fedamole.model.bank import Bank
from fedamole.model.batch import TokenPair, collate, token_losses

MOST_ROWS = 400
"""Most examples of a split that are scored; of more, a random draw."""
FALSE_POSITIVES = 0.01


@dataclass(frozen=True)
class Attack:
    """How well one model separates a client's training examples from its test examples."""

    auroc: float
    """Probability that a training example has the lower ratio of losses than a test example; 0.5 is guessing."""
    error: float
    """Standard error of `auroc` if the attack guesses."""
    tpr: float
    """Share of the training examples that are recognised with at most 1 % of the test examples taken for one."""


def drawn(rows: Sequence[TokenPair], client: str, split: str) -> list[TokenPair]:
    """Return at most `MOST_ROWS` of a split's rows, drawn at random."""
    order = numpy_generator(0, f"audit/{split}", client).permutation(len(rows))[:MOST_ROWS]
    return [rows[i] for i in sorted(order.tolist())]


def row_losses(bank: Bank, rows: Sequence[TokenPair], batch_tokens: int) -> np.ndarray:
    """Return the mean loss per answer token of each row (N), in nats, under the loaded adapter or the untuned base."""
    (pairs,) = bank.prefixed([rows])
    losses = np.zeros(len(pairs))
    bank.select_clients(0, bank.clients)
    with torch.no_grad():
        for group in by_length([len(prompt) + len(answer) for prompt, answer in pairs], batch_tokens):
            batch = collate([[pairs[i] for i in group]], bank.base.pad_id, bank.packs, device=bank.base.device)
            # Nothing predicts the first token of a row.
            sizes = [len(pairs[i][0]) + len(pairs[i][1]) - max(1, len(pairs[i][0])) for i in group]
            with bank.forward(batch) as logits:
                parts = token_losses(logits, batch.labels).double().split(sizes)
            losses[group] = [float(part.mean()) if len(part) else 0.0 for part in parts]
    return losses


def attack(members: np.ndarray, others: np.ndarray) -> Attack:
    """Return how well low values separate members (N) from others (M)."""
    # By ranks: the AUROC is the statistic of Mann and Whitney.
    ranks = rankdata(np.concatenate([-members, -others]))[: len(members)]
    pairs = len(members) * len(others)
    auroc = (ranks.sum() - len(members) * (len(members) + 1) / 2) / pairs
    error = np.sqrt((len(members) + len(others) + 1) / (12 * pairs))
    allowed = int(FALSE_POSITIVES * len(others))
    threshold = np.sort(others)[allowed]
    return Attack(float(auroc), float(error), float((members < threshold).mean()))


def ratios(losses: np.ndarray, untuned: np.ndarray) -> np.ndarray:
    """Return the losses under a model over those under the untuned base; a loss that is not finite counts as large."""
    return np.asarray(np.nan_to_num(losses / np.maximum(untuned, 1e-9), nan=np.inf))


def summary(own: Attack, others: Sequence[Attack], train: int, test: int) -> dict[str, Any]:
    """Return the numbers of a client for audit.json: of its own model, and means over the other clients' models."""
    result: dict[str, Any] = {"train": train, "test": test, "own": asdict(own)}
    if others:
        auroc, tpr = (float(np.mean([getattr(each, key) for each in others])) for key in ("auroc", "tpr"))
        result["others"] = {"models": len(others), "auroc": auroc, "error": others[0].error, "tpr": tpr}
    return result
