"""A bank of adapters on one resident base: the base stays in place, the adapters on it are exchanged.

Opening a bank replaces each target linear of the base by a `BankLinear` around it. An empty bank is the bare base.
What the layers of one forward pass share (padding, dropout, what to collect) travels on a `Tape`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedamole.errors import BaseModelError
from fedamole.model.amole import AdapterSpec, Drop, Routing, amole_linear, balance_loss
from fedamole.model.base import Base
from fedamole.model.params import Adapter, expert_ids, stack, unstack


@dataclass
class Tape:
    """What one forward pass tells the layers, and what they write down for it."""

    counted: Tensor | None = None
    """(tokens) of bool: the tokens that are not padding; needed while something is collected."""
    dropout_seed: int | None = None
    """Seed of this step's dropout masks; None switches dropout off. A layer's mask depends on this seed and the
    layer alone, so gradient checkpointing redraws the same mask when it repeats a forward."""
    balance: list[Tensor] | None = None
    """Balance losses of the modules, appended in the forward pass; None when not wanted. Read it before the
    backward pass: gradient checkpointing appends to it again there."""
    embeddings: "dict[str, EmbeddingSum] | None" = None
    """Sums of router embeddings by module; None when not wanted."""


@dataclass
class EmbeddingSum:
    """Running sums over tokens of one module's router embeddings."""

    token: Tensor
    """sum of W_t x, (r)."""
    experts: Tensor
    """sums of A_i x, (n, r)."""


@dataclass(frozen=True)
class MeanEmbeddings:
    """Mean router embeddings of one module over a client's embedding split (step 3 of a round)."""

    token: Tensor
    """t_c (r), float32."""
    experts: dict[int, Tensor] = field(default_factory=dict)
    """e_{i,c} (r), float32, by global expert id."""


class BankLinear(nn.Module):
    """A frozen linear (nn.Linear, Conv1D or quantised) with room for one adapter."""

    down: nn.Parameter | None
    up: nn.Parameter | None

    def __init__(self, base_layer: nn.Module, name: str, index: int, tape: Tape) -> None:
        """Wrap the module `name`, the `index`-th of its base."""
        super().__init__()
        self.base_layer = base_layer
        self.name, self.index, self.tape = name, index, tape
        self.spec: AdapterSpec | None = None
        self.experts: list[int] = []
        self.register_parameter("down", None)
        self.register_parameter("up", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the base layer's output, plus the adapter's where one is loaded."""
        base_out: Tensor = self.base_layer(x)
        if self.spec is None or self.down is None or self.up is None:
            return base_out
        y, routing = amole_linear(x, base_out, self.down, self.up, self.spec, self._drop(x.device))
        if routing is not None:
            self._collect(routing)
        return y

    def _drop(self, device: torch.device) -> Drop | None:
        seed = self.tape.dropout_seed
        if seed is None or self.spec is None or self.spec.dropout == 0:
            return None
        keep = 1 - self.spec.dropout
        generator = torch.Generator(device).manual_seed((seed + 7919 * self.index) % 2**63)

        def drop(values: Tensor) -> Tensor:
            mask = torch.empty_like(values, dtype=torch.float32).bernoulli_(keep, generator=generator)
            return values * (mask / keep).to(values.dtype)

        return drop

    def _collect(self, routing: Routing) -> None:
        tape = self.tape
        if tape.counted is None:
            return
        if tape.balance is not None:
            tape.balance.append(balance_loss(routing, tape.counted))
        if tape.embeddings is not None:
            weight = tape.counted.float()
            token = weight @ routing.token_embedding.float()
            experts = torch.einsum("t,tnr->nr", weight, routing.expert_embeddings.float())
            previous = tape.embeddings.get(self.name)
            if previous is not None:
                token, experts = token + previous.token, experts + previous.experts
            tape.embeddings[self.name] = EmbeddingSum(token, experts)


class Bank:
    """One resident base with room for one client's adapter at a time."""

    def __init__(self, base: Base) -> None:
        """Open a bank on `base`: its target linears are wrapped in place, their weights untouched."""
        self.base, self.tape = base, Tape()
        self.layers: dict[str, BankLinear] = {}
        for index, name in enumerate(sorted(base.shapes)):
            parent, _, child = name.rpartition(".")
            owner = base.model.get_submodule(parent)
            layer = BankLinear(getattr(owner, child), name, index, self.tape)
            setattr(owner, child, layer)
            self.layers[name] = layer
        self._spec: AdapterSpec | None = None

    def load(self, adapter: Adapter | None) -> None:
        """Put copies of an adapter's tensors into the bank; None empties it (the bare base).

        Tensors become trainable parameters in at least float32 on the base's device. Modules that this base does
        not adapt, or shapes that do not fit, are a BaseModelError.
        """
        held = {} if adapter is None else expert_ids(adapter.tensors)
        if unknown := sorted(set(held) - set(self.layers)):
            raise BaseModelError(f"the adapter has tensors for {unknown[0]!r}, which this base does not adapt")
        for name, layer in self.layers.items():
            layer.spec, layer.down, layer.up = None, None, None
            if adapter is None or name not in held:
                continue
            down, up = stack(adapter.tensors, name, held[name])
            if (down.shape[1], up.shape[1]) != self.base.shapes[name]:
                raise BaseModelError(
                    f"the adapter's {name} is for a linear of {down.shape[1]} x {up.shape[1]}, "
                    f"this base has {self.base.shapes[name]}: it was made for another base"
                )
            precise = torch.promote_types(down.dtype, torch.float32)
            layer.down = nn.Parameter(down.to(self.base.device, precise, copy=True))
            layer.up = nn.Parameter(up.to(self.base.device, precise, copy=True))
            layer.spec, layer.experts = adapter.spec, held[name]
        self._spec = None if adapter is None else adapter.spec

    def adapter(self) -> Adapter:
        """Return the loaded adapter as data on the CPU."""
        if self._spec is None:
            raise RuntimeError("the bank is empty")
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            if layer.spec is not None and layer.down is not None and layer.up is not None:
                down, up = layer.down.detach().cpu(), layer.up.detach().cpu()
                tensors.update(unstack(down, up, name, layer.experts, layer.spec.rank))
        return Adapter(self._spec, tensors)

    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the loaded adapter, in the order of the module names."""
        both = [parameter for layer in self.layers.values() for parameter in (layer.down, layer.up)]
        return [parameter for parameter in both if parameter is not None]

    @contextmanager
    def recording(self, **fields: object) -> Iterator[Tape]:
        """Set fields of the tape for the forward passes inside the block and clear them afterwards."""
        try:
            for key, value in fields.items():
                setattr(self.tape, key, value)
            yield self.tape
        finally:
            for key, value in vars(Tape()).items():
                setattr(self.tape, key, value)

    def logits(self, ids: Tensor) -> Tensor:
        """Next-token logits (B, L, V) of right-padded ids (B, L); padding on the right needs no attention mask."""
        logits: Tensor = self.base.model(input_ids=ids, use_cache=False).logits
        return logits

    def mean_embeddings(self, tape: Tape, tokens: int) -> dict[str, MeanEmbeddings]:
        """Turn the sums a tape has collected over `tokens` tokens into means by module."""
        means: dict[str, MeanEmbeddings] = {}
        for name, total in (tape.embeddings or {}).items():
            rows = (total.experts / tokens).cpu()
            ids = self.layers[name].experts
            means[name] = MeanEmbeddings((total.token / tokens).cpu(), dict(zip(ids, rows, strict=True)))
        return means
