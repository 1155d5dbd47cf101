"""Embeddings of virtual tokens at the input of a base."""

from typing import Any

import torch
from torch import Tensor, nn

from fedamole.model.forward_context import ActiveContext
from fedamole.model.prompt import virtual_tokens
from fedamole.model.stacked_adapters import StackedAdapters


class PromptLayer:
    """Replaces the embeddings of virtual tokens, which have negative ids, by each client's trained embeddings."""

    def __init__(self, embedding: nn.Module, active: ActiveContext) -> None:
        """Register hooks on the input embeddings; without a loaded prompt the hooks change nothing."""
        self.active = active
        self.adapters: StackedAdapters | None = None
        self._ids = torch.empty(0)
        embedding.register_forward_pre_hook(self._replace_ids)
        embedding.register_forward_hook(self._replace_embeddings)

    def _replace_ids(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Give virtual tokens the id 0, as the embedding layer accepts no negative ids."""
        if self.adapters is None:
            return None
        self._ids = inputs[0]
        return (self._ids.clamp(min=0), *inputs[1:])

    def _replace_embeddings(self, _: nn.Module, __: tuple[Any, ...], embedded: Tensor) -> Tensor | None:
        if self.adapters is None:
            return None
        ids, prompts, segments = self._ids, virtual_tokens(self.adapters.parts), self.active.context.segments
        if segments is None:
            owner = torch.zeros(ids.numel(), dtype=torch.long, device=ids.device)
        else:
            owner = segments.scaled_to(ids.numel()).owner
        index = owner * prompts.shape[1] + (-1 - ids).clamp(min=0).flatten()
        virtual = prompts.flatten(0, 1).index_select(0, index).view_as(embedded)
        return torch.where((ids < 0).unsqueeze(-1), virtual.to(embedded.dtype), embedded)
