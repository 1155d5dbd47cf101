"""LoRA experts weighted by a learned mixer token by token, or by weights that are given for each prompt.

Sources:

- FedALT (arXiv 2503.11880): softmax over the client's own LoRA and the average LoRA of the other clients.
- FedLEASE (arXiv 2509.15087): the best M of 2M - 1 logits. The first M logits stand for the experts, the remaining
  M - 1 for the client's own expert again.
- FedDPA (arXiv 2403.19211): one weight per prompt, from its similarity to the client's training prompts.

The tensors are stacked as in `amole`, without a shared expert. With g logits:

    down (g + n r, d_in) = [W_mixer; A_1 .. A_n]      up (n r, d_out) = [B_1^T .. B_n^T]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.model.router import LinearAdapters, MixtureOutput, Router
from fedamole.model.segments import Segments, add_product, expand, product

if TYPE_CHECKING:
    from fedamole.model.amole import AdapterSpec, Drop


@dataclass(frozen=True)
class LearnedRouter(Router):
    """A linear layer whose logits weigh the experts for each token."""

    config_name: ClassVar[str] = "mixer"
    tensor_name: ClassVar[str] = "mixer/W"

    extra_own_logits: bool = False
    """Whether n - 1 further logits stand for the client's own expert, 2n - 1 in all (FedLEASE)."""

    @override
    def num_rows(self, experts: int, rank: int) -> int:
        if not experts:
            return 0
        return 2 * experts - 1 if self.extra_own_logits else experts

    @override
    def forward(
        self,
        x: Tensor,
        base_out: Tensor,
        adapters: LinearAdapters,
        spec: "AdapterSpec",
        drop: "Drop | None",
        segments: Segments,
    ) -> MixtureOutput:
        return mixer_linear(x, base_out, adapters, spec, drop, segments)

    @override
    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(config.get("own_expert") is not None)


@dataclass(frozen=True)
class InstanceWeights(Router):
    """One weight per prompt for each of two experts, by the prompt's similarity to the client's reference prompts."""

    config_name: ClassVar[str] = "instance"

    max_weight: float = 0.5
    """Largest weight of the first expert; the second expert has the rest. Training uses this weight."""

    @override
    def num_rows(self, experts: int, rank: int) -> int:
        return 0

    def weights(self, similarity: Tensor) -> Tensor:
        """Return the weights (rows, 2) of both experts from mean cosine similarities (rows)."""
        first = (similarity * self.max_weight).clamp(0, 1)
        return torch.stack([first, 1 - first], dim=1)

    @override
    def forward(
        self,
        x: Tensor,
        base_out: Tensor,
        adapters: LinearAdapters,
        spec: "AdapterSpec",
        drop: "Drop | None",
        segments: Segments,
    ) -> MixtureOutput:
        weights = adapters.expert_weights
        if weights is None:  # in training
            weights = torch.tensor([[self.max_weight, 1 - self.max_weight]], device=x.device)
        weights = weights.repeat_interleave(x.numel() // x.shape[-1] // len(weights), dim=0)
        return mixer_linear(x, base_out, adapters._replace(expert_weights=weights), spec, drop, segments)

    @override
    def to_config(self) -> dict[str, Any]:
        return {**super().to_config(), "instance_weight": self.max_weight}

    @override
    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(config.get("instance_weight", cls.max_weight))


def mixer_linear(
    x: Tensor,
    base_out: Tensor,
    adapters: LinearAdapters,
    spec: "AdapterSpec",
    drop: "Drop | None",
    segments: Segments,
) -> MixtureOutput:
    """Add the weighted experts to the output of a frozen linear.

    Shapes: x (..., d_in), base_out (..., d_out), down (C, g + n r, d_in), up (C, n r, d_out). Without logits (g = 0)
    the weights of the experts are `adapters.expert_weights` (T, n).
    """
    tokens, r = x.reshape(-1, x.shape[-1]), spec.rank
    down, up = adapters.down.to(x.dtype).transpose(1, 2), adapters.up.to(x.dtype)
    n = up.shape[1] // r
    num_logits = down.shape[2] - up.shape[1]
    if num_logits:
        own = adapters.own_expert_mask
        logits = product(tokens, down[..., :num_logits], segments)
        weights = weights_from_logits(logits, n, None if own is None else expand(own, segments))
    else:
        assert adapters.expert_weights is not None
        weights = adapters.expert_weights
    exact = drop is not None and spec.dropout_kind == "exact"
    values = product(drop(tokens) if exact and drop is not None else tokens, down[..., num_logits:], segments)
    if drop is not None and not exact:
        values = drop(values)
    values = (values.unflatten(1, (n, r)) * weights.to(x.dtype).unsqueeze(-1)).flatten(1)
    scaling = spec.scaling if drop is None else spec.scaling / (1 - spec.dropout)
    y = add_product(base_out.reshape(-1, up.shape[2]), values, up, segments, scaling)
    return MixtureOutput(y.view(*x.shape[:-1], up.shape[2]), weights=weights)


def weights_from_logits(logits: Tensor, experts: int, own_expert_mask: Tensor | None) -> Tensor:
    """Weights (T, n) of the experts from logits (T, g): softmax, keep the n largest, scale them to a sum of 1.

    With g = n logits all are kept. With g = 2n - 1, the last n - 1 stand for the client's own expert, which
    `own_expert_mask` (T, n) marks with 1.
    """
    p = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    if p.shape[1] == experts:
        return p
    assert own_expert_mask is not None
    top = p.topk(experts, dim=-1)
    weights = torch.zeros_like(p).scatter(1, top.indices, top.values / top.values.sum(1, keepdim=True))
    return weights[:, :experts] + weights[:, experts:].sum(1, keepdim=True) * own_expert_mask.to(p.dtype)
