"""Embeddings of virtual tokens at the input of a base.

A virtual token has a negative id, and its embedding is a row of a table of its client: row i for the id -1 - i. The
table is a soft prompt (`model/prompt.py`), which is trained, or it holds the vectors of the synthetic examples that a
client's rows contain (`VECTORS` in `model/params.py`).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from fedamole.model.forward_context import ActiveContext
from fedamole.model.prompt import virtual_tokens
from fedamole.model.stacked_adapters import StackedAdapters


class PromptLayer:
    """Replaces the embeddings of virtual tokens, which have negative ids, by rows of each client's table."""

    def __init__(self, embedding: nn.Module, active: ActiveContext) -> None:
        """Register hooks on the input embeddings; without a prompt or a table the hooks change nothing."""
        self.active = active
        self.adapters: StackedAdapters | None = None
        """Soft prompts of the selected clients."""
        self.tables: Tensor | None = None
        """Vectors (C, V, d) of the selected clients' virtual tokens, if they have no soft prompts."""
        self._ids = torch.empty(0)
        embedding.register_forward_pre_hook(self._replace_ids)
        embedding.register_forward_hook(self._replace_embeddings)

    def _replace_ids(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Give virtual tokens the id 0, as the embedding layer accepts no negative ids."""
        if self.adapters is None and self.tables is None:
            return None
        self._ids = inputs[0]
        return (self._ids.clamp(min=0), *inputs[1:])

    def _replace_embeddings(self, _: nn.Module, __: tuple[Any, ...], embedded: Tensor) -> Tensor | None:
        if self.adapters is None and self.tables is None:
            return None
        ids, segments = self._ids, self.active.context.segments
        tables = cast(Tensor, self.tables) if self.adapters is None else virtual_tokens(self.adapters.parts)
        owner = torch.zeros_like(ids).flatten() if segments is None else segments.scaled_to(ids.numel()).owner
        index = owner * tables.shape[1] + (-1 - ids).clamp(min=0).flatten()
        virtual = tables.flatten(0, 1).index_select(0, index).view_as(embedded)
        return torch.where((ids < 0).unsqueeze(-1), virtual.to(embedded.dtype), embedded)
