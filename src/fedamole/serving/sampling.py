"""Sampling of one token from logits."""

import torch
from torch import Tensor


def sample_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Sample a token id from logits (V) with a temperature above 0 and nucleus sampling (`top_p`).

    The largest logit is subtracted first, so that no low temperature makes a logit infinite.
    """
    logits = logits.float().cpu()
    logits = (logits - logits.max()) / temperature
    probabilities, tokens = torch.softmax(logits, 0).sort(descending=True, stable=True)
    preceding = probabilities.cumsum(0) - probabilities
    nucleus = probabilities.masked_fill(preceding >= top_p, 0)
    nucleus[0] = probabilities[0]
    return int(tokens[torch.multinomial(nucleus, 1, generator=generator)])
