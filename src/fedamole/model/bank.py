"""A bank of adapters on one resident base: those of several clients at once, each on its own rows of a batch.

Opening a bank replaces each target linear of the base by a `BankLinear` around it. An empty bank is the bare base.
What the layers of one forward pass share (whose rows are whose, padding, dropout, what to collect) is on a `Tape`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedamole.errors import BaseModelError, ConfigError
from fedamole.model import packing
from fedamole.model.amole import AdapterSpec, Drop, Routing, amole_linear, balance_loss
from fedamole.model.base import Base
from fedamole.model.batch import Batch, collate
from fedamole.model.dropout import column_keys, dropped
from fedamole.model.params import Adapter, Tensors, expert_ids, shared_keys, stack, unstack
from fedamole.model.segments import Shares, totals


@dataclass
class Tape:
    """What one forward pass tells the layers, and what they write down for it."""

    shares: Shares | None = None
    """Rows (of tokens, or of whole sequences) of each client; None where one client has all."""
    counted: Tensor | None = None
    """(tokens) of bool: the tokens that are not padding; None where all count."""
    keys: Tensor | None = None
    """(tokens): keys of this step's dropout masks; None switches dropout off."""
    predicting: Tensor | None = None
    """(K): places whose logits are wanted; None = all."""
    balance: list[Tensor] | None = None
    """Balance losses (C) of the modules, appended in the forward pass; None when not wanted. Read it before the
    backward pass: gradient checkpointing appends to it again there."""
    embeddings: "dict[str, EmbeddingSum] | None" = None
    """Sums of router embeddings by module; None when not wanted."""


@dataclass
class EmbeddingSum:
    """Running sums over tokens of one module's router embeddings."""

    token: Tensor
    """sums of W_t x, (C, r)."""
    experts: Tensor
    """sums of A_i x, (C, n, r)."""


@dataclass(frozen=True)
class MeanEmbeddings:
    """Mean router embeddings of one module over a client's embedding split (step 3 of a round)."""

    token: Tensor
    """t_c (r), float32."""
    experts: dict[int, Tensor] = field(default_factory=dict)
    """e_{i,c} (r), float32, by global expert id."""


@dataclass
class Loaded:
    """The adapters of C clients in one module, stacked as `amole_linear` reads them."""

    down: Tensor
    up: Tensor
    gradients: tuple[Tensor, ...]
    """Where the gradients of down and up are added up, once they are asked for."""
    experts: list[list[int]]
    """Global ids of the domain experts of each client."""
    held: Tensor
    """Their numbers, (C)."""
    absent: Tensor | None
    """(C, n) of bool: room for experts that a client does not hold; None where all hold n."""


class BankLinear(nn.Module):
    """A frozen linear (nn.Linear, Conv1D or quantised) with room for adapters."""

    columns: Tensor

    def __init__(self, base_layer: nn.Module, name: str, index: int, width: int, tape: Tape) -> None:
        """Wrap the module `name` of this input width, the `index`-th of its base."""
        super().__init__()
        self.base_layer, self.name, self.index, self.tape = base_layer, name, index, tape
        self.spec: AdapterSpec | None = None
        self.loaded: Loaded | None = None
        self.register_buffer("columns", column_keys(index, width), persistent=False)
        self._rank_columns: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Return the base layer's output, plus each client's adapter's on its rows where adapters are loaded."""
        base_out: Tensor = self.base_layer(x)
        if self.loaded is None or self.spec is None:
            return base_out
        held, tokens = self.loaded, x.numel() // x.shape[-1]
        shares = Shares((tokens,), x.device) if self.tape.shares is None else self.tape.shares.of(tokens)
        drop = self._drop() if self.tape.keys is not None and self.spec.dropout else None
        y, routing = amole_linear(x, base_out, held.down, held.up, self.spec, drop, shares, held.absent)
        if routing is not None:
            self._collect(routing, shares, held)
        return y

    def _drop(self) -> Drop:
        spec, keys = self.spec, self.tape.keys
        assert spec is not None and keys is not None  # noqa: PT018 - for the type checker

        def drop(values: Tensor) -> Tensor:
            columns = self.columns
            if spec.dropout_kind == "rank":
                columns = self._columns_of_ranks(values.shape[1], spec.rank)
            return values.masked_fill(dropped(keys, columns, spec.dropout), 0)

        return drop

    def _columns_of_ranks(self, width: int, rank: int) -> Tensor:
        """Keys of the experts' activations: the shared expert, last after room that varies, takes the first of them."""
        if width not in self._rank_columns:
            keys = column_keys(self.index, width).roll(-rank)
            self._rank_columns[width] = keys.to(self.columns.device)
        return self._rank_columns[width]

    def _collect(self, routing: Routing, shares: Shares, held: Loaded) -> None:
        tape = self.tape
        if tape.balance is not None:
            tape.balance.append(balance_loss(routing, tape.counted, shares, held.held))
        if tape.embeddings is not None:
            token, experts = routing.token_embedding.float(), routing.expert_embeddings.float()
            if tape.counted is not None:
                token, experts = token * tape.counted[:, None], experts * tape.counted[:, None, None]
            found = EmbeddingSum(totals(token, shares), totals(experts, shares))
            previous = tape.embeddings.get(self.name)
            if previous is not None:
                found = EmbeddingSum(previous.token + found.token, previous.experts + found.experts)
            tape.embeddings[self.name] = found


class Bank:
    """One resident base with room for the adapters of a group of clients.

    All numbers of a client's adapter lie in one row of `weights` (C, P), so that clipping, checking and the optimiser
    see one tensor per client; what the modules read are views into it.
    """

    def __init__(self, base: Base) -> None:
        """Open a bank on `base`: its target linears are wrapped in place, their weights untouched."""
        self.base, self.tape = base, Tape()
        self.layers: dict[str, BankLinear] = {}
        for index, name in enumerate(sorted(base.shapes)):
            parent, _, child = name.rpartition(".")
            owner = base.model.get_submodule(parent)
            layer = BankLinear(getattr(owner, child), name, index, base.shapes[name][0], self.tape).to(base.device)
            setattr(owner, child, layer)
            self.layers[name] = layer
        base.model.get_output_embeddings().register_forward_pre_hook(self._only_wanted)
        self.spec: AdapterSpec | None = None
        self.weights, self.gradients = torch.empty(0, 0), torch.empty(0, 0)
        self._held: list[dict[str, list[int]]] = []
        self._windows: dict[tuple[int, int], dict[str, Loaded]] = {}
        self.at_once = 2**31
        """Most clients in one training pass; halved where memory runs out."""
        self.packs = self._try_packing()

    @property
    def clients(self) -> int:
        """C, how many adapters are loaded."""
        return len(self._held)

    def load(self, adapters: Sequence[Adapter]) -> None:
        """Put copies of the adapters of C clients into the bank; none of them empties it (the bare base).

        Tensors become trainable in at least float32 on the base's device. Adapters must be of one kind. Modules that
        this base does not adapt, or shapes that do not fit, are a BaseModelError, too few experts a ConfigError.
        """
        self._held = [self._checked(adapter) for adapter in adapters]
        self._windows = {}
        self.spec, self.weights, self.gradients = None, torch.empty(0, 0), torch.empty(0, 0)
        if adapters:
            if len({adapter.kind() for adapter in adapters}) > 1:
                raise ValueError("adapters of different kinds cannot share a bank")
            self.spec = adapters[0].spec
            dtype = torch.promote_types(next(iter(adapters[0].tensors.values())).dtype, torch.float32)
            rows = [self._row(adapter.tensors, held) for adapter, held in zip(adapters, self._held, strict=True)]
            self.weights = torch.stack(rows).to(self.base.device, dtype)
        self.window(0, len(adapters))

    def _checked(self, adapter: Adapter) -> dict[str, list[int]]:
        """Experts held by module, after making sure that the adapter fits this base."""
        held, spec = expert_ids(adapter.tensors), adapter.spec
        if unknown := sorted(set(held) - set(self.layers)):
            raise BaseModelError(f"the adapter has tensors for {unknown[0]!r}, which this base does not adapt")
        for name, experts in held.items():
            a, b = (adapter.tensors[key] for key in shared_keys(name))
            if (a.shape[1], b.shape[0]) != self.base.shapes[name]:
                raise BaseModelError(
                    f"the adapter's {name} is for a linear of {a.shape[1]} x {b.shape[0]}, "
                    f"this base has {self.base.shapes[name]}: it was made for another base"
                )
            if 0 < len(experts) < spec.top_k:
                raise ConfigError(
                    f"{name}: {len(experts)} experts held, top_k = {spec.top_k} asked of each token; raise min_experts"
                )
        return held

    def _room(self, name: str) -> int:
        """Most domain experts of any loaded client in a module."""
        return max(len(held[name]) for held in self._held)

    def _row(self, tensors: Tensors, held: dict[str, list[int]]) -> Tensor:
        stacked = [stack(tensors, name, held[name], self._room(name)) for name in held]
        return torch.cat([part.flatten() for pair in stacked for part in pair])

    def window(self, first: int, last: int) -> None:
        """Let the following forward passes work on the clients `first` .. `last` - 1 alone."""
        if (first, last) not in self._windows:
            self._windows[first, last] = dict(self._views(first, last))
        loaded = self._windows[first, last]
        for name, layer in self.layers.items():
            layer.loaded, layer.spec = loaded.get(name), self.spec

    def _views(self, first: int, last: int) -> Iterator[tuple[str, Loaded]]:
        if self.spec is None:
            return
        start, r = 0, self.spec.rank
        for name in self._held[0]:
            room, (d_in, d_out) = self._room(name), self.base.shapes[name]
            experts = [held[name] for held in self._held[first:last]]
            counts = torch.tensor([len(ids) for ids in experts])
            absent = torch.arange(room) >= counts[:, None]
            views, gradients = [], []
            for rows, width in (((room + 2 if room else 1) * r, d_in), ((room + 1) * r, d_out)):
                place, start = slice(start, start + rows * width), start + rows * width
                views.append(self.weights[first:last, place].unflatten(1, (rows, width)).detach().requires_grad_())
                if self.gradients.numel():
                    gradients.append(self.gradients[first:last, place].unflatten(1, (rows, width)))
            device = self.base.device
            hidden = absent.to(device) if bool(absent.any()) else None
            held = counts.to(device, self.weights.dtype)
            yield name, Loaded(views[0], views[1], tuple(gradients), experts, held, hidden)

    def trainable(self) -> list[Tensor]:
        """Return one flat tensor (P) per client for an optimiser; `backward` adds to its `.grad`, zero at first."""
        self.gradients = torch.zeros_like(self.weights)
        self._windows = {}
        self.window(0, self.clients)
        rows = [row.detach().requires_grad_() for row in self.weights]
        for row, gradient in zip(rows, self.gradients, strict=True):
            row.grad = gradient
        return rows

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to that of the clients at work."""
        places = [place for layer in self.layers.values() if layer.loaded for place in layer.loaded.gradients]
        for place, gradient in zip(places, torch.autograd.grad(loss, self.parameters()), strict=True):
            place.add_(gradient)

    def adapter(self, client: int = 0) -> Adapter:
        """Return a loaded client's adapter as data on the CPU."""
        if self.spec is None:
            raise RuntimeError("the bank is empty")
        tensors: dict[str, Tensor] = {}
        for name, loaded in self._views(client, client + 1):
            down, up = loaded.down.detach()[0].cpu(), loaded.up.detach()[0].cpu()
            tensors.update(unstack(down, up, name, loaded.experts[0], self.spec.rank))
        return Adapter(self.spec, tensors)

    def parameters(self) -> list[Tensor]:
        """What the modules read of the clients at work, (C, rows, width) each, in the order of the module names."""
        found = [layer.loaded for layer in self.layers.values()]
        return [tensor for loaded in found if loaded is not None for tensor in (loaded.down, loaded.up)]

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

    @contextmanager
    def reading(self, batch: Batch, **fields: object) -> Iterator[Tensor]:
        """Logits (K, V) at the places of a batch that predict an answer token.

        A backward pass belongs inside the block: gradient checkpointing repeats the forward pass there.
        """
        config = self.base.model.config.get_text_config()
        attention = config._attn_implementation
        shared = {"shares": batch.shares, "counted": batch.counted, "keys": batch.keys, "predicting": batch.predicting}
        options = {} if batch.sequences is None else {"position_ids": batch.positions, "sequences": batch.sequences}
        try:
            if options:
                config._attn_implementation = packing.ATTENTION
            with self.recording(**shared, **fields):
                yield self.base.model(input_ids=batch.ids, use_cache=False, **options).logits.squeeze(0)
        finally:
            config._attn_implementation = attention

    def _only_wanted(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Keep the output head from logits that nobody reads, the larger part of a prompt's cost on a small base."""
        if self.tape.predicting is None:
            return None
        return (inputs[0].flatten(0, 1).index_select(0, self.tape.predicting).unsqueeze(0),)

    def _try_packing(self) -> bool:
        """Find out whether packed sequences give this base's own logits: not where more than attention mixes tokens."""
        config = self.base.model.config.get_text_config()
        if config._attn_implementation != "sdpa" or getattr(config, "attention_chunk_size", None):
            return False  # sequences as short as those below would not show attention in chunks
        packing.register()
        rows = [((1, 2, 3, 4), (5, 6)), ((7,), (8, 9, 10))]
        found = []
        with torch.no_grad():
            for packed in (False, True):
                batch = collate([rows], self.base.pad_id, packed).to(self.base.device)
                try:
                    with self.reading(batch) as logits:
                        found.append(logits.float())
                except (NotImplementedError, TypeError):
                    return False
        precise = self.base.model.dtype in (torch.float32, torch.float64)
        apart = (found[0] - found[1]).abs().max() / found[0].abs().max()
        return bool(apart <= (1e-4 if precise else 0.03))

    def mean_embeddings(
        self, collected: Mapping[str, EmbeddingSum], tokens: Sequence[int]
    ) -> list[dict[str, MeanEmbeddings]]:
        """Turn the sums that forward passes have collected over each client's `tokens` tokens into means by module."""
        means: list[dict[str, MeanEmbeddings]] = [{} for _ in self._held]
        for name, total in collected.items():
            sums = total.token.cpu(), total.experts.cpu()
            for client, held in enumerate(self._held):
                rows = sums[1][client, : len(held[name])] / tokens[client]
                means[client][name] = MeanEmbeddings(
                    sums[0][client] / tokens[client], dict(zip(held[name], rows, strict=True))
                )
        return means
