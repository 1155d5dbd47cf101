"""Token rows of one or several clients as tensors, and the loss of answers on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedamole.model.dropout import row_keys
from fedamole.model.segments import Shares, upload

Ids = Sequence[int]
Row = tuple[Ids, Ids]
"""Token ids of a prompt and of its answer."""


@dataclass(frozen=True)
class Batch:
    """Rows of C clients, one client's after the other's: packed into one row, or padded on the right to one length.

    Which logits predict an answer token is worked out once, on the CPU, so that no step waits for the device.
    """

    ids: Tensor
    """Token ids: (1, T) packed, (B, L) padded."""
    positions: Tensor | None
    """(1, T): the place of each token in its sequence; None where padded, a model then counts for itself."""
    sequences: Shares | None
    """Lengths of the packed sequences; None where padded."""
    shares: Shares
    """Tokens of each client, padding included."""
    counted: Tensor | None
    """(B * L) of bool: tokens that are not padding; None where packed, all are."""
    predicting: Tensor
    """(K): places in the flattened ids whose logits predict an answer token."""
    labels: Tensor
    """(K): the answer tokens."""
    answers: Shares
    """Answer tokens of each client."""
    keys: Tensor | None
    """(T): keys of the tokens' dropout masks; None without dropout."""
    prompts: tuple[tuple[Ids, ...], ...]
    """The prompts of each client's rows."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        if device.type == "cpu":
            return self
        moved: dict[str, Tensor | Shares] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = upload(value, device)
            elif isinstance(value, Shares):
                moved[field.name] = Shares(value.lengths, device)
        return replace(self, **moved)  # type: ignore[arg-type]


def collate(
    clients: Sequence[Sequence[Row]], pad_id: int, packed: bool = False, seeds: Sequence[int] | None = None
) -> Batch:
    """Lay out (prompt, answer) rows of each client; only answer tokens are predicted.

    `seeds` switches dropout on: one for each client, standing for (client, step).
    """
    rows = [row for client in clients for row in client]
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in rows])
    width = 0 if packed else int(lengths.max())
    starts = lengths.cumsum() - lengths if packed else np.arange(len(rows)) * width
    tokens = np.full(int(lengths.sum()) if packed else len(rows) * width, pad_id)
    inside = np.zeros(len(tokens), dtype=bool)
    predicting, labels = [], []
    for (prompt, answer), start, length in zip(rows, starts, lengths, strict=True):
        tokens[start : start + length] = [*prompt, *answer]
        inside[start : start + length] = True
        first = max(len(prompt), 1)
        predicting.append(np.arange(start + first - 1, start + length - 1))
        labels.append(tokens[start + first : start + length])
    per_client = np.repeat(np.arange(len(clients)), [len(client) for client in clients])
    each = lengths if packed else np.full(len(rows), width)
    place = np.arange(len(tokens)) - np.repeat(starts, each)

    def shares(amounts: np.ndarray) -> Shares:
        return Shares(tuple(np.bincount(per_client, amounts, len(clients)).astype(int).tolist()))

    keys = None
    if seeds is not None:
        turn = np.concatenate([np.arange(len(client)) for client in clients])
        of_token = np.repeat(np.array(seeds, dtype=np.uint64)[per_client], each)
        keys = row_keys(of_token, np.repeat(turn, each), place)
    return Batch(
        ids=torch.from_numpy(tokens).unsqueeze(0) if packed else torch.from_numpy(tokens).view(len(rows), width),
        positions=torch.from_numpy(place).unsqueeze(0) if packed else None,
        sequences=Shares(tuple(lengths.tolist())) if packed else None,
        shares=shares(each),
        counted=None if packed else torch.from_numpy(inside),
        predicting=torch.from_numpy(np.concatenate(predicting)),
        labels=torch.from_numpy(np.concatenate(labels)),
        answers=shares(np.array([len(part) for part in labels])),
        keys=keys,
        prompts=tuple(tuple(prompt for prompt, _ in client) for client in clients),
    )


def batches(clients: Sequence[Sequence[Row]], pad_id: int, packed: bool, most_tokens: int) -> Iterator[Batch]:
    """All rows of each client, similar lengths together, in batches of at most `most_tokens` tokens (but >= 1 row)."""
    order = sorted((len(row[0]) + len(row[1]), client, row) for client, rows in enumerate(clients) for row in rows)
    group: list[list[Row]] = [[] for _ in clients]
    rows = tokens = 0
    for length, client, row in order:
        tokens = tokens + length if packed else (rows + 1) * length
        if rows and tokens > most_tokens:
            yield collate(group, pad_id, packed)
            group, rows, tokens = [[] for _ in clients], 0, length
        group[client].append(row)
        rows += 1
    if rows:
        yield collate(group, pad_id, packed)


def pad_left(prompts: Sequence[Ids], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left, so that all end at the same place: ids (B, L), and a mask that is 0 on padding."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats of each answer token, (K), from logits (K, V), in float32 or better."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(precise), labels, reduction="none")
