"""Storage of the adapters of several clients: one matrix of weights and one of gradients.

Each client has one row in both matrices, so that clipping, finiteness checks and the optimiser work on one tensor per
client. The tensors that the layers read are views into the rows.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedamole.model.adapter_files import check_fits
from fedamole.model.amole import AdapterSpec
from fedamole.model.base import Base
from fedamole.model.params import (
    OWN,
    REFERENCES,
    VECTORS,
    Adapter,
    Tensors,
    delta_key,
    stack,
    unstack,
)
from fedamole.model.prompt import PROMPT, PromptSpec
from fedamole.model.stacked_adapters import StackedAdapters


class AdapterStore:
    """Copies of the adapters of C clients with P numbers each, where smaller adapters are padded with zeros.

    `tables` (C, V, d) holds the vectors of the clients' virtual tokens, padded with zeros to the largest V. It is None
    if no adapter has any.
    """

    def __init__(self, base: Base, adapters: Sequence[Adapter]) -> None:
        """Copy adapters to the base's device, in at least float32.

        Raises ValueError for adapters of different kinds, BaseModelError for adapters that do not fit the base,
        ConfigError for modules with too few experts.
        """
        for adapter in adapters:
            check_fits(adapter, base, "the adapter")
            if isinstance(adapter.spec, AdapterSpec):
                adapter.spec.router.check_experts(adapter.experts, adapter.spec.top_k)
        if len({adapter.kind() for adapter in adapters}) > 1:
            raise ValueError("adapters of different kinds cannot share a bank")
        self.adapters, self.device = list(adapters), base.device
        self.spec = adapters[0].spec if adapters else None
        self.experts: list[dict[str, list[int]]] = [
            {PROMPT: []} if isinstance(self.spec, PromptSpec) else adapter.experts for adapter in adapters
        ]
        """Global ids of each client's domain experts, by layer."""
        self.references = [adapter.fixed[REFERENCES].float() for adapter in adapters if REFERENCES in adapter.fixed]
        """Reference hidden states (S, d) of each client; empty if this kind of adapter has none."""
        self.tables = _tables(adapters).to(self.device) if any(VECTORS in it.fixed for it in adapters) else None
        self.weights, self.gradients = torch.empty(0, 0), torch.empty(0, 0)
        """Both (C, P); the gradients are empty before `trainable`."""
        self._shapes: dict[str, list[torch.Size]] = {}
        self._stacked: dict[tuple[int, int], dict[str, StackedAdapters]] = {}
        if not adapters:
            return
        self._slots = {name: max(len(experts[name]) for experts in self.experts) for name in self.experts[0]}
        """Slots for domain experts of each layer: the most that any client holds."""
        dtype = torch.promote_types(next(iter(adapters[0].tensors.values())).dtype, torch.float32)
        rows = [self.row(client, adapter.tensors) for client, adapter in enumerate(adapters)]
        self.weights = torch.stack(rows).to(self.device, dtype)
        layers = self._parts(0, adapters[0].tensors)
        self._shapes = {name: [part.shape for part in parts] for name, parts in layers.items()}

    def _parts(self, client: int, tensors: Tensors) -> dict[str, list[Tensor]]:
        """The trainable tensors of each layer, from tensors that are named as a client's adapter's."""
        if isinstance(self.spec, PromptSpec):
            return {PROMPT: [tensors[name] for name in self.spec.names()]}
        return {name: [*stack(tensors, name, ids, self._slots[name])] for name, ids in self.experts[client].items()}

    def row(self, client: int, tensors: Tensors) -> Tensor:
        """Flatten tensors that are named as a client's adapter's into the layout of its row of `weights`, (P)."""
        return torch.cat([part.flatten() for parts in self._parts(client, tensors).values() for part in parts])

    def stacked(self, first: int, last: int) -> dict[str, StackedAdapters]:
        """Return views of the adapters of clients `first` to `last` - 1, by layer."""
        if (first, last) not in self._stacked:
            self._stacked[first, last] = dict(self._views(first, last))
        return self._stacked[first, last]

    def _views(self, first: int, last: int) -> Iterator[tuple[str, StackedAdapters]]:
        start = 0
        for name, shapes in self._shapes.items():
            experts = [by_module[name] for by_module in self.experts[first:last]]
            counts = torch.tensor([len(ids) for ids in experts])
            empty = torch.arange(self._slots[name]) >= counts[:, None]
            views, gradients = [], []
            for shape in shapes:
                columns, start = slice(start, start + shape.numel()), start + shape.numel()
                views.append(self.weights[first:last, columns].unflatten(1, shape).detach().requires_grad_())
                if self.gradients.numel():
                    gradients.append(self.gradients[first:last, columns].unflatten(1, shape))
            delta = self._fixed(delta_key(name), first, last)
            yield (
                name,
                StackedAdapters(
                    spec=self.adapters[0].spec,
                    parts=tuple(views),
                    gradients=tuple(gradients),
                    experts=experts,
                    num_experts=counts.to(self.device, self.weights.dtype),
                    empty_slots=empty.to(self.device) if bool(empty.any()) else None,
                    delta=None if delta is None else delta.transpose(1, 2),
                    own_expert_mask=self._fixed(OWN, first, last),
                ),
            )

    def _fixed(self, name: str, first: int, last: int) -> Tensor | None:
        """Stack a fixed tensor of some clients; None if this kind of adapter has none of this name."""
        if last == first or name not in self.adapters[first].fixed:
            return None
        return torch.stack([adapter.fixed[name] for adapter in self.adapters[first:last]]).to(self.device)

    def trainable(self) -> list[Tensor]:
        """Allocate gradients of 0 and return one flat tensor (P) per client whose `.grad` is its row of `gradients`."""
        self.gradients = torch.zeros_like(self.weights)
        self._stacked = {}
        rows = [row.detach().requires_grad_() for row in self.weights]
        for row, gradient in zip(rows, self.gradients, strict=True):
            row.grad = gradient
        return rows

    def adapter(self, client: int) -> Adapter:
        """Return a copy of a client's adapter on the CPU."""
        if self.spec is None:
            raise RuntimeError("the bank is empty")
        tensors: dict[str, Tensor] = {}
        for name, stacked in self._views(client, client + 1):
            parts = [part.detach()[0].cpu() for part in stacked.parts]
            if isinstance(self.spec, PromptSpec):
                tensors.update((key, part.clone()) for key, part in zip(self.spec.names(), parts, strict=True))
            else:
                down, up = parts
                tensors.update(unstack(down, up, name, stacked.experts[0], self.spec.rank, self.spec.router))
        return Adapter(self.spec, tensors, {k: v for k, v in self.adapters[client].fixed.items() if k != VECTORS})


def _tables(adapters: Sequence[Adapter]) -> Tensor:
    """Stack the vectors of the adapters' virtual tokens; ValueError for soft prompts, which use the same ids."""
    if any(isinstance(adapter.spec, PromptSpec) for adapter in adapters):
        raise ValueError("an adapter that is a soft prompt cannot read rows with virtual tokens")
    return pad_sequence([adapter.fixed[VECTORS].float() for adapter in adapters], batch_first=True)
