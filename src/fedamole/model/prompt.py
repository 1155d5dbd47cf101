"""Virtual tokens before every prompt: soft prompts, and p-tuning, whose tokens come out of a small network.

Sources: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021, arXiv 2104.08691; Liu
et al., "GPT Understands, Too" (p-tuning), arXiv 2103.10385, with the MLP re-parameterisation of PEFT's prompt encoder.

A virtual token is written as a negative id, -1 the first, -2 the second: whatever lays out tokens (packing, trees of
options, generation) needs to know nothing of them. Only the layer at the input embeddings tells them from real ones.
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
    """What all prompts of one method share."""

    virtual_tokens: int = 20
    """Virtual tokens v before each prompt."""
    mlp: bool = False
    """Whether the tokens come out of a network (p-tuning), else they are trained themselves (prompt tuning)."""
    hidden: int | None = None
    """Width of the network's hidden layers; unset: that of the base's embeddings."""

    dropout: ClassVar[float] = 0.0
    balance_weight: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        """Refuse a prompt without tokens, and a network without hidden units."""
        if self.virtual_tokens < 1:
            raise ConfigError(f"virtual_tokens = {self.virtual_tokens}: must be at least 1")
        if self.hidden is not None and self.hidden < 1:
            raise ConfigError(f"encoder_hidden_size = {self.hidden}: must be at least 1")

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids that stand for the virtual tokens."""
        return tuple(-1 - place for place in range(self.virtual_tokens))

    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order in which a bank stacks them."""
        return (PROMPT, *MLP) if self.mlp else (PROMPT,)


def new_prompt(spec: PromptSpec, width: int, std: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Fresh virtual tokens for a base of this embedding width.

    A soft prompt is drawn with the deviation `std` of the base's own token embeddings. P-tuning draws as PEFT does:
    embeddings from N(0, 1), and the layers of the MLP, from the embeddings' width over `hidden` twice and back, as
    `nn.Linear` does.
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
    """Embeddings (C, v, d) of the virtual tokens from what C clients train: (C, v, d), and the MLP's six, (C, ., .)."""
    x, *layers = parts
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        x = F.relu(x) if weight is not layers[0] else x
        x = torch.baddbmm(bias, x, weight.transpose(1, 2))
    return x


def plain_prompt(tensors: Mapping[str, Tensor]) -> Tensor:
    """Embeddings (v, d) of one client's virtual tokens: what is left of p-tuning once it is trained."""
    parts = tuple(tensors[name].unsqueeze(0) for name in (PROMPT, *MLP) if name in tensors)
    return virtual_tokens(parts).squeeze(0)
