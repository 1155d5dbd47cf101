"""A linear with several LoRA experts, weighted by a learned mixer token by token, or by weights that are given.

Sources: FedALT (arXiv 2503.11880), a softmax over the client's own LoRA and that of the rest of the world; FedLEASE
(arXiv 2509.15087), the best M of 2M - 1 logits, of which the first M stand for the experts and the others once more for
the client's own; FedDPA (arXiv 2403.19211), one weight per instance. Stacked as in `amole`, without a shared expert:

    down (g + n r, d_in) = [W_mixer; A_1 .. A_n]      up (n r, d_out) = [B_1^T .. B_n^T]
"""

import torch
from torch import Tensor

from fedamole.model.amole import AdapterSpec, Drop
from fedamole.model.segments import Segments, add_product, expand, product


def mixer_linear(
    x: Tensor,
    base_out: Tensor,
    down: Tensor,
    up: Tensor,
    spec: AdapterSpec,
    drop: Drop | None,
    segments: Segments,
    own: Tensor | None = None,
    gates: Tensor | None = None,
) -> Tensor:
    """Add the weighted experts to the output of a frozen linear.

    Shapes: x (..., d_in), base_out (..., d_out), down (C, g + n r, d_in), up (C, n r, d_out); `own` (C, n) is 1 for the
    client's own expert, needed where g = 2n - 1. Without logits (g = 0) the experts' weights are `gates` (T, n).
    """
    tokens, r = x.reshape(-1, x.shape[-1]), spec.rank
    down, up = down.to(x.dtype).transpose(1, 2), up.to(x.dtype)
    n = up.shape[1] // r
    logits = down.shape[2] - up.shape[1]
    weights = mixer_weights(tokens, down[..., :logits], n, segments, own, gates)
    exact = drop is not None and spec.dropout_kind == "exact"
    values = product(drop(tokens) if exact and drop is not None else tokens, down[..., logits:], segments)
    if drop is not None and not exact:
        values = drop(values)
    values = (values.unflatten(1, (n, r)) * weights.to(x.dtype).unsqueeze(-1)).flatten(1)
    scaling = spec.scaling if drop is None else spec.scaling / (1 - spec.dropout)
    y = add_product(base_out.reshape(-1, up.shape[2]), values, up, segments, scaling)
    return y.view(*x.shape[:-1], up.shape[2])


def mixer_weights(
    tokens: Tensor,
    mixer: Tensor,
    experts: int,
    segments: Segments,
    own: Tensor | None = None,
    gates: Tensor | None = None,
) -> Tensor:
    """Weights (T, n) of the experts for tokens (T, d_in), whose mixer is (C, d_in, g); `gates` where g = 0."""
    if mixer.shape[2]:
        return mixed(product(tokens, mixer, segments), experts, None if own is None else expand(own, segments))
    assert gates is not None
    return gates


def mixed(logits: Tensor, experts: int, own: Tensor | None) -> Tensor:
    """Weights (T, n) of the experts from logits (T, g): a softmax, the n largest kept and scaled to a sum of 1.

    With g = n logits all are kept. Of g = 2n - 1 the last n - 1 stand for the client's own expert, `own` (T, n).
    """
    p = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    if p.shape[1] == experts:
        return p
    assert own is not None
    top = p.topk(experts, dim=-1)
    kept = torch.zeros_like(p).scatter(1, top.indices, top.values / top.values.sum(1, keepdim=True))
    return kept[:, :experts] + kept[:, experts:].sum(1, keepdim=True) * own.to(p.dtype)
