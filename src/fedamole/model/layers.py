"""Adapted linears: the layers that a bank installs around the target linears of a base."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedamole.model.amole import AdapterSpec, Drop, balance_loss
from fedamole.model.base import Base
from fedamole.model.dropout import column_keys, dropped
from fedamole.model.forward_context import ActiveContext
from fedamole.model.router import LinearAdapters, MixtureOutput
from fedamole.model.segments import Segments, add_product, segment_sum
from fedamole.model.stacked_adapters import StackedAdapters


@dataclass(frozen=True)
class MeanEmbeddings:
    """Mean router embeddings of one module over a client's embedding split (step 3 of a round)."""

    token: Tensor
    """t_c (r), float32."""
    experts: dict[int, Tensor] = field(default_factory=dict)
    """e_{i,c} (r), float32, by global expert id."""


class BankLinear(nn.Module):
    """A frozen linear (nn.Linear, Conv1D or quantised) with the adapters of the selected clients."""

    columns: Tensor

    def __init__(self, base_layer: nn.Module, name: str, index: int, width: int, active: ActiveContext) -> None:
        """Wrap the linear `name`, which has `width` inputs and is the `index`-th adapted linear of its base."""
        super().__init__()
        self.base_layer, self.name, self.index, self.active = base_layer, name, index, active
        self.adapters: StackedAdapters | None = None
        self.register_buffer("columns", column_keys(index, width), persistent=False)
        self._rank_columns: dict[int, Tensor] = {}

    @property
    def weight(self) -> Any:
        """Weight of the wrapped linear; some models read its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """Bias of the wrapped linear, or None."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the frozen linear's output plus, on each client's rows, the output of its adapter.

        Shapes: (..., d_in) -> (..., d_out).
        """
        base_out: Tensor = self.base_layer(x)
        adapters, context = self.adapters, self.active.context
        if adapters is None:
            return base_out
        spec = adapters.spec
        assert isinstance(spec, AdapterSpec)
        tokens = x.numel() // x.shape[-1]
        segments = Segments((tokens,), x.device) if context.segments is None else context.segments.scaled_to(tokens)
        drop = self._drop(spec, context.dropout_keys) if context.dropout_keys is not None and spec.dropout else None
        if adapters.delta is not None:
            changed = add_product(base_out.flatten(0, -2), x.flatten(0, -2), adapters.delta.to(x.dtype), segments, 1.0)
            base_out = changed.view_as(base_out)
        down, up = adapters.parts
        tensors = LinearAdapters(
            down, up, adapters.empty_slots, adapters.own_expert_mask, expert_weights=context.expert_weights
        )
        output = spec.router.forward(x, base_out, tensors, spec, drop, segments)
        self._collect(output, segments, adapters.num_experts)
        return output.y

    def _drop(self, spec: AdapterSpec, keys: Tensor) -> Drop:
        """Return a function that applies this step's dropout mask, for tokens with these keys (T)."""

        def drop(values: Tensor) -> Tensor:
            columns = self.columns
            if spec.dropout_kind == "rank":
                columns = self._columns_of_ranks(values.shape[1], spec.rank)
            return values.masked_fill(dropped(keys, columns, spec.dropout), 0)

        return drop

    def _columns_of_ranks(self, width: int, rank: int) -> Tensor:
        """Column keys (width) of the experts' rank-r activations.

        The shared expert comes last, after a number of slots that depends on the group, so it gets the first keys.
        """
        if width not in self._rank_columns:
            keys = column_keys(self.index, width).roll(-rank)
            self._rank_columns[width] = keys.to(self.columns.device)
        return self._rank_columns[width]

    def _collect(self, output: MixtureOutput, segments: Segments, num_experts: Tensor) -> None:
        """Add this module's results to the containers of the active context."""
        context, routing = self.active.context, output.routing
        if context.routing_weights is not None and output.weights is not None:
            context.routing_weights[self.name] = output.weights
        if routing is None:
            return
        if context.balance_losses is not None:
            context.balance_losses.append(balance_loss(routing, context.not_padding, segments, num_experts))
        if context.embedding_sums is not None:
            embeddings = [routing.token_embedding.unsqueeze(1).float(), routing.expert_embeddings.float()]
            if context.not_padding is not None:
                embeddings = [values * context.not_padding[:, None, None] for values in embeddings]
            total = torch.cat([segment_sum(values, segments) for values in embeddings], 1)
            context.embedding_sums[self.name] = total + context.embedding_sums.get(self.name, 0.0)


def install_layers(base: Base, active: ActiveContext) -> dict[str, BankLinear]:
    """Replace each target linear of a base, in place, by a `BankLinear` around it; return these by module name."""
    layers: dict[str, BankLinear] = {}
    for index, name in enumerate(sorted(base.shapes)):
        parent, _, child = name.rpartition(".")
        owner = base.model.get_submodule(parent)
        layer = BankLinear(getattr(owner, child), name, index, base.shapes[name][0], active).to(base.device)
        layer.eval()  # the base is always in eval mode
        setattr(owner, child, layer)
        layers[name] = layer
    return layers
