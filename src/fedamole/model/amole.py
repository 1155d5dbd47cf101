"""The mixture-of-LoRA-experts linear (AMoLE), its router and its balance loss, as two matrix products.

Source: Zhang et al., "Personalized Federated Fine-Tuning for LLMs via Data-Driven Heterogeneous Model
Architectures", arXiv 2411.19128, section on the AMoLE module. A plain LoRA is the case of 0 domain experts.

One module that holds n domain experts of rank r stores them stacked:

    down ((n+2) r, d_in) = [W_t; A_1 .. A_n; A_s]      up ((n+1) r, d_out) = [B_1^T .. B_n^T; B_s^T]

(without domain experts there is nothing to route, so down is A_s alone), which makes the module one product
down, a little work on rank-r activations, and one product up: no loop over experts, no sorting of tokens and no
wait for the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fedamole.errors import ConfigError

Drop = Callable[[Tensor], Tensor]


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
    """p (T, n): softmax over the experts held here; at least float32."""
    chosen: Tensor
    """(T, k): indices of the k most probable experts, the lower index first among equals of `topk`'s choosing."""
    token_embedding: Tensor
    """t = W_t x (T, r)."""
    expert_embeddings: Tensor
    """e_i = A_i x (T, n, r)."""


def expert_count(up: Tensor, rank: int) -> int:
    """Return the number n of domain experts in a stacked `up` of ((n+1) r, d_out)."""
    return up.shape[0] // rank - 1


def amole_linear(
    x: Tensor, base_out: Tensor, down: Tensor, up: Tensor, spec: AdapterSpec, drop: Drop | None = None
) -> tuple[Tensor, Routing | None]:
    """Add the routed mixture of experts to the output of a frozen linear.

    Shapes: x (..., d_in), base_out (..., d_out), down and up stacked as at the top of this file. The products run
    in the dtype of x, scores and their softmax in float32 or better. Returns y (..., d_out) and, with at least
    one domain expert, how the tokens were routed. A module that holds fewer than `top_k` experts is a ConfigError.
    """
    tokens = x.reshape(-1, x.shape[-1])
    down, up, r = down.to(x.dtype), up.to(x.dtype), spec.rank
    n = expert_count(up, r)
    if n == 0:
        values, routing = _values(tokens, None, down, spec, drop), None
    else:
        if n < spec.top_k:
            raise ConfigError(
                f"top_k = {spec.top_k} experts asked of each token, but this module holds {n}; "
                f"lower top_k to {n} or give every client at least {spec.top_k} experts (min_experts)"
            )
        clean = F.linear(tokens, down if drop is None or spec.dropout_kind == "rank" else down[:-r])
        embeddings = clean[:, r : (n + 1) * r].unflatten(1, (n, r))
        routing = route(clean[:, :r], embeddings, spec.top_k)
        values = _values(tokens, clean, down[r:], spec, drop)
        values = (values.unflatten(1, (n + 1, r)) * mixture_weights(routing).to(x.dtype).unsqueeze(-1)).flatten(1)
    y = torch.addmm(base_out.reshape(-1, up.shape[1]), values, up, alpha=spec.scaling)
    return y.view(*x.shape[:-1], up.shape[1]), routing


def _values(tokens: Tensor, clean: Tensor | None, value_down: Tensor, spec: AdapterSpec, drop: Drop | None) -> Tensor:
    """Rank-r activations of the experts, (T, (n+1) r), with dropout; `clean` is reused where it holds them."""
    if drop is not None and spec.dropout_kind == "exact":
        return F.linear(drop(tokens), value_down)
    values = F.linear(tokens, value_down) if clean is None else clean[:, spec.rank :]
    return values if drop is None else drop(values)


def route(token_embedding: Tensor, expert_embeddings: Tensor, top_k: int) -> Routing:
    """Score the experts for each token: p = softmax_i(<t, e_i> / sqrt(r)), the `top_k` largest chosen.

    Shapes: token_embedding (T, r), expert_embeddings (T, n, r).
    """
    precise = torch.promote_types(token_embedding.dtype, torch.float32)
    scores = torch.einsum("tnr,tr->tn", expert_embeddings.to(precise), token_embedding.to(precise))
    probabilities = torch.softmax(scores / math.sqrt(token_embedding.shape[1]), dim=-1)
    return Routing(probabilities, probabilities.topk(top_k, dim=-1).indices, token_embedding, expert_embeddings)


def mixture_weights(routing: Routing) -> Tensor:
    """Weights (T, n+1) of the experts for each token: w_i = p_i / sum over the chosen, 0 elsewhere, shared = 1."""
    top = routing.probabilities.gather(1, routing.chosen)
    weights = torch.zeros_like(routing.probabilities).scatter(1, routing.chosen, top / top.sum(1, keepdim=True))
    return F.pad(weights, (0, 1), value=1.0)


def balance_loss(routing: Routing, counted: Tensor) -> Tensor:
    """Load-balancing loss n * sum_i f_i P_i of one module over the tokens that count.

    `counted` (T) marks the non-padding tokens. P_i is the mean of p_i, f_i the share of the routed (token, slot)
    pairs that went to expert i; no gradient flows through f. The value is 1 when both are even over the experts.
    """
    p, n = routing.probabilities, routing.probabilities.shape[1]
    weight = counted.to(p.dtype)
    total = weight.sum().clamp(min=1)
    routed = torch.zeros_like(p).scatter(1, routing.chosen, 1.0 / routing.chosen.shape[1])
    share = (weight @ routed.detach()) / total
    return n * torch.dot(share, (weight @ p) / total)
