"""Steering a LoRA by a few examples: an encoder turns them into a vector, which scales the ranks of every module.

Sources: Kobalczyk, Fanconi, Sun, van der Schaar, "Few-shot Steerable Alignment: Adapting Rewards and LLM Policies with
Neural Processes", 2024, https://arxiv.org/abs/2412.13998; Perez et al., "FiLM: Visual Reasoning with a General
Conditioning Layer", AAAI 2018, https://arxiv.org/abs/1709.07871, for the feature-wise scaling.

An example is the difference of the last hidden states after its chosen and its rejected answer. z, the vector of a set
of examples, is an odd function of them: opposite preferences have opposite vectors. The rank-r activations A x of each
module are multiplied by 1 + G z, so that

    y = W x + alpha / r * B diag(1 + G z) A x

For a fixed z this is a LoRA, whose A is diag(1 + G z) A. Without examples z is 0, and it is the LoRA itself.

    steering/input       (w, d)      an example, normalised -> w values
    steering/attention   (3 w, w)    queries, keys and values of the examples' self-attention, without positions
    steering/output      (w, w)      its output, added to its input
    steering/hidden      (w, w)      of the sum over the examples, before tanh
    steering/condition   (w, w)      z
    steering/scales      (M r, w)    G, for M modules in the order of their names
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fedamole.model.adapter_store import AdapterStore
from fedamole.model.bank import Bank
from fedamole.model.batch import Ids
from fedamole.model.params import Adapter, Shapes, Tensors, shared_keys

STEERING = "steering/"
SCALES = STEERING + "scales"


@dataclass(frozen=True)
class SteeredAdapter(Adapter):
    """A LoRA in training with the encoder that steers it; `tensors` is the LoRA without examples."""

    encoder: Tensors = field(default_factory=dict)
    """The tensors named at the head of this file, all of them trained."""
    heads: int = 8
    """Heads of the encoder's self-attention."""
    context_examples: int = 6
    """Largest number of examples that z is computed from in training; each step draws a number from 0 to this."""

    @override
    def trained_sizes(self) -> dict[str, int]:
        return {**super().trained_sizes(), **{name: tensor.numel() for name, tensor in self.encoder.items()}}


def new_encoder(
    shapes: Shapes, width: int, rank: int, condition_size: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Initialise an encoder for a base with hidden states of `width` values.

    Values are uniform within 1 / sqrt(number of inputs), as those of `nn.Linear`. With G = 0, clients with opposite
    preferences would have opposite gradients, whose mean is 0.
    """
    w = condition_size
    sizes = {"input": (w, width), "attention": (3 * w, w), "output": (w, w), "hidden": (w, w), "condition": (w, w)}
    sizes["scales"] = (len(shapes) * rank, w)
    named: dict[str, Tensor] = {}
    for name, (rows, columns) in sizes.items():
        bound = 1 / math.sqrt(columns)
        named[STEERING + name] = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
    return named


def condition(encoder: Tensors, states: Tensor, heads: int) -> Tensor:
    """Return z (w) of N examples from their hidden states (N, 2, d); their order does not matter, and N = 0 gives 0."""
    if not len(states):
        return encoder[SCALES].new_zeros(encoder[SCALES].shape[1])
    inputs = (states[:, 0] - states[:, 1]).to(encoder[SCALES])
    x = F.layer_norm(inputs, inputs.shape[1:]) @ encoder["steering/input"].T
    parts = (x @ encoder["steering/attention"].T).chunk(3, dim=1)
    q, k, v = (part.unflatten(1, (heads, -1)).transpose(0, 1) for part in parts)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
    total = (x + attended @ encoder["steering/output"].T).sum(0)
    return torch.tanh(total @ encoder["steering/hidden"].T) @ encoder["steering/condition"].T


def rank_scales(encoder: Tensors, states: Tensor, heads: int, rank: int) -> Tensor:
    """Return the scales (M, r) of the ranks of M modules, by their names, for N examples with states (N, 2, d)."""
    if not len(states):
        return encoder[SCALES].new_ones(len(encoder[SCALES]) // rank, rank)
    return 1 + (encoder[SCALES] @ condition(encoder, states, heads)).view(-1, rank)


def steered(lora: Tensors, scales: Tensor) -> dict[str, Tensor]:
    """Return a plain LoRA with the rows of A of each module, in the order of the names, multiplied by scales (M, r)."""
    modules = sorted({name.rpartition("/shared/")[0] for name in lora})
    named = dict(lora)
    for module, row in zip(modules, scales, strict=True):
        a, _ = shared_keys(module)
        named[a] = (row.unsqueeze(1) * lora[a].to(row)).to(lora[a].dtype)
    return named


def answers_of(row: Any) -> tuple[Ids, ...]:
    """Return the answers of a training row: one, or the chosen and the rejected one of an `AnswerPair`."""
    answers = row[1]
    return answers if answers and isinstance(answers[0], tuple) else (answers,)


def example_states(bank: Bank, rows: Sequence[Any]) -> tuple[Tensor, int]:
    """Return the states (N, 2, d) of N training rows under the untuned base, and the number of tokens read.

    The states are the last hidden states after the chosen and the rejected answer; rows with one answer have zeros for
    the rejected one.
    """
    sequences = [(*row[0], *answer) for row in rows for answer in answers_of(row)]
    with bank.lent(AdapterStore(bank.base, []), 0, 0):
        hidden = bank.last_hidden([sequences])
    states = hidden.unflatten(0, (len(rows), -1))
    missing = 2 - states.shape[1]
    states = torch.cat([states, states.new_zeros(len(rows), missing, states.shape[2])], 1)
    return states, sum(map(len, sequences)) + len(sequences)
