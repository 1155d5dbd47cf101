"""Modules <-> named tensors. The one place that defines the names of adapter tensors.

Identity is a key, place is a value: domain expert 7 of a module is named the same whoever holds it, so that
aggregation by expert is a mean over whoever returned the key.

    <module>/router/W      token projection W_t  (r, d_in)
    <module>/expert-07/A   (r, d_in)             <module>/expert-07/B   (d_out, r)
    <module>/shared/A      (r, d_in)             <module>/shared/B      (d_out, r)
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedamole.model.amole import AdapterSpec

Shapes = Mapping[str, tuple[int, int]]
"""(d_in, d_out) of every adapted module, by module name."""
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """A trainable addition to a frozen base, as data: what its layers share and its named tensors."""

    spec: AdapterSpec
    tensors: Tensors

    def modules(self) -> list[str]:
        """Names of the adapted modules, sorted."""
        return sorted({name.rpartition("/")[0].rpartition("/")[0] for name in self.tensors})

    def kind(self) -> tuple[object, ...]:
        """What adapters must have in common to be in one bank: spec, modules, and which of those have a router."""
        return self.spec, tuple((module, bool(held)) for module, held in expert_ids(self.tensors).items())

    def parameters(self) -> int:
        """Count of trainable numbers."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def router_key(module: str) -> str:
    """Name of a module's token projection W_t."""
    return f"{module}/router/W"


def shared_keys(module: str) -> tuple[str, str]:
    """Names of A and B of a module's shared expert."""
    return f"{module}/shared/A", f"{module}/shared/B"


def expert_keys(module: str, expert: int) -> tuple[str, str]:
    """Names of A and B of a module's domain expert with this global id."""
    return f"{module}/expert-{expert:02d}/A", f"{module}/expert-{expert:02d}/B"


def expert_ids(tensors: Iterable[str]) -> dict[str, list[int]]:
    """Global ids of the domain experts present, sorted, for every module that is present."""
    found: dict[str, set[int]] = {}
    for name in tensors:
        module, owner = name.split("/")[:2]
        ids = found.setdefault(module, set())
        if owner.startswith("expert-"):
            ids.add(int(owner.removeprefix("expert-")))
    return {module: sorted(ids) for module, ids in sorted(found.items())}


def stack(tensors: Tensors, module: str, experts: list[int], room: int | None = None) -> tuple[Tensor, Tensor]:
    """Stack one module's tensors into (down, up) as `amole_linear` reads them for one client.

    `room` is the number of domain experts to leave room for (left out: as many as there are); it is filled with zeros.
    """
    keys = [expert_keys(module, expert) for expert in experts]
    a_shared, b_shared = (tensors[key] for key in shared_keys(module))
    empty = 0 if room is None else (room - len(experts)) * len(a_shared)
    router = [tensors[router_key(module)]] if experts else []
    down = torch.cat([*router, *(tensors[a] for a, _ in keys), a_shared.new_zeros(empty, a_shared.shape[1]), a_shared])
    up = [*(tensors[b].T for _, b in keys), b_shared.new_zeros(empty, b_shared.shape[0]), b_shared.T]
    return down, torch.cat(up)


def unstack(down: Tensor, up: Tensor, module: str, experts: list[int], rank: int) -> dict[str, Tensor]:
    """Invert `stack`, whatever room it left; every tensor is a copy of its own."""
    pairs = list(zip(down.split(rank)[1 if experts else 0 :], up.split(rank), strict=True))
    named = {router_key(module): down[:rank].clone()} if experts else {}
    owners = [*(expert_keys(module, expert) for expert in experts), shared_keys(module)]
    for (a, b), (a_rows, b_rows) in zip(owners, [*pairs[: len(experts)], pairs[-1]], strict=True):
        named[a], named[b] = a_rows.clone(), b_rows.T.contiguous().clone()
    return named


def _kaiming_uniform(rank: int, d_in: int, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(d_in)
    return torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator)


def new_shared(shapes: Shapes, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Fresh shared experts (a plain LoRA) for all modules: A Kaiming-uniform as in LoRA, B zero."""
    named: dict[str, Tensor] = {}
    for module, (d_in, d_out) in sorted(shapes.items()):
        a, b = shared_keys(module)
        named[a], named[b] = _kaiming_uniform(rank, d_in, generator), torch.zeros(d_out, rank)
    return named


def new_pool(shapes: Shapes, rank: int, experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A fresh pool for all modules: token projection, shared expert and `experts` domain experts, each its own draw."""
    named = new_shared(shapes, rank, generator)
    for module, (d_in, d_out) in sorted(shapes.items()):
        named[router_key(module)] = _kaiming_uniform(rank, d_in, generator)
        for expert in range(experts):
            a, b = expert_keys(module, expert)
            named[a], named[b] = _kaiming_uniform(rank, d_in, generator), torch.zeros(d_out, rank)
    return named
