"""The mixture-of-LoRA-experts linear (AMoLE), its router and its balance loss, as two matrix products.

Source: Zhang et al., "Personalized Federated Fine-Tuning for LLMs via Data-Driven Heterogeneous Model
Architectures", arXiv 2411.19128, section on the AMoLE module. A plain LoRA is the case of 0 domain experts.

One module that holds n domain experts of rank r stores them stacked:

    down ((n+2) r, d_in) = [W_t; A_1 .. A_n; A_s]      up ((n+1) r, d_out) = [B_1^T .. B_n^T; B_s^T]

(without domain experts there is nothing to route, so down is A_s alone), which makes the module one product
down, a little work on rank-r activations, and one product up: no loop over experts, no sorting of tokens and no
wait for the device. The modules of C clients are stacked once more, (C, (n+2) r, d_in) and (C, (n+1) r, d_out) with
n the most experts of any, zeros in the room that a client with fewer leaves before its shared expert.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fedamole.errors import ConfigError
from fedamole.model.segments import Segments, add_product, expand, product, segment_sum

Drop = Callable[[Tensor], Tensor]
"""Sets some values to zero, without scaling the others."""


@dataclass(frozen=True)
class AdapterSpec:
    """What all adapters of one method share, whatever experts a client holds."""

    rank: int = 8
    """Rank r of every expert."""
    alpha: float = 16.0
    """Numerator a of the scaling a/r of every expert's output."""
    dropout: float = 0.05
    """Share of inputs dropped on the value path of the experts while training; the router always sees all."""
    dropout_kind: Literal["exact", "rank"] = "exact"
    """Where values are dropped: on the module's input as in the paper, or (cheaper) on the rank-r activations."""
    top_k: int = 2
    """Domain experts that each token is routed to; the shared expert is not counted."""
    balance_weight: float = 0.001
    """Weight lambda of the load-balancing loss."""
    router: Literal["embedding", "mixer", "instance"] = "embedding"
    """What weighs domain experts: embeddings of the token as in AMoLE, a learned mixer, or one weight per instance."""
    instance_weight: float = 0.5
    """Largest weight of the first of two experts that are weighted by instance; the other has the rest."""

    def __post_init__(self) -> None:
        """Refuse values that no layer can be built with."""
        for key, value, lowest in (("rank", self.rank, 1), ("top_k", self.top_k, 1)):
            if value < lowest:
                raise ConfigError(f"{key} = {value}: must be at least {lowest}")
        if self.alpha <= 0:
            raise ConfigError(f"alpha = {self.alpha}: must be above 0 (the paper uses 2 x rank)")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout = {self.dropout}: must be at least 0 and below 1")
        if self.balance_weight < 0:
            raise ConfigError(f"balance_weight = {self.balance_weight}: must not be negative")

    @property
    def scaling(self) -> float:
        """The factor a/r on every expert's output."""
        return self.alpha / self.rank


class Routing(NamedTuple):
    """What the router did with T tokens in one module that holds n domain experts."""

    probabilities: Tensor
    """p (T, n): softmax over the experts that the token's client holds, 0 for others; at least float32."""
    chosen: Tensor
    """(T, k): indices of the k most probable experts, the lower index first among equals of `topk`'s choosing."""
    token_embedding: Tensor
    """t = W_t x (T, r)."""
    expert_embeddings: Tensor
    """e_i = A_i x (T, n, r)."""


def amole_linear(
    x: Tensor,
    base_out: Tensor,
    down: Tensor,
    up: Tensor,
    spec: AdapterSpec,
    drop: Drop | None = None,
    segments: Segments | None = None,
    absent: Tensor | None = None,
) -> tuple[Tensor, Routing | None]:
    """Add the routed mixture of experts to the output of a frozen linear.

    Shapes: x (..., d_in), base_out (..., d_out), down (C, (n+2) r, d_in) and up (C, (n+1) r, d_out) stacked as at the
    top of this file. `segments` divides the T rows of x among the C clients (left out: one client, down and up without
    C), `absent` (C, n) of bool marks the room of experts that a client does not hold. The products run in the dtype of
    x, scores and their softmax in float32 or better; the values that `drop` leaves are scaled by 1 / (1 - dropout).
    Returns y (..., d_out) and, with at least one domain expert, how the tokens were routed. With fewer than `top_k`
    experts it is a ConfigError.
    """
    tokens, r = x.reshape(-1, x.shape[-1]), spec.rank
    if segments is None:
        segments, down, up = Segments((tokens.shape[0],), x.device), down.unsqueeze(0), up.unsqueeze(0)
    down, up = down.to(x.dtype).transpose(1, 2), up.to(x.dtype)
    n, routing = up.shape[1] // r - 1, None
    if n == 0:
        values = _values(tokens, None, down, spec, drop, segments)
    else:
        if n < spec.top_k:
            raise ConfigError(
                f"top_k = {spec.top_k} experts asked of each token, but this module holds {n}; "
                f"lower top_k to {n} or give every client at least {spec.top_k} experts (min_experts)"
            )
        apart = drop is not None and spec.dropout_kind == "exact"
        clean = product(tokens, down[..., :-r] if apart else down, segments)
        embeddings = clean[:, r : (n + 1) * r].unflatten(1, (n, r))
        hidden = None if absent is None else expand(absent, segments)
        routing = route(clean[:, :r], embeddings, spec.top_k, hidden)
        values = _values(tokens, None if apart else clean[:, r:], down[..., r:], spec, drop, segments)
        values = (values.unflatten(1, (n + 1, r)) * mixture_weights(routing).to(x.dtype).unsqueeze(-1)).flatten(1)
    scaling = spec.scaling if drop is None else spec.scaling / (1 - spec.dropout)
    y = add_product(base_out.reshape(-1, up.shape[2]), values, up, segments, scaling)
    return y.view(*x.shape[:-1], up.shape[2]), routing


def _values(
    tokens: Tensor, clean: Tensor | None, value_down: Tensor, spec: AdapterSpec, drop: Drop | None, segments: Segments
) -> Tensor:
    """Rank-r activations of the experts, (T, (n+1) r), with dropout; `clean` is them without it, where known."""
    if drop is not None and spec.dropout_kind == "exact":
        return product(drop(tokens), value_down, segments)
    values = product(tokens, value_down, segments) if clean is None else clean
    return values if drop is None else drop(values)


def route(token_embedding: Tensor, expert_embeddings: Tensor, top_k: int, hidden: Tensor | None = None) -> Routing:
    """Score the experts for each token: p = softmax_i(<t, e_i> / sqrt(r)), the `top_k` largest chosen.

    Shapes: token_embedding (T, r), expert_embeddings (T, n, r); `hidden` (T, n) of bool marks experts not held.
    """
    precise = torch.promote_types(token_embedding.dtype, torch.float32)
    scores = torch.einsum("tnr,tr->tn", expert_embeddings.to(precise), token_embedding.to(precise))
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    probabilities = torch.softmax(scores / math.sqrt(token_embedding.shape[1]), dim=-1)
    # Of the scores: probabilities may underflow to the 0 of experts that are not held.
    return Routing(probabilities, scores.topk(top_k, dim=-1).indices, token_embedding, expert_embeddings)


def mixture_weights(routing: Routing) -> Tensor:
    """Weights (T, n+1) of the experts for each token: w_i = p_i / sum over the chosen, 0 elsewhere, shared = 1."""
    top = routing.probabilities.gather(1, routing.chosen)
    weights = torch.zeros_like(routing.probabilities).scatter(1, routing.chosen, top / top.sum(1, keepdim=True))
    return F.pad(weights, (0, 1), value=1.0)


def balance_loss(
    routing: Routing, not_padding: Tensor | None = None, segments: Segments | None = None, held: Tensor | None = None
) -> Tensor:
    """Load-balancing loss n * sum_i f_i P_i of one module for each client, (C), over its tokens that count.

    `not_padding` (T) of bool marks the tokens that count (left out: all), `held` (C) is the number n of domain
    experts of each client; without `segments` there is one client that holds all. P_i is the mean of p_i, f_i the share
    of the routed (token, slot) pairs that went to expert i; no gradient flows through f. The value is 1 when both are
    even over the experts.
    """
    p = routing.probabilities
    segments = Segments((p.shape[0],), p.device) if segments is None else segments
    routed = torch.zeros_like(p).scatter(1, routing.chosen, 1.0 / routing.chosen.shape[1]).detach()
    tokens = segments.counts
    if not_padding is not None:
        weight = not_padding.to(p.dtype).unsqueeze(1)
        p, routed, tokens = p * weight, routed * weight, segment_sum(weight, segments).squeeze(1).clamp(min=1)
    products = (segment_sum(routed, segments) * segment_sum(p, segments)).sum(1)
    return (p.shape[1] if held is None else held) * products / tokens**2
