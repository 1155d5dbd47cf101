"""Modules <-> named tensors. The one place that defines the names of adapter tensors.

Identity is a key, place is a value: domain expert 7 of a module is named the same whoever holds it, so that
aggregation by expert is a mean over whoever returned the key.

    <module>/router/W      token projection W_t  (r, d_in)
    <module>/mixer/W       logits of a learned mixer (g, d_in)
    <module>/expert-07/A   (r, d_in)             <module>/expert-07/B   (d_out, r)
    <module>/shared/A      (r, d_in)             <module>/shared/B      (d_out, r)
    prompt/embedding       virtual tokens (v, d), and of p-tuning prompt/weight-1 .. prompt/bias-3 of its MLP

A mixture is routed by embeddings (router, shared) or by a mixer; one that has neither is weighted instance by instance.
What never trains stands apart, in `Adapter.fixed`:

    <module>/delta         a change of the frozen linear itself (d_out, d_in)
    mixer/own              1 for the client's own expert (n), which a mixer with 2n - 1 logits can choose again
    gate/references        what a client's training prompts look like (S, d), for weights instance by instance
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedamole.errors import RunError
from fedamole.model.amole import AdapterSpec
from fedamole.model.prompt import PromptSpec
from fedamole.received.names import quoted
from fedamole.runs.adapter_folder import MOST_EXPERTS

_EXPERT = re.compile(r"expert-(\d{2}|[1-9]\d{2,4})")

OWN, REFERENCES = "mixer/own", "gate/references"
Shapes = Mapping[str, tuple[int, int]]
"""(d_in, d_out) of every adapted module, by module name."""
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """A trainable addition to a frozen base, as data: what its layers share and its named tensors."""

    spec: AdapterSpec | PromptSpec
    tensors: Tensors
    fixed: Tensors = field(default_factory=dict)
    """What belongs to the model and never trains."""
    frozen: tuple[str, ...] = ()
    """Names of those of `tensors` that this training leaves as they are."""

    def modules(self) -> list[str]:
        """Names of the adapted modules, sorted."""
        return sorted({name.rpartition("/")[0].rpartition("/")[0] for name in self.tensors})

    def kind(self) -> tuple[object, ...]:
        """What adapters must have in common to be in one bank: spec, modules and how those are routed, fixed tensors.

        Clients may hold different experts of a mixture that is routed by embeddings.
        """
        ragged = isinstance(self.spec, AdapterSpec) and self.spec.router == "embedding"
        held = expert_ids(self.tensors).items() if isinstance(self.spec, AdapterSpec) else ()
        modules = tuple((module, bool(ids) if ragged else tuple(ids)) for module, ids in held)
        return self.spec, modules, tuple(sorted(self.fixed))

    def parameters(self) -> int:
        """Count of trainable numbers."""
        return sum(self.trained_sizes().values())

    def trained_sizes(self) -> dict[str, int]:
        """Count of numbers of each trainable tensor, by its name."""
        return {name: tensor.numel() for name, tensor in self.tensors.items() if name not in self.frozen}


def router_key(module: str) -> str:
    """Name of a module's token projection W_t."""
    return f"{module}/router/W"


def mixer_key(module: str) -> str:
    """Name of the weights of a module's learned mixer."""
    return f"{module}/mixer/W"


def delta_key(module: str) -> str:
    """Name of a fixed change of a module's frozen linear."""
    return f"{module}/delta"


def shared_keys(module: str) -> tuple[str, str]:
    """Names of A and B of a module's shared expert."""
    return f"{module}/shared/A", f"{module}/shared/B"


def expert_keys(module: str, expert: int) -> tuple[str, str]:
    """Names of A and B of a module's domain expert with this global id."""
    return f"{module}/expert-{expert:02d}/A", f"{module}/expert-{expert:02d}/B"


def as_expert(lora: Tensors, expert: int) -> dict[str, Tensor]:
    """A LoRA's tensors under the names of a mixture's domain expert with this id."""
    named = {}
    for name, tensor in lora.items():
        module, _, factor = name.rpartition("/shared/")
        named[f"{module}/expert-{expert:02d}/{factor}"] = tensor
    return named


def expert_ids(tensors: Iterable[str]) -> dict[str, list[int]]:
    """Global ids of the domain experts present, sorted, for every module that is present.

    Raises RunError for a name that `expert_keys` does not make, or an id that is too large.
    """
    found: dict[str, set[int]] = {}
    for name in tensors:
        module, _, rest = name.partition("/")
        owner = rest.partition("/")[0]
        ids = found.setdefault(module, set())
        if owner.startswith("expert-"):
            match = _EXPERT.fullmatch(owner)
            if match is None or int(match[1]) >= MOST_EXPERTS:
                raise RunError(f"{quoted(name)} is no tensor of an expert: ids run from 00 to {MOST_EXPERTS - 1}")
            ids.add(int(match[1]))
    return {module: sorted(ids) for module, ids in sorted(found.items())}


def stack(tensors: Tensors, module: str, experts: list[int], room: int | None = None) -> tuple[Tensor, Tensor]:
    """Stack one module's tensors into (down, up) as its layer reads them for one client.

    `room` is the number of domain experts to leave room for (left out: as many as there are); it is filled with zeros.
    """
    keys = [expert_keys(module, expert) for expert in experts]
    has_shared = shared_keys(module)[0] in tensors
    last = [shared_keys(module)] if has_shared else []
    first = [name for name in (router_key(module), mixer_key(module)) if experts and name in tensors]
    some = tensors[(keys + last)[0][0]]
    empty = 0 if room is None else (room - len(experts)) * len(some)
    rows = [*(tensors[a] for a, _ in keys), some.new_zeros(empty, some.shape[1]), *(tensors[a] for a, _ in last)]
    width = len(tensors[(keys + last)[0][1]])
    columns = [*(tensors[b].T for _, b in keys), some.new_zeros(empty, width), *(tensors[b].T for _, b in last)]
    return torch.cat([*(tensors[name] for name in first), *rows]), torch.cat(columns)


def unstack(
    down: Tensor, up: Tensor, module: str, experts: list[int], rank: int, router: str = "embedding"
) -> dict[str, Tensor]:
    """Invert `stack`, whatever room it left; every tensor is a copy of its own."""
    pairs = list(zip(down[len(down) - len(up) :].split(rank), up.split(rank), strict=True))
    named: dict[str, Tensor] = {}
    if len(down) > len(up):
        named[router_key(module) if router == "embedding" else mixer_key(module)] = down[: len(down) - len(up)].clone()
    owners = [expert_keys(module, expert) for expert in experts]
    chosen = pairs[: len(experts)]
    if router == "embedding":
        owners, chosen = [*owners, shared_keys(module)], [*chosen, pairs[-1]]
    for (a, b), (a_rows, b_rows) in zip(owners, chosen, strict=True):
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
