"""How certain a difference of two models' validation losses is, from the losses of single examples.

Runs store only mean losses, so the saved models are scored again on the client's validation examples.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedamole.config import Config
from fedamole.data.tokens import TokenRow
from fedamole.errors import RunError
from fedamole.evaluation.personal import losses_of
from fedamole.evaluation.preferences import dpo_losses, margins_of, pair_log_probabilities
from fedamole.federation.client_data import client_data
from fedamole.model.bank import Bank
from fedamole.personal.saved_models import SavedModel, client_shard, find_model, load_base_for, read_adapter
from fedamole.reporting.choosing import Candidate
from fedamole.runs.run_folder import RunFolder


def standard_error(first: Sequence[float], second: Sequence[float], tokens: Sequence[int]) -> float:
    """Return the standard error of the difference of two mean losses per answer token on the same examples.

    The difference is a ratio: the sum of the examples' differences over the sum of their tokens. Its standard error is
    that of the linearised ratio, for examples drawn at random (Cochran, Sampling Techniques, 3rd edition, chapter 6).

    Args:
        first: Summed loss of each example under one model, in nats.
        second: The same under the other model.
        tokens: Answer tokens of each example.

    Returns:
        The standard error in nats per answer token; infinite for fewer than two examples.
    """
    count, total = len(tokens), sum(tokens)
    if count < 2:
        return math.inf
    differences = [one - other for one, other in zip(first, second, strict=True)]
    mean = sum(differences) / total
    squares = sum((value - mean * size) ** 2 for value, size in zip(differences, tokens, strict=True))
    return math.sqrt(count / (count - 1) * squares) / total


class PairedErrors:
    """Standard errors of differences of validation losses; the base is loaded when the first one is needed."""

    def __init__(self, device: str = "auto") -> None:
        """Score on a device."""
        self.device = device
        self.bank: Bank | None = None
        self.losses: dict[tuple[Path, str, str], list[float]] = {}
        self.rows: dict[str, tuple[TokenRow, ...]] = {}

    def __call__(self, client: str, candidate: Candidate, other: Candidate) -> float:
        """Return the standard error of the difference of two candidates' validation losses at a client.

        Raises RunError for runs without saved models, and for different values of `training.max_length`, `objective` or
        `beta`.
        """
        settings = [one.run.config["training"] for one in (candidate, other)]
        keys = ("max_length", *(("objective", "beta") if _preference(settings[0]) or _preference(settings[1]) else ()))
        for key in keys:
            if settings[0].get(key) != settings[1].get(key):
                raise RunError(
                    f"{candidate.run.path} and {other.run.path} have different training.{key}, so their validation "
                    f"{'examples differ' if key == 'max_length' else 'losses are not comparable'}: compare them "
                    "without a margin"
                )
        if client in candidate.untuned:  # a trained model first: its folder says on which base
            candidate, other = other, candidate
        first, second = self._losses(client, candidate), self._losses(client, other)
        # The loss of preference pairs is a mean over pairs, that of answers a mean over their tokens.
        sizes = [1 if row.rejected else len(row.answer) for row in self.rows[client]]
        return standard_error(first, second, sizes)

    def _losses(self, client: str, candidate: Candidate) -> list[float]:
        """Return the summed loss of each validation example under a client's model."""
        key = (candidate.run.path, candidate.variant, client)
        if key not in self.losses:
            untuned, run = client in candidate.untuned, RunFolder.open(candidate.run.path)
            # Without a saved model only the client's data are needed of this object.
            unsaved = SavedModel(run.adapter(client, candidate.variant), client, run)
            model = unsaved if untuned else find_model(run.path, client, candidate.variant)
            if self.bank is None:
                self.bank = Bank(load_base_for(model, self.device))
            config, shard = client_shard(model)
            if client not in self.rows:
                data = client_data(shard, self.bank.base.tokenizer, config.training.max_length)
                self.rows[client] = data.validation.rows
            self.bank.load([] if untuned else [read_adapter(model, self.bank.base)])
            self.losses[key] = _row_losses(self.bank, self.rows[client], config)
        return self.losses[key]


def _row_losses(bank: Bank, rows: Sequence[TokenRow], config: Config) -> list[float]:
    """Return the summed loss of each example, or the DPO loss of each pair, under the loaded model."""
    if config.training.objective == "answer":
        # Rows are scored one at a time: the mean loss of one row is its own.
        return [losses_of(bank, [[row]], config.evaluation)[0] * len(row.answer) for row in rows]
    pairs, tokens = [[(row.prompt, (row.answer, row.rejected)) for row in rows]], config.evaluation.batch_tokens
    (own,), (untuned,) = (pair_log_probabilities(bank, pairs, tokens, reference) for reference in (False, True))
    losses: list[float] = dpo_losses(margins_of(own, untuned), config.training.beta).tolist()
    return losses


def _preference(training: Mapping[str, Any]) -> bool:
    return training.get("objective") == "preference"
