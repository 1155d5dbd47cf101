"""Log-probabilities of tokens, from the logits of the model before temperature, penalties and grammars."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_LOGPROB = -9999.0
"""Lowest value: JSON has no infinity."""


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, and the most probable tokens in its position."""

    token: int
    logprob: float | None
    """Natural logarithm; None for the first token of a prompt, which follows no other."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, log-probability) of the most probable tokens, in descending order."""


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Return the log-probabilities of n tokens, given the logits (n, V) that predict them."""
    if not tokens:
        return []
    logprobs = torch.log_softmax(logits.float(), 1).clamp(min=MIN_LOGPROB)
    ids = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    own = logprobs.gather(1, ids).squeeze(1).tolist()
    values, indices = (part.tolist() for part in logprobs.topk(min(top, logits.shape[1]), 1))
    return [
        TokenLogprob(token, own[row], tuple(zip(indices[row], values[row], strict=True)))
        for row, token in enumerate(tokens)
    ]
