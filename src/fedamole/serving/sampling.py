"""Choose the next token from logits: repetition penalty, JSON grammar, then greedy decoding or sampling."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sample_token(
    logits: Tensor,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    top_k: int = 0,
    min_p: float = 0.0,
) -> int:
    """Sample a token id from logits (V) with a temperature above 0.

    `top_k` (0: all), then nucleus sampling (`top_p`), then `min_p`, a fraction of the largest probability, remove
    improbable tokens; the most probable one always stays. The largest logit is subtracted first, so that no low
    temperature makes a logit infinite.
    """
    logits = logits.float().cpu()
    logits = (logits - logits.max()) / temperature
    probabilities, tokens = torch.softmax(logits, 0).sort(descending=True, stable=True)
    if top_k:
        probabilities = probabilities[:top_k] / probabilities[:top_k].sum()
    preceding = probabilities.cumsum(0) - probabilities
    removed = (preceding >= top_p) | (probabilities < min_p * probabilities[0])
    kept = probabilities.masked_fill(removed, 0)
    kept[0] = probabilities[0]
    return int(tokens[torch.multinomial(kept, 1, generator=generator)])


def penalise_repetition(logits: Tensor, tokens: Sequence[int], penalty: float) -> Tensor:
    """Return logits (V) in which positive logits of `tokens` are divided by `penalty` and negative ones multiplied.

    This is the repetition penalty of CTRL (arXiv 1909.05858, section 4.1) in the form of transformers.
    """
    ids = torch.tensor(sorted(set(tokens)), device=logits.device)
    seen = logits[ids]
    return logits.index_copy(0, ids, torch.where(seen > 0, seen / penalty, seen * penalty))
