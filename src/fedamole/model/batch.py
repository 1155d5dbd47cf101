"""Token rows as padded tensors, and the loss of answers on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Ids = Sequence[int]


@dataclass(frozen=True)
class Batch:
    """B rows of prompt and answer, padded on the right to a common length L.

    Which logits predict an answer token is worked out once, on the CPU, so that no step waits for the device.
    """

    ids: Tensor
    """Token ids (B, L)."""
    counted: Tensor
    """(B * L) of bool: tokens that are not padding."""
    positions: Tensor
    """(K): positions in the flattened (B * L) logits that predict an answer token."""
    labels: Tensor
    """(K): the answer tokens."""
    rows: Tensor
    """(K): the row of each answer token."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; copies from pinned memory run alongside other work."""
        if device.type == "cpu":
            return self
        moved = {key: value.pin_memory().to(device, non_blocking=True) for key, value in vars(self).items()}
        return Batch(**moved)


def collate(rows: Sequence[tuple[Ids, Ids]], pad_id: int) -> Batch:
    """Pad (prompt, answer) rows on the right; only answer tokens are predicted."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    counted = torch.zeros(len(rows), length, dtype=torch.bool)
    positions: list[int] = []
    labels: list[int] = []
    owners: list[int] = []
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        counted[row, :end] = True
        start = max(len(prompt), 1)
        positions += range(row * length + start - 1, row * length + end - 1)
        labels += answer[start - len(prompt) :]
        owners += [row] * (end - start)
    return Batch(ids, counted.flatten(), torch.tensor(positions), torch.tensor(labels), torch.tensor(owners))


def pad_left(prompts: Sequence[Ids], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left, so that all end at the same place: ids (B, L), and a mask that is 0 on padding."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def answer_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy in nats of each answer token, (K), from logits (B, L, V), in float32 or better."""
    predicted = logits.flatten(0, 1)[batch.positions]
    precise = torch.promote_types(predicted.dtype, torch.float32)
    return F.cross_entropy(predicted.to(precise), batch.labels, reduction="none")
