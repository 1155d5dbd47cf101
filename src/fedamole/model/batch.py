"""Collate (prompt, answer) pairs of one or several clients into a batch, and compute the loss on answer tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedamole.model.dropout import row_keys
from fedamole.model.segments import CPU, Segments, to_device

Ids = Sequence[int]
TokenPair = tuple[Ids, Ids]
"""Token ids of a prompt and of its answer. Only answer tokens contribute to a loss."""


@dataclass(frozen=True)
class Batch:
    """Tokenised rows of C clients, grouped by client, either packed into one row or padded on the right.

    Symbols: T tokens when packed, B rows of length L when padded, K answer tokens. The indices of the logits that
    predict answer tokens are computed here, on the CPU, so that a training step does not wait for the device.
    """

    ids: Tensor
    """Token ids: (1, T) packed, (B, L) padded."""
    positions: Tensor | None
    """(1, T): position of each token in its sequence; None if padded, the model then counts positions itself."""
    sequences: Segments | None
    """Lengths of the packed sequences; None if padded."""
    segments: Segments
    """Number of tokens of each client, including padding."""
    not_padding: Tensor | None
    """(B * L) bool: True for tokens that are not padding; None if packed."""
    logit_indices: Tensor
    """(K): indices into the flattened ids whose logits predict an answer token."""
    labels: Tensor
    """(K): the answer tokens."""
    answers: Segments
    """Number of answer tokens of each client."""
    dropout_keys: Tensor | None
    """(T): key of each token's dropout mask; None disables dropout."""
    prompts: tuple[tuple[Ids, ...], ...]
    """Prompts of each client's rows."""


def collate(
    clients: Sequence[Sequence[TokenPair]],
    pad_id: int,
    packed: bool = False,
    seeds: Sequence[int] | None = None,
    device: torch.device = CPU,
) -> Batch:
    """Collate the (prompt, answer) pairs of each client on a device; only answer tokens are predicted.

    `seeds` enables dropout: one seed per client, derived from (client, step).
    """
    pairs = [pair for client in clients for pair in client]
    client_of_pair = np.repeat(np.arange(len(clients)), [len(client) for client in clients])
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in pairs])
    widths = lengths if packed else np.full(len(pairs), lengths.max())
    positions = np.arange(widths.sum()) - np.repeat(widths.cumsum() - widths, widths)
    not_padding = positions < np.repeat(lengths, widths)
    tokens = np.full(len(positions), pad_id)
    tokens[not_padding] = [token for prompt, answer in pairs for token in (*prompt, *answer)]
    first_labels = np.array([max(len(prompt), 1) for prompt, _ in pairs])  # nothing predicts the first token
    is_label = not_padding & (positions >= np.repeat(first_labels, widths))

    def by_client(counts: np.ndarray) -> Segments:
        return Segments(tuple(np.bincount(client_of_pair, counts, len(clients)).astype(int).tolist()), device)

    def tensor(values: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(values), device)

    dropout_keys = None
    if seeds is not None:
        index_in_client = np.concatenate([np.arange(len(client)) for client in clients])
        seed_of_token = np.repeat(np.array(seeds, dtype=np.uint64)[client_of_pair], widths)
        dropout_keys = to_device(row_keys(seed_of_token, np.repeat(index_in_client, widths), positions), device)
    return Batch(
        ids=tensor(tokens).view(1 if packed else len(pairs), -1),
        positions=tensor(positions).unsqueeze(0) if packed else None,
        sequences=Segments(tuple(lengths.tolist()), device) if packed else None,
        segments=by_client(widths),
        not_padding=None if packed else tensor(not_padding),
        logit_indices=tensor(np.flatnonzero(is_label) - 1),
        labels=tensor(tokens[is_label]),
        answers=by_client(lengths - first_labels),
        dropout_keys=dropout_keys,
        prompts=tuple(tuple(prompt for prompt, _ in client) for client in clients),
    )


def batches(
    clients: Sequence[Sequence[TokenPair]], pad_id: int, packed: bool, max_tokens: int, device: torch.device = CPU
) -> Iterator[Batch]:
    """Yield all pairs of all clients in batches of at most `max_tokens` tokens, similar lengths together.

    A single pair that is longer than `max_tokens` forms a batch of its own.
    """
    order = sorted(
        (len(pair[0]) + len(pair[1]), client, pair) for client, pairs in enumerate(clients) for pair in pairs
    )
    group: list[list[TokenPair]] = [[] for _ in clients]
    size = tokens = 0
    for length, client, pair in order:
        tokens = tokens + length if packed else (size + 1) * length
        if size and tokens > max_tokens:
            yield collate(group, pad_id, packed, device=device)
            group, size, tokens = [[] for _ in clients], 0, length
        group[client].append(pair)
        size += 1
    if size:
        yield collate(group, pad_id, packed, device=device)


def pad_left(prompts: Sequence[Ids], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad B prompts on the left to one length L; return ids (B, L) and an attention mask (B, L), 0 on padding."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, length - len(prompt) :] = torch.tensor(prompt)
        mask[i, length - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (K) of each answer token, in nats, from logits (K, V), computed in at least float32."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(precise), labels, reduction="none")
