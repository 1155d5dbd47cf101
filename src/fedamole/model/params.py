"""The named tensors of an adapter: tensor names, stacking for the layers, and fresh initial values.

This module alone defines the names. An expert's name does not depend on the client that holds it, so aggregating an
expert is a mean over the clients that returned its name.

    <module>/router/W      token projection W_t of an EmbeddingRouter (r, d_in)
    <module>/mixer/W       weights of a LearnedRouter with g logits (g, d_in)
    <module>/expert-07/A   (r, d_in)             <module>/expert-07/B   (d_out, r)
    <module>/shared/A      (r, d_in)             <module>/shared/B      (d_out, r)
    prompt/embedding       virtual tokens (v, d); p-tuning adds prompt/weight-1 .. prompt/bias-3 of its MLP

`Adapter.fixed` holds tensors that are never trained:

    <module>/delta         change of the frozen linear itself (d_out, d_in)
    mixer/own              1 for the client's own expert (n), for a LearnedRouter with extra logits for it
    gate/references        hidden states of a few training prompts (S, d), for InstanceWeights
    virtual/vectors        embeddings (V, d) of the virtual tokens in rows of synthetic examples; row i is that of the
                           token id -1 - i. They belong to the rows, so a bank does not return them with the adapter
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fedamole.errors import RunError
from fedamole.model.amole import AdapterSpec, EmbeddingRouter
from fedamole.model.mixer import LearnedRouter
from fedamole.model.prompt import PromptSpec
from fedamole.model.router import Router
from fedamole.received.names import quoted
from fedamole.runs.adapter_folder import MOST_EXPERTS

_EXPERT = re.compile(r"expert-(\d{2}|[1-9]\d{2,4})")

OWN, REFERENCES, VECTORS = "mixer/own", "gate/references", "virtual/vectors"
Shapes = Mapping[str, tuple[int, int]]
"""(d_in, d_out) of every adapted module, by module name."""
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """A trainable addition to a frozen base: its settings and its named tensors."""

    spec: AdapterSpec | PromptSpec
    tensors: Tensors
    fixed: Tensors = field(default_factory=dict)
    """Tensors that belong to the model and are never trained."""
    frozen: tuple[str, ...] = ()
    """Names of those `tensors` that are not trained this time."""

    @cached_property
    def experts(self) -> dict[str, list[int]]:
        """Sorted global ids of the domain experts of each module."""
        return expert_ids(self.tensors)

    def modules(self) -> list[str]:
        """Return the sorted names of the adapted modules."""
        return sorted({name.rpartition("/")[0].rpartition("/")[0] for name in self.tensors})

    def kind(self) -> tuple[object, ...]:
        """Return a key that is equal for adapters that can be loaded together.

        It consists of the spec, the experts of each module and the names of the fixed tensors. With an
        `EmbeddingRouter` clients may hold different experts, but not none where others hold some.
        """
        if isinstance(self.spec, PromptSpec):
            return self.spec, (), tuple(sorted(self.fixed))
        different = self.spec.router.allows_different_experts
        modules = tuple((module, bool(ids) if different else tuple(ids)) for module, ids in self.experts.items())
        return self.spec, modules, tuple(sorted(self.fixed))

    def parameters(self) -> int:
        """Return the number of trainable parameters."""
        return sum(self.trained_sizes().values())

    def trained_sizes(self) -> dict[str, int]:
        """Return the number of parameters of each trainable tensor, by name."""
        return {name: tensor.numel() for name, tensor in self.tensors.items() if name not in self.frozen}


class HasKind(Protocol):
    """An adapter, or a request to train one."""

    def kind(self) -> tuple[object, ...]:
        """Return a key that is equal for those that can be loaded or trained together."""


def indices_by_kind(entries: Mapping[int, HasKind | None]) -> list[list[int]]:
    """Group the indices of adapters, or of requests to train them, by kind; None is the untuned base."""
    groups: dict[object, list[int]] = {}
    for i, entry in entries.items():
        groups.setdefault(None if entry is None else entry.kind(), []).append(i)
    return list(groups.values())


def router_key(module: str) -> str:
    """Name of a module's token projection W_t."""
    return f"{module}/{EmbeddingRouter.tensor_name}"


def mixer_key(module: str) -> str:
    """Name of the weights of a module's learned router."""
    return f"{module}/{LearnedRouter.tensor_name}"


def delta_key(module: str) -> str:
    """Name of a fixed change of a module's frozen linear."""
    return f"{module}/delta"


def shared_keys(module: str) -> tuple[str, str]:
    """Names of A and B of a module's shared expert."""
    return f"{module}/shared/A", f"{module}/shared/B"


def expert_name(expert: int) -> str:
    """Name of the domain expert with this global id, such as expert-07."""
    return f"expert-{expert:02d}"


def expert_keys(module: str, expert: int) -> tuple[str, str]:
    """Names of A and B of a module's domain expert with this global id."""
    return f"{module}/{expert_name(expert)}/A", f"{module}/{expert_name(expert)}/B"


def layer_of(module: str) -> str:
    """Return a module's name up to the number of its layer, such as model.layers.3; without a number all of it."""
    match = re.match(r".*?\d+", module)
    return match.group() if match else module


def layers_of(modules: Iterable[str]) -> list[str]:
    """Return the layers of these modules (`layer_of`), each once, in their order: layer 10 comes after layer 9."""
    return sorted({layer_of(name) for name in modules}, key=_natural_order)


def _natural_order(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def is_expert_key(name: str) -> bool:
    """Return whether a tensor of a mixture is a factor of a domain expert."""
    return "/expert-" in name


def as_expert(lora: Tensors, expert: int) -> dict[str, Tensor]:
    """Rename the tensors of a plain LoRA to those of the domain expert with this id."""
    named = {}
    for name, tensor in lora.items():
        module, _, factor = name.rpartition("/shared/")
        named[f"{module}/{expert_name(expert)}/{factor}"] = tensor
    return named


def expert_as_lora(tensors: Tensors, expert: int) -> dict[str, Tensor]:
    """Return the tensors of one domain expert, which every module holds, renamed to those of a plain LoRA."""
    named: dict[str, Tensor] = {}
    for module in expert_ids(tensors):
        named.update(zip(shared_keys(module), (tensors[key] for key in expert_keys(module, expert)), strict=True))
    return named


def expert_ids(tensors: Iterable[str]) -> dict[str, list[int]]:
    """Return the sorted global ids of the domain experts of each module, from tensor names.

    Raises RunError for a name that `expert_keys` does not produce, or an id that is too large.
    """
    experts: dict[str, set[int]] = {}
    for name in tensors:
        module, _, rest = name.partition("/")
        owner = rest.partition("/")[0]
        ids = experts.setdefault(module, set())
        if owner.startswith("expert-"):
            match = _EXPERT.fullmatch(owner)
            if match is None or int(match[1]) >= MOST_EXPERTS:
                raise RunError(f"{quoted(name)} is no tensor of an expert: ids run from 00 to {MOST_EXPERTS - 1}")
            ids.add(int(match[1]))
    return {module: sorted(ids) for module, ids in sorted(experts.items())}


def stack(tensors: Tensors, module: str, experts: list[int], slots: int = 0) -> tuple[Tensor, Tensor]:
    """Stack one client's tensors of a module into (down, up), as `amole` and `mixer` define them.

    `slots` is the number of slots for domain experts, at least one per expert; empty slots are filled with zeros.
    """
    router = [tensors[name] for name in (router_key(module), mixer_key(module)) if experts and name in tensors]
    keys = [expert_keys(module, expert) for expert in experts]
    keys += [shared_keys(module)] if shared_keys(module)[0] in tensors else []
    pairs = [(tensors[a], tensors[b].T) for a, b in keys]
    empty = [(torch.zeros_like(pairs[0][0]), torch.zeros_like(pairs[0][1]))] * (slots - len(experts))
    pairs[len(experts) : len(experts)] = empty
    return torch.cat([*router, *(a for a, _ in pairs)]), torch.cat([b for _, b in pairs])


def unstack(
    down: Tensor, up: Tensor, module: str, experts: list[int], rank: int, router: Router | None = None
) -> dict[str, Tensor]:
    """Invert `stack`, with or without empty slots; every tensor is a copy. The default is an `EmbeddingRouter`."""
    router = EmbeddingRouter() if router is None else router
    router_rows, shared = len(down) - len(up), int(router.has_shared_expert)
    named = {f"{module}/{router.tensor_name}": down[:router_rows].clone()} if router_rows else {}
    pairs = list(zip(down[router_rows:].split(rank), up.split(rank), strict=True))
    keys = [*(expert_keys(module, expert) for expert in experts), *[shared_keys(module)] * shared]
    stacked = pairs[: len(experts)] + pairs[-1:] * shared
    for (a, b), (a_rows, b_rows) in zip(keys, stacked, strict=True):
        named[a], named[b] = a_rows.clone(), b_rows.T.contiguous().clone()
    return named


def _kaiming_uniform(rank: int, d_in: int, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(d_in)
    return torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator)


def new_shared(shapes: Shapes, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Initialise a plain LoRA (shared experts only) for all modules: A Kaiming-uniform as in LoRA, B zero."""
    named: dict[str, Tensor] = {}
    for module, (d_in, d_out) in sorted(shapes.items()):
        a, b = shared_keys(module)
        named[a], named[b] = _kaiming_uniform(rank, d_in, generator), torch.zeros(d_out, rank)
    return named


def new_pool(shapes: Shapes, rank: int, experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Initialise token projections, shared experts and `experts` domain experts for all modules, independently."""
    named = new_shared(shapes, rank, generator)
    for module, (d_in, d_out) in sorted(shapes.items()):
        named[router_key(module)] = _kaiming_uniform(rank, d_in, generator)
        for expert in range(experts):
            a, b = expert_keys(module, expert)
            named[a], named[b] = _kaiming_uniform(rank, d_in, generator), torch.zeros(d_out, rank)
    return named
