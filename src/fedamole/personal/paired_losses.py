"""How certain a difference of two models' validation losses is, from the losses of single examples.

Runs store only mean losses, so the saved models are scored again on the client's validation examples.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from fedamole.data.tokens import TokenRow
from fedamole.errors import RunError
from fedamole.evaluation.personal import losses_of
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

        Raises RunError for runs without saved models, and for different values of `training.max_length`.
        """
        lengths = [one.run.config["training"]["max_length"] for one in (candidate, other)]
        if lengths[0] != lengths[1]:
            raise RunError(
                f"{candidate.run.path} and {other.run.path} have different training.max_length, so their validation "
                "examples differ: compare them without a margin"
            )
        if client in candidate.untuned:  # a trained model first: its folder says on which base
            candidate, other = other, candidate
        first, second = self._losses(client, candidate), self._losses(client, other)
        return standard_error(first, second, [len(row.answer) for row in self.rows[client]])

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
            # Rows are scored one at a time: the mean loss of one row is its own.
            self.losses[key] = [
                losses_of(self.bank, [[row]], config.evaluation)[0] * len(row.answer) for row in self.rows[client]
            ]
        return self.losses[key]
