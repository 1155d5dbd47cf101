"""Answers chosen by likelihood: the option with the lowest mean token loss after the prompt."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedamole.model.bank import Bank
from fedamole.model.batch import Ids, answer_losses, collate, pad_left


def mean_loss(bank: Bank, rows: Sequence[tuple[Ids, Ids]], batch_tokens: int) -> float:
    """Mean loss per answer token, in nats, over (prompt, answer) rows; at most `batch_tokens` tokens at a time."""
    total, count = 0.0, 0
    with torch.no_grad():
        for indices in by_length([len(prompt) + len(answer) for prompt, answer in rows], batch_tokens):
            batch = collate([rows[i] for i in indices], bank.base.pad_id).to(bank.base.device)
            losses = answer_losses(bank.logits(batch.ids), batch)
            total, count = total + float(losses.double().sum()), count + len(losses)
    return total / count


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group indices of similar length so that no padded group holds more than `batch_tokens` tokens (but >= 1 row)."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if group and (len(group) + 1) * lengths[index] > batch_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


@dataclass(frozen=True)
class _Prompts:
    """A batch of encoded prompts, padded on the left so that all end at the same place."""

    mask: Tensor
    """(B, L), 1 where a token is not padding."""
    first: Tensor
    """Log-probabilities of the token after each prompt, (B, V)."""
    cache: object
    """Keys and values of the prompts, as transformers holds them."""


def option_losses(
    bank: Bank, prompts: Sequence[Ids], options: Sequence[Sequence[Ids]], batch_tokens: int
) -> list[list[float]]:
    """Mean token loss of every option of every prompt.

    Prompt and options are tokenised apart, as in training, and each option ends with the end-of-text token. A prompt
    is encoded once; its keys and values are then repeated for a chunk of options at a time, so that memory is
    bounded by `batch_tokens` however many options there are.
    """
    results: list[list[float]] = [[0.0] * len(choices) for choices in options]
    with torch.no_grad():
        for indices in by_length([len(prompt) for prompt in prompts], batch_tokens):
            encoded = _encode(bank, [prompts[i] for i in indices])
            pairs = [(row, choice) for row, i in enumerate(indices) for choice in range(len(options[i]))]
            longest = max(len(options[i][choice]) for i in indices for choice in range(len(options[i])))
            chunk = max(1, batch_tokens // (encoded.mask.shape[1] + longest))
            for start in range(0, len(pairs), chunk):
                part = pairs[start : start + chunk]
                ids = [options[indices[row]][choice] for row, choice in part]
                losses = _continue(bank, encoded, [row for row, _ in part], ids)
                for (row, choice), loss in zip(part, losses, strict=True):
                    results[indices[row]][choice] = loss
    return results


def _encode(bank: Bank, prompts: Sequence[Ids]) -> _Prompts:
    ids, mask = pad_left(prompts, bank.base.pad_id, bank.base.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = bank.base.model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
    )
    return _Prompts(mask, torch.log_softmax(out.logits[:, -1].float(), dim=-1), out.past_key_values)


def _continue(bank: Bank, encoded: _Prompts, rows: list[int], options: Sequence[Ids]) -> list[float]:
    """Mean token loss of options[j] after the prompt of rows[j]."""
    device = bank.base.device
    lengths = torch.tensor([len(option) for option in options], device=device)
    ids = torch.zeros(len(options), int(lengths.max()), dtype=torch.long)
    for row, option in enumerate(options):
        ids[row, : len(option)] = torch.tensor(option)
    ids, chosen = ids.to(device), torch.tensor(rows, device=device)
    inside = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    gained = [encoded.first[chosen].gather(1, ids[:, :1])]
    if ids.shape[1] > 1:
        cache = copy.deepcopy(encoded.cache)
        cache.batch_select_indices(chosen)  # type: ignore[attr-defined]
        before = encoded.mask[chosen]
        positions = before.sum(1, keepdim=True) + torch.arange(ids.shape[1] - 1, device=device)
        out = bank.base.model(
            input_ids=ids[:, :-1],
            attention_mask=torch.cat([before, inside[:, :-1].long()], dim=1),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        later = torch.log_softmax(out.logits.float(), dim=-1)
        gained.append(later.gather(2, ids[:, 1:, None]).squeeze(2))
    losses: list[float] = (-(torch.cat(gained, dim=1) * inside).sum(1) / lengths).tolist()
    return losses
