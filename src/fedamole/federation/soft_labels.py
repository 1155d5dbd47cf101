"""Soft labels: a training on extra rows that follows distributions of their answer tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.federation.distillation import Distillation, Followed
from fedamole.model.batch import Batch, Ids, token_losses
from fedamole.model.segments import Segments, segment_sum
from fedamole.synthesis.rows import ExtraRows, SoftLabels


class BatchTargets(NamedTuple):
    """Soft labels of the M answer tokens of a batch that have one."""

    tokens: Tensor
    """(M): indices of these tokens among the K answer tokens of the batch."""
    labels: Tensor
    """(M): their hard labels."""
    ids: Tensor
    """(M, k): token ids."""
    probabilities: Tensor
    """(M, k), float32."""
    weights: Tensor
    """(M): weight of the divergence."""
    temperatures: Tensor
    """(M)"""


def soft_divergences(logits: Tensor, ids: Tensor, probabilities: Tensor, temperatures: Tensor) -> Tensor:
    """Return T^2 KL(p || softmax(logits / T)) of each token, (M), in nats, for distributions p over k token ids.

    Shapes: `logits` (M, V), `ids` and `probabilities` (M, k), `temperatures` (M).
    """
    precise = torch.promote_types(logits.dtype, torch.float32)
    logs = (logits.to(precise) / temperatures.unsqueeze(1)).log_softmax(1).gather(1, ids)
    return temperatures.square() * (torch.xlogy(probabilities, probabilities) - probabilities * logs).sum(1)


class SoftTargets(Followed):
    """The soft labels of a group's extra rows; a row is known by its prompt."""

    def __init__(self, extras: Sequence[ExtraRows], settings: Sequence[Distillation], device: torch.device) -> None:
        """Index the rows of each client, all of which have soft labels."""
        self._settings, self._device = settings, device
        self._rows: list[dict[Ids, int]] = [{tuple(p): i for i, (p, _) in enumerate(extra.rows)} for extra in extras]
        self._soft: list[SoftLabels] = [extra.soft for extra in extras if extra.soft is not None]

    @override
    def targets(self, batch: Batch, first: int, last: int) -> BatchTargets:
        """Return the soft labels of a batch of clients `first` to `last` - 1."""
        index: list[int] = []
        ids: list[Tensor] = []
        probabilities: list[Tensor] = []
        settings: list[tuple[float, float]] = []
        for client, token, row, position in self._tokens(batch, first, last):
            soft, setting = self._soft[client], self._settings[client]
            if position < soft.ids.shape[1] and bool(soft.probabilities[row, position].sum() > 0):
                index.append(token)
                ids.append(soft.ids[row, position])
                probabilities.append(soft.probabilities[row, position].float())
                settings.append((setting.weight, setting.temperature))
        where = torch.tensor(index, dtype=torch.long, device=self._device)
        pairs = torch.tensor(settings).view(-1, 2).to(self._device)
        width = max((len(row) for row in ids), default=1)
        # Of clients with fewer ids per token, id 0 with probability 0 fills the rest.
        padded = [
            torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows]).to(self._device)
            if rows
            else torch.zeros(0, width, dtype=dtype, device=self._device)
            for rows, dtype in ((ids, torch.long), (probabilities, torch.float32))
        ]
        return BatchTargets(where, batch.labels[where], padded[0], padded[1], pairs[:, 0], pairs[:, 1])

    def _tokens(self, batch: Batch, first: int, last: int) -> list[tuple[int, int, int, int]]:
        """Client, index in the batch, row and position in the answer of each answer token of a row with soft labels."""
        if batch.sequences is not None:
            lengths = list(batch.sequences.lengths)
        else:
            assert batch.not_padding is not None
            lengths = batch.not_padding.view(len(batch.ids), -1).sum(1).tolist()
        found, token, sequence = list[tuple[int, int, int, int]](), 0, 0
        for client, prompts in zip(range(first, last), batch.prompts, strict=True):
            for prompt in prompts:
                answer = lengths[sequence] - max(len(prompt), 1)
                row = self._rows[client].get(tuple(prompt))
                if row is not None:
                    found += [(client, token + position, row, position) for position in range(answer)]
                token, sequence = token + answer, sequence + 1
        return found

    @override
    def losses(
        self, losses: Tensor, logits: Tensor, targets: BatchTargets, answers: Segments, first: int, last: int
    ) -> Tensor:
        """Return the losses (C) of clients `first` to `last` - 1 from their mean cross-entropies (C) and logits."""
        if not len(targets.tokens):
            return losses
        own = logits.index_select(0, targets.tokens)
        divergences = soft_divergences(own, targets.ids, targets.probabilities, targets.temperatures)
        changes = targets.weights * (divergences - token_losses(own, targets.labels))
        by_token = torch.zeros(len(logits), device=logits.device, dtype=changes.dtype)
        by_token = by_token.index_add(0, targets.tokens, changes)
        return losses + segment_sum(by_token, answers) / answers.counts
