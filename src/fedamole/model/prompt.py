"""Virtual tokens before every prompt: prompt tuning, and p-tuning, whose tokens are the output of a small MLP.

Sources: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021, arXiv 2104.08691; Liu
et al., "GPT Understands, Too" (p-tuning), arXiv 2103.10385, with the MLP re-parameterisation of PEFT's prompt encoder.

Virtual tokens have negative ids: -1 the first, -2 the second. Packing, option trees and generation treat them as any
other token; only the layer at the input embeddings (`prompt_layer.py`) handles them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedamole.errors import ConfigError

PROMPT = "prompt/embedding"
MLP = tuple(f"prompt/{kind}-{layer}" for layer in (1, 2, 3) for kind in ("weight", "bias"))


@dataclass(frozen=True)
class PromptSpec:
    """Settings that all prompts of a method share."""

    virtual_tokens: int = 20
    """Number of virtual tokens v before each prompt."""
    mlp: bool = False
    """Whether the tokens are the output of an MLP (p-tuning) or trained directly (prompt tuning)."""
    hidden: int | None = None
    """Width of the MLP's hidden layers; None: the width of the base's embeddings."""

    dropout: ClassVar[float] = 0.0
    balance_weight: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        """Raise ConfigError for a prompt without tokens or an MLP without hidden units."""
        if self.virtual_tokens < 1:
            raise ConfigError(f"virtual_tokens = {self.virtual_tokens}: must be at least 1")
        if self.hidden is not None and self.hidden < 1:
            raise ConfigError(f"encoder_hidden_size = {self.hidden}: must be at least 1")

    @property
    def prefix(self) -> tuple[int, ...]:
        """Ids of the virtual tokens."""
        return tuple(-1 - i for i in range(self.virtual_tokens))

    def names(self) -> tuple[str, ...]:
        """Return the names of the tensors, in the order in which a bank stacks them."""
        return (PROMPT, *MLP) if self.mlp else (PROMPT,)


def new_prompt(spec: PromptSpec, width: int, std: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Initialise virtual tokens for a base with this embedding width.

    Prompt tuning draws from N(0, std^2), where `std` is the standard deviation of the base's token embeddings. P-tuning
    initialises as PEFT does: embeddings from N(0, 1), and an MLP of three layers (width, hidden, hidden, width) as
    `nn.Linear`.
    """
    tokens = torch.empty(spec.virtual_tokens, width)
    if not spec.mlp:
        return {PROMPT: tokens.normal_(0, std, generator=generator)}
    named = {PROMPT: tokens.normal_(generator=generator)}
    hidden = spec.hidden or width
    layers = ((width, hidden), (hidden, hidden), (hidden, width))
    for name, (d_in, d_out) in zip(MLP, (layer for layer in layers for _ in ("weight", "bias")), strict=True):
        shape, bound = (d_out, d_in) if "weight" in name else (1, d_out), 1 / math.sqrt(d_in)
        named[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return named


def virtual_tokens(parts: tuple[Tensor, ...]) -> Tensor:
    """Compute virtual token embeddings (C, v, d) from trained tensors: (C, v, d) and, for p-tuning, the MLP's six."""
    x, *layers = parts
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        x = F.relu(x) if weight is not layers[0] else x
        x = torch.baddbmm(bias, x, weight.transpose(1, 2))
    return x


def plain_prompt(tensors: Mapping[str, Tensor]) -> Tensor:
    """Compute the embeddings (v, d) of one client's virtual tokens, without the MLP of p-tuning."""
    parts = tuple(tensors[name].unsqueeze(0) for name in (PROMPT, *MLP) if name in tensors)
    return virtual_tokens(parts).squeeze(0)
