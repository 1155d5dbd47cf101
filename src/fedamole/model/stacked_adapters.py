"""The adapters of several clients in one layer, as stacked tensors."""

from dataclasses import dataclass

from torch import Tensor

from fedamole.model.amole import AdapterSpec
from fedamole.model.prompt import PromptSpec


@dataclass(frozen=True)
class StackedAdapters:
    """Tensors of C clients in one layer. A layer has n slots for domain experts, the most that any client holds."""

    spec: AdapterSpec | PromptSpec
    """Settings of the adapters."""
    parts: tuple[Tensor, ...]
    """Trainable tensors, (C, rows, width) each: (down, up) of a linear, or the tensors of a prompt."""
    gradients: tuple[Tensor, ...]
    """Accumulated gradients of the parts; empty before `AdapterStore.trainable`."""
    experts: list[list[int]]
    """Global ids of the domain experts of each client."""
    num_experts: Tensor
    """(C): number of domain experts of each client."""
    empty_slots: Tensor | None
    """(C, n) bool: True for slots without an expert; None if every client holds n experts."""
    delta: Tensor | None
    """(C, d_in, d_out): a fixed change of the frozen linear, transposed."""
    own_expert_mask: Tensor | None
    """(C, n): 1 for the client's own expert, used by a `LearnedRouter` with extra logits for it."""
