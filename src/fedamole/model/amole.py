"""The adaptive mixture of LoRA experts (AMoLE) of one linear: forward pass, router and load-balancing loss.

Source: Zhang et al., "Personalized Federated Fine-Tuning for LLMs via Data-Driven Heterogeneous Model
Architectures", arXiv 2411.19128, section on the AMoLE module. A plain LoRA is the case of 0 domain experts.

The tensors of a module with n domain experts of rank r are stacked:

    down ((n+2) r, d_in) = [W_t; A_1 .. A_n; A_s]      up ((n+1) r, d_out) = [B_1^T .. B_n^T; B_s^T]

Without domain experts there is nothing to route, and down is A_s alone. Stacking turns the module into one matrix
product down to rank r, a few operations on the rank-r activations, and one product up. It needs no loop over experts,
no sorting of tokens and no synchronisation with the device. The modules of C clients are stacked once more, to
(C, (n+2) r, d_in) and (C, (n+1) r, d_out), where n is the largest number of experts of any client. A client with fewer
experts has empty slots, filled with zeros, before its shared expert.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.model.mixer import InstanceWeights, LearnedRouter
from fedamole.model.router import LinearAdapters, MixtureOutput, Router
from fedamole.model.segments import Segments, add_product, expand, product, segment_sum

Drop = Callable[[Tensor], Tensor]
"""Sets some values to zero, without scaling the others."""


@dataclass(frozen=True)
class EmbeddingRouter(Router):
    """AMoLE's router: the inner product of a token's embedding and each expert's embedding of it."""

    config_name: ClassVar[str] = "embedding"
    tensor_name: ClassVar[str] = "router/W"
    has_shared_expert: ClassVar[bool] = True
    allows_different_experts: ClassVar[bool] = True

    @override
    def num_rows(self, experts: int, rank: int) -> int:
        return rank if experts else 0

    @override
    def forward(
        self,
        x: Tensor,
        base_out: Tensor,
        adapters: LinearAdapters,
        spec: "AdapterSpec",
        drop: Drop | None,
        segments: Segments,
    ) -> MixtureOutput:
        return amole_linear(x, base_out, adapters.down, adapters.up, spec, drop, segments, adapters.empty_slots)

    @override
    def check_experts(self, experts: Mapping[str, Sequence[int]], top_k: int) -> None:
        for module, ids in experts.items():
            if 0 < len(ids) < top_k:
                raise ConfigError(f"{module}: {len(ids)} experts, but top_k = {top_k} per token; raise min_experts")


@dataclass(frozen=True)
class AdapterSpec:
    """Settings that all LoRA adapters of a method share, independent of the experts that a client holds."""

    rank: int = 8
    """Rank r of every expert."""
    alpha: float = 16.0
    """Numerator of the scaling alpha / r of every expert's output."""
    dropout: float = 0.05
    """Dropout probability on the inputs of the experts during training; the router's inputs are never dropped."""
    dropout_kind: Literal["exact", "rank"] = "exact"
    """Where dropout applies: "exact", to the module's input as in the paper; "rank", to the rank-r activations, which
    is cheaper."""
    top_k: int = 2
    """Number of domain experts that each token is routed to, not counting the shared expert."""
    balance_weight: float = 0.001
    """Weight lambda of the load-balancing loss."""
    router: EmbeddingRouter | LearnedRouter | InstanceWeights = EmbeddingRouter()
    """How domain experts are weighed."""

    def __post_init__(self) -> None:
        """Raise ConfigError for values that no layer can be built with."""
        for key in ("rank", "top_k"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} = {getattr(self, key)}: must be at least 1")
        if self.alpha <= 0:
            raise ConfigError(f"alpha = {self.alpha}: must be above 0 (the paper uses 2 x rank)")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout = {self.dropout}: must be at least 0 and below 1")
        if self.balance_weight < 0:
            raise ConfigError(f"balance_weight = {self.balance_weight}: must not be negative")

    @property
    def scaling(self) -> float:
        """The factor alpha / r on every expert's output."""
        return self.alpha / self.rank


class Routing(NamedTuple):
    """Router scores of T tokens in one module with n domain experts."""

    probabilities: Tensor
    """p (T, n): softmax over the client's experts, 0 in empty slots; at least float32."""
    chosen: Tensor
    """(T, k): indices of the k most probable experts."""
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
    empty_slots: Tensor | None = None,
) -> MixtureOutput:
    """Add the routed mixture of experts to the output of a frozen linear.

    Shapes: x (..., d_in), base_out (..., d_out), down (C, (n+2) r, d_in) and up (C, (n+1) r, d_out), stacked as this
    module's docstring defines. `segments` assigns the T rows of x to the C clients; without it there is one client, and
    down and up have no leading dimension. `empty_slots` (C, n) is True where a client has no expert.

    The products run in the dtype of x; scores and softmax in at least float32. Values that `drop` keeps are scaled by
    1 / (1 - dropout). Raises ConfigError if there are fewer than `top_k` domain experts.
    """
    tokens, r = x.reshape(-1, x.shape[-1]), spec.rank
    if segments is None:
        segments, down, up = Segments((tokens.shape[0],), x.device), down.unsqueeze(0), up.unsqueeze(0)
    down, up = down.to(x.dtype).transpose(1, 2), up.to(x.dtype)
    n, routing, weights, values = up.shape[1] // r - 1, None, None, None
    exact = drop is not None and spec.dropout_kind == "exact"
    if n:
        if n < spec.top_k:
            raise ConfigError(
                f"top_k = {spec.top_k} experts per token, but this module holds {n}; "
                f"lower top_k to {n} or give every client at least {spec.top_k} experts (min_experts)"
            )
        routed = product(tokens, down[..., :-r] if exact else down, segments)  # the router's inputs are not dropped
        embeddings = routed[:, r : (n + 1) * r].unflatten(1, (n, r))
        empty = None if empty_slots is None else expand(empty_slots, segments)
        routing = route(routed[:, :r], embeddings, spec.top_k, empty)
        weights = mixture_weights(routing)
        down, values = down[..., r:], None if exact else routed[:, r:]
    if values is None:
        values = product(drop(tokens) if drop is not None and exact else tokens, down, segments)
    if drop is not None and not exact:
        values = drop(values)
    if weights is not None:
        values = (values.unflatten(1, (n + 1, r)) * weights.to(x.dtype).unsqueeze(-1)).flatten(1)
    scaling = spec.scaling if drop is None else spec.scaling / (1 - spec.dropout)
    y = add_product(base_out.reshape(-1, up.shape[2]), values, up, segments, scaling).view(*x.shape[:-1], up.shape[2])
    return MixtureOutput(y, routing, None if weights is None else weights[:, :-1])


def route(token_embedding: Tensor, expert_embeddings: Tensor, top_k: int, empty: Tensor | None = None) -> Routing:
    """Score the experts for each token, p = softmax_i(<t, e_i> / sqrt(r)), and choose the `top_k` most probable.

    Shapes: token_embedding (T, r), expert_embeddings (T, n, r); `empty` (T, n) is True for empty slots.
    """
    precise = torch.promote_types(token_embedding.dtype, torch.float32)
    scores = torch.einsum("tnr,tr->tn", expert_embeddings.to(precise), token_embedding.to(precise))
    if empty is not None:
        scores = scores.masked_fill(empty, -torch.inf)
    probabilities = torch.softmax(scores / math.sqrt(token_embedding.shape[1]), dim=-1)
    # topk of the scores: a probability may underflow to 0, the probability of an empty slot.
    return Routing(probabilities, scores.topk(top_k, dim=-1).indices, token_embedding, expert_embeddings)


def mixture_weights(routing: Routing) -> Tensor:
    """Weights (T, n+1) of the experts: w_i = p_i / (sum of the chosen p), 0 for the others, 1 for the shared expert."""
    top = routing.probabilities.gather(1, routing.chosen)
    weights = torch.zeros_like(routing.probabilities).scatter(1, routing.chosen, top / top.sum(1, keepdim=True))
    return F.pad(weights, (0, 1), value=1.0)


def balance_loss(
    routing: Routing,
    not_padding: Tensor | None = None,
    segments: Segments | None = None,
    num_experts: Tensor | None = None,
) -> Tensor:
    """Load-balancing loss n * sum_i f_i P_i of one module for each client, (C).

    P_i is the mean of p_i over the client's tokens, f_i the fraction of its routed (token, slot) pairs that went to
    expert i; no gradient flows through f. The loss is 1 if both are uniform over the experts.

    `not_padding` (T) bool selects the tokens that count (default: all). `num_experts` (C) is the number n of domain
    experts of each client (default: all slots). Without `segments` there is one client.
    """
    p = routing.probabilities
    segments = Segments((p.shape[0],), p.device) if segments is None else segments
    routed = torch.zeros_like(p).scatter(1, routing.chosen, 1.0 / routing.chosen.shape[1]).detach()
    tokens = segments.counts
    if not_padding is not None:
        weight = not_padding.to(p.dtype).unsqueeze(1)
        p, routed, tokens = p * weight, routed * weight, segment_sum(weight, segments).squeeze(1).clamp(min=1)
    products = (segment_sum(routed, segments) * segment_sum(p, segments)).sum(1)
    return (p.shape[1] if num_experts is None else num_experts) * products / tokens**2


ROUTERS: dict[str, type[EmbeddingRouter | LearnedRouter | InstanceWeights]] = {
    EmbeddingRouter.config_name: EmbeddingRouter,
    LearnedRouter.config_name: LearnedRouter,
    InstanceWeights.config_name: InstanceWeights,
}
"""Routers by their name in adapter_config.json."""
