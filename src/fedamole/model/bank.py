"""A bank of adapters on one resident base: those of several clients at once, each on its own rows of a batch.

Opening a bank replaces each target linear of the base by a `BankLinear` around it. An empty bank is the bare base.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedamole.errors import BaseModelError, ConfigError
from fedamole.model import packing
from fedamole.model.amole import AdapterSpec
from fedamole.model.base import Base
from fedamole.model.batch import Batch, Ids, TokenPair, collate
from fedamole.model.causality import near
from fedamole.model.continuation import Continuation, continuation_of
from fedamole.model.layers import BankLinear, BankPrompt, EmbeddingSum, Loaded, MeanEmbeddings, Tape
from fedamole.model.params import (
    OWN,
    REFERENCES,
    Adapter,
    Tensors,
    delta_key,
    expert_ids,
    expert_keys,
    shared_keys,
    stack,
    unstack,
)
from fedamole.model.prompt import PROMPT, PromptSpec


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
            layer.eval()  # as the whole base is, always
            setattr(owner, child, layer)
            self.layers[name] = layer
        base.model.get_output_embeddings().register_forward_pre_hook(self._only_wanted)
        self.prompt = BankPrompt(base.model.get_input_embeddings(), self.tape)
        self.spec: AdapterSpec | PromptSpec | None = None
        self.weights, self.gradients = torch.empty(0, 0), torch.empty(0, 0)
        self._adapters: list[Adapter] = []
        self._held: list[dict[str, list[int]]] = []
        self._sizes: dict[str, list[torch.Size]] = {}
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
        self._adapters, self._windows, self._sizes = list(adapters), {}, {}
        self.spec, self.weights, self.gradients = None, torch.empty(0, 0), torch.empty(0, 0)
        if adapters:
            if len({adapter.kind() for adapter in adapters}) > 1:
                raise ValueError("adapters of different kinds cannot share a bank")
            self.spec = adapters[0].spec
            dtype = torch.promote_types(next(iter(adapters[0].tensors.values())).dtype, torch.float32)
            self.weights = torch.stack([self.row(place, one.tensors) for place, one in enumerate(adapters)])
            self.weights = self.weights.to(self.base.device, dtype)
            self._sizes = {
                name: [part.shape for part in parts] for name, parts in self._parts(0, adapters[0].tensors).items()
            }
        self.window(0, len(adapters))

    def _checked(self, adapter: Adapter) -> dict[str, list[int]]:
        """Experts held by module, after making sure that the adapter fits this base."""
        if isinstance(adapter.spec, PromptSpec):
            width, wanted = adapter.tensors[PROMPT].shape[1], self.base.width
            if width != wanted:
                raise BaseModelError(f"the prompt is for embeddings of width {width}, this base's have {wanted}")
            return {PROMPT: []}
        held, spec = expert_ids(adapter.tensors), adapter.spec
        if unknown := sorted(set(held) - set(self.layers)):
            raise BaseModelError(f"the adapter has tensors for {unknown[0]!r}, which this base does not adapt")
        for name, experts in held.items():
            keys = expert_keys(name, experts[0]) if experts else shared_keys(name)
            a, b = (adapter.tensors[key] for key in keys)
            if (a.shape[1], b.shape[0]) != self.base.shapes[name]:
                raise BaseModelError(
                    f"the adapter's {name} is for a linear of {a.shape[1]} x {b.shape[0]}, "
                    f"this base has {self.base.shapes[name]}: it was made for another base"
                )
            if spec.router == "embedding" and 0 < len(experts) < spec.top_k:
                raise ConfigError(
                    f"{name}: {len(experts)} experts held, top_k = {spec.top_k} asked of each token; raise min_experts"
                )
        return held

    def _room(self, name: str) -> int:
        """Most domain experts of any loaded client in a module."""
        return max(len(held[name]) for held in self._held)

    def _parts(self, client: int, tensors: Tensors) -> dict[str, list[Tensor]]:
        """What trains in each layer, of tensors named as those of a client's adapter."""
        if isinstance(self.spec, PromptSpec):
            return {PROMPT: [tensors[name] for name in self.spec.names()]}
        held = self._held[client]
        return {name: [*stack(tensors, name, held[name], self._room(name))] for name in held}

    def row(self, client: int, tensors: Tensors) -> Tensor:
        """Tensors named as those of a client's adapter, laid out like its row of `weights`, (P)."""
        return torch.cat([part.flatten() for parts in self._parts(client, tensors).values() for part in parts])

    def window(self, first: int, last: int) -> None:
        """Let the following forward passes work on the clients `first` .. `last` - 1 alone."""
        if (first, last) not in self._windows:
            self._windows[first, last] = dict(self._views(first, last))
        loaded = self._windows[first, last]
        self.prompt.loaded = loaded.get(PROMPT)
        for name, layer in self.layers.items():
            layer.loaded, layer.spec = loaded.get(name), self.spec

    def _views(self, first: int, last: int) -> Iterator[tuple[str, Loaded]]:
        start = 0
        for name, sizes in self._sizes.items():
            experts = [held[name] for held in self._held[first:last]]
            counts = torch.tensor([len(ids) for ids in experts])
            absent = torch.arange(self._room(name)) >= counts[:, None]
            views, gradients = [], []
            for size in sizes:
                place, start = slice(start, start + size.numel()), start + size.numel()
                views.append(self.weights[first:last, place].unflatten(1, size).detach().requires_grad_())
                if self.gradients.numel():
                    gradients.append(self.gradients[first:last, place].unflatten(1, size))
            device = self.base.device
            hidden = absent.to(device) if bool(absent.any()) else None
            held = counts.to(device, self.weights.dtype)
            delta, own = self._fixed(delta_key(name), first, last), self._fixed(OWN, first, last)
            delta = None if delta is None else delta.transpose(1, 2)
            yield name, Loaded(tuple(views), tuple(gradients), experts, held, hidden, delta, own)

    def _fixed(self, name: str, first: int, last: int) -> Tensor | None:
        """A fixed tensor of some clients, stacked; None where this kind of adapter has none of this name."""
        if last == first or name not in self._adapters[first].fixed:
            return None
        return torch.stack([adapter.fixed[name] for adapter in self._adapters[first:last]]).to(self.base.device)

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
        """Add the gradient of a loss to that of the clients at work.

        What took no part in the loss, such as a base's expert that no token was routed to, gets none.
        """
        places = [place for loaded in self._at_work() for place in loaded.gradients]
        found = torch.autograd.grad(loss, self.parameters(), allow_unused=True)
        for place, gradient in zip(places, found, strict=True):
            if gradient is not None:
                place.add_(gradient)

    def adapter(self, client: int = 0) -> Adapter:
        """Return a loaded client's adapter as data on the CPU."""
        if self.spec is None:
            raise RuntimeError("the bank is empty")
        tensors: dict[str, Tensor] = {}
        for name, loaded in self._views(client, client + 1):
            parts = [part.detach()[0].cpu() for part in loaded.parts]
            if isinstance(self.spec, PromptSpec):
                tensors.update((key, part.clone()) for key, part in zip(self.spec.names(), parts, strict=True))
            else:
                down, up = parts
                tensors.update(unstack(down, up, name, loaded.experts[0], self.spec.rank, self.spec.router))
        return Adapter(self.spec, tensors, self._adapters[client].fixed)

    def parameters(self) -> list[Tensor]:
        """What the modules read of the clients at work, (C, rows, width) each, in the order of the module names."""
        return [part for loaded in self._at_work() for part in loaded.parts]

    def _at_work(self) -> list[Loaded]:
        layers: list[BankLinear | BankPrompt] = [*self.layers.values(), self.prompt]
        return [layer.loaded for layer in layers if layer.loaded is not None]

    def tail_norms(self, first: int) -> Tensor:
        """Sum over the modules of |A[first:]| |B[:, first:]|, Frobenius norms, of each client at work's LoRA, (C)."""
        sums = [
            torch.linalg.vector_norm(down[:, first:], dim=(1, 2)) * torch.linalg.vector_norm(up[:, first:], dim=(1, 2))
            for down, up in (loaded.parts for loaded in self._at_work())
        ]
        return torch.stack(sums).sum(0)

    def prefixed(self, clients: Sequence[Sequence[TokenPair]]) -> list[list[TokenPair]]:
        """(prompt, answer) rows with the loaded prompts' virtual tokens before each."""
        return [[(self.prefix(prompt), answer) for prompt, answer in rows] for rows in clients]

    def prefix(self, prompt: Ids) -> Ids:
        """A prompt with the loaded prompts' virtual tokens before it."""
        return (*self.spec.prefix, *prompt) if isinstance(self.spec, PromptSpec) else prompt

    def last_hidden(self, clients: Sequence[Sequence[Ids]]) -> Tensor:
        """Last hidden states (rows, d) at the ends of each client's prompts, under the first of its experts alone."""
        only_first = torch.tensor([[1.0, 0.0]], device=self.base.device)
        found: list[Tensor] = []
        batch = collate([[(prompt, (0,)) for prompt in part] for part in clients], self.base.pad_id, self.packs)
        with torch.no_grad(), self.reading(batch.to(self.base.device), gates=only_first, hidden=found):
            return found[0].float()

    def gates(self, clients: Sequence[Sequence[Ids]]) -> Tensor | None:
        """Weights (rows, 2) of the two experts for each client's prompts; None where nothing is weighted by instance.

        The first has `instance_weight` times the mean cosine between the prompt's last hidden state and the client's
        references, clamped to 0 .. 1; the second has the rest.
        """
        seen = [one.fixed[REFERENCES].float() for one in self._adapters if REFERENCES in one.fixed]
        if not seen or not isinstance(self.spec, AdapterSpec):
            return None
        # The mean of cosines is the product with the mean of unit vectors, however many references a client has.
        means = torch.stack([F.normalize(rows, dim=1).mean(0) for rows in seen]).to(self.base.device)
        owner = [client for client, part in enumerate(clients) for _ in part]
        near = (F.normalize(self.last_hidden(clients), dim=1) * means[owner]).sum(1)
        first = (near * self.spec.instance_weight).clamp(0, 1)
        return torch.stack([first, 1 - first], dim=1)

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
        shared = {
            "segments": batch.segments,
            "counted": batch.not_padding,
            "keys": batch.dropout_keys,
            "predicting": batch.logit_indices,
        }
        options = {} if batch.sequences is None else {"position_ids": batch.positions, "sequences": batch.sequences}
        gates = None if "gates" in fields else self.gates(batch.prompts)
        if gates is not None:
            fields["gates"] = gates if batch.sequences is None else gates.index_select(0, batch.sequences.owner)
        try:
            if options:
                config._attn_implementation = packing.ATTENTION
            with self.recording(**shared, **fields):
                yield self.base.model(input_ids=batch.ids, use_cache=False, **options).logits.squeeze(0)
        finally:
            config._attn_implementation = attention

    def _only_wanted(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Keep the output head from logits that nobody reads, the larger part of a prompt's cost on a small base."""
        if self.tape.logit_indices is None:
            return None
        hidden = inputs[0].flatten(0, 1).index_select(0, self.tape.logit_indices)
        if self.tape.hidden is not None:
            self.tape.hidden.append(hidden)
        return (hidden.unsqueeze(0),)

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
        return near(found[1], found[0], self.base.model.dtype)

    @cached_property
    def continuation(self) -> Continuation:
        """How this base generates; found out at the first use, without the adapters."""
        for layer in self.layers.values():
            layer.loaded = None
        self.prompt.loaded = None
        try:
            return continuation_of(self.base)
        finally:
            self.window(0, self.clients)

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
