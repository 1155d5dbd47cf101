"""A bank of adapters: one base in memory that runs the adapters of several clients in the same forward pass.

Each client's rows of a batch go through its own adapter. An empty bank is the untuned base. `layers` and
`prompt_layer` apply the adapters, `adapter_store` holds their tensors, `forward_context` the inputs of a pass, and
`packing` decides how sequences are laid out.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedamole.model.adapter_store import AdapterStore
from fedamole.model.amole import AdapterSpec
from fedamole.model.base import Base
from fedamole.model.batch import Batch, Ids, TokenPair, collate
from fedamole.model.continuation import Continuation, continuation_of
from fedamole.model.forward_context import ActiveContext, ForwardContext
from fedamole.model.layers import BankLinear, MeanEmbeddings, install_layers
from fedamole.model.media import with_prefix
from fedamole.model.mixer import InstanceWeights
from fedamole.model.packing import packed_attention_enabled, supports_packing
from fedamole.model.params import Adapter
from fedamole.model.prompt import PROMPT, PromptSpec
from fedamole.model.prompt_layer import PromptLayer
from fedamole.model.stacked_adapters import StackedAdapters
from fedamole.model.vision import check_images


class Bank:
    """A base with the adapters of C clients; forward passes run those of the selected clients (at first: all)."""

    def __init__(self, base: Base) -> None:
        """Install adapter layers in `base`, in place; its weights do not change."""
        self.base, self.active = base, ActiveContext()
        self.enter = self.active.enter
        """Context manager: uses a `ForwardContext` for the forward passes of the base inside the block."""
        self.layers: dict[str, BankLinear] = install_layers(base, self.active)
        self.prompt_layer = PromptLayer(base.model.get_input_embeddings(), self.active)
        base.model.get_output_embeddings().register_forward_pre_hook(self._select_hidden_states)
        self.store, self.selected, self.selection = AdapterStore(base, []), dict[str, StackedAdapters](), (0, 0)
        self.at_once = 2**31
        """Largest number of clients in one training pass; halved when memory runs out."""
        if base.images is not None:
            check_images(base, self.forward)
        self.packs = supports_packing(base, self.forward)
        """Whether batches are packed; False for bases in which more than attention mixes tokens."""

    @property
    def clients(self) -> int:
        """Number of loaded adapters C."""
        return len(self.store.adapters)

    # adapters
    def load(self, adapters: Sequence[Adapter]) -> None:
        """Replace the loaded adapters by copies of these, one per client; an empty sequence leaves the untuned base.

        Raises ValueError for adapters of different kinds, BaseModelError for adapters that do not fit the base,
        ConfigError for modules with fewer experts than top_k.
        """
        self.store = AdapterStore(self.base, adapters)
        self.select_clients(0, len(adapters))

    def select_clients(self, first: int, last: int) -> None:
        """Run the following forward passes with the adapters of clients `first` to `last` - 1."""
        self.selected, self.selection = self.store.stacked(first, last), (first, last)
        self.prompt_layer.adapters = self.selected.get(PROMPT)
        self.prompt_layer.tables = None if self.store.tables is None else self.store.tables[first:last]
        for name, layer in self.layers.items():
            layer.adapters = self.selected.get(name)

    @contextmanager
    def lent(self, store: AdapterStore, first: int, last: int) -> Iterator[None]:
        """Run the forward passes inside the block with the adapters `first` to `last` - 1 of another store."""
        own, selection = self.store, self.selection
        self.store = store
        try:
            self.select_clients(first, last)
            yield
        finally:
            self.store = own
            self.select_clients(*selection)

    @contextmanager
    def virtual_vectors(self, tables: Tensor) -> Iterator[None]:
        """Use `tables` (C, V, d) for the selected clients' virtual tokens inside the block; gradients flow into it."""
        previous, self.prompt_layer.tables = self.prompt_layer.tables, tables
        try:
            yield
        finally:
            self.prompt_layer.tables = previous

    def adapter(self, client: int = 0) -> Adapter:
        """Return a copy of a client's adapter on the CPU; RuntimeError if the bank is empty."""
        return self.store.adapter(client)

    # training
    def trainable(self) -> list[Tensor]:
        """Return one flat tensor (P) per client for an optimiser; `backward` adds to its `.grad`, 0 at first."""
        rows = self.store.trainable()
        self.select_clients(0, self.clients)
        return rows

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to the gradients of the selected clients.

        Tensors that the loss does not depend on, such as an expert that no token was routed to, get no gradient.
        """
        totals = [total for adapters in self.selected.values() for total in adapters.gradients]
        gradients = torch.autograd.grad(loss, self.parameters(), allow_unused=True)
        for total, gradient in zip(totals, gradients, strict=True):
            if gradient is not None:
                total.add_(gradient)

    def parameters(self) -> list[Tensor]:
        """Return the selected clients' trainable tensors, (C, rows, width) each, in the order of the layers."""
        return [part for adapters in self.selected.values() for part in adapters.parts]

    # forward passes
    @contextmanager
    def forward(self, batch: Batch, context: ForwardContext | None = None) -> Iterator[Tensor]:
        """Yield the logits (K, V) that predict the answer tokens of a batch.

        The containers of `context` are filled with intermediate results. Run the backward pass inside the block:
        gradient checkpointing repeats the forward pass there and needs its context.
        """
        context = (context or ForwardContext()).over(batch)
        if self.store.references and context.expert_weights is None:
            weights = self.instance_weights(batch.prompts)
            if weights is not None and batch.sequences is not None:
                weights = weights.index_select(0, batch.sequences.owner)
            context = replace(context, expert_weights=weights)
        options: dict[str, object] = {}
        if batch.sequences is not None:
            options = {"position_ids": batch.positions, "sequences": batch.sequences}
        if context.layer_states is not None:
            options["output_hidden_states"] = True
        options |= self.base.media(prompt for prompts in batch.prompts for prompt in prompts)
        with packed_attention_enabled(self.base, batch.sequences is not None), self.enter(context):
            output = self.base.model(input_ids=batch.ids, use_cache=False, **options)
            if context.layer_states is not None:
                for states in output.hidden_states[1:]:  # the first are the embeddings
                    context.layer_states.append(states.flatten(0, 1).index_select(0, batch.logit_indices))
            yield output.logits.squeeze(0)

    def _select_hidden_states(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Compute only the requested logits: the output head is a large part of the cost of a prompt."""
        context = self.active.context
        if context.logit_indices is None:
            return None
        hidden = inputs[0].flatten(0, 1).index_select(0, context.logit_indices)
        if context.hidden_states is not None:
            context.hidden_states.append(hidden)
        return (hidden.unsqueeze(0),)

    @cached_property
    def continuation(self) -> Continuation:
        """How the base generates, found by a test at the first use, without adapters."""
        self.prompt_layer.adapters = self.prompt_layer.tables = None
        for layer in self.layers.values():
            layer.adapters = None
        try:
            return continuation_of(self.base)
        finally:
            self.select_clients(0, self.clients)

    # prompts
    def prefix(self, prompt: Ids) -> Ids:
        """Return a prompt with the loaded adapters' virtual tokens, if any, before it."""
        return with_prefix(self.store.spec.prefix, prompt) if isinstance(self.store.spec, PromptSpec) else prompt

    def prefixed(self, clients: Sequence[Sequence[TokenPair]]) -> list[list[TokenPair]]:
        """Return (prompt, answer) pairs with the loaded adapters' virtual tokens, if any, before each prompt."""
        return [[(self.prefix(prompt), answer) for prompt, answer in pairs] for pairs in clients]

    def last_hidden(self, clients: Sequence[Sequence[Ids]]) -> Tensor:
        """Return the last hidden states (rows, d) of the last tokens of each client's prompts.

        Adapters with `InstanceWeights` run with their first expert alone.
        """
        first_expert = torch.tensor([[1.0, 0.0]], device=self.base.device)
        hidden_states: list[Tensor] = []
        pairs = [[(prompt, (0,)) for prompt in prompts] for prompts in clients]
        batch = collate(pairs, self.base.pad_id, self.packs, device=self.base.device)
        context = ForwardContext(expert_weights=first_expert, hidden_states=hidden_states)
        with torch.no_grad(), self.forward(batch, context):
            return hidden_states[0].float()

    def instance_weights(self, clients: Sequence[Sequence[Ids]]) -> Tensor | None:
        """Return the weights (rows, 2) of the two experts for each client's prompts.

        The similarity is the mean cosine between the prompt's last hidden state and the client's references. Returns
        None unless the loaded adapters have `InstanceWeights` and references.
        """
        references = self.store.references
        router = self.store.spec.router if isinstance(self.store.spec, AdapterSpec) else None
        if not references or not isinstance(router, InstanceWeights):
            return None
        # The mean cosine is the product with the mean unit vector, whatever the number of references.
        means = torch.stack([F.normalize(vectors, dim=1).mean(0) for vectors in references]).to(self.base.device)
        owner = [client for client, prompts in enumerate(clients) for _ in prompts]
        similarity = (F.normalize(self.last_hidden(clients), dim=1) * means[owner]).sum(1)
        return router.weights(similarity)

    # router embeddings
    def mean_embeddings(self, sums: Mapping[str, Tensor], tokens: Sequence[int]) -> list[dict[str, MeanEmbeddings]]:
        """Divide sums of router embeddings by the number of `tokens` of each client; return the means by module."""
        means: list[dict[str, MeanEmbeddings]] = [{} for _ in range(self.clients)]
        for name, total in sums.items():
            for client, rows in enumerate(total.cpu()):
                token, *experts = rows / tokens[client]
                by_expert = zip(self.store.experts[client][name], experts, strict=False)  # empty slots come last
                means[client][name] = MeanEmbeddings(token, dict(by_expert))
        return means
