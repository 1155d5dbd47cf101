"""The layers that a bank puts into a base: around every target linear, and at the input embeddings.

What the layers of one forward pass share (whose rows are whose, padding, dropout, what to collect) is on a `Tape`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedamole.model.amole import AdapterSpec, Drop, Routing, amole_linear, balance_loss, mixture_weights
from fedamole.model.dropout import column_keys, dropped
from fedamole.model.mixer import mixer_linear, mixer_weights
from fedamole.model.prompt import PromptSpec, virtual_tokens
from fedamole.model.segments import Segments, add_product, segment_sum


@dataclass
class Tape:
    """What one forward pass tells the layers, and what they write down for it."""

    segments: Segments | None = None
    """Rows (of tokens, or of whole sequences) of each client; None where one client has all."""
    not_padding: Tensor | None = None
    """(tokens) of bool: the tokens that are not padding; None where all count."""
    keys: Tensor | None = None
    """(tokens): keys of this step's dropout masks; None switches dropout off."""
    logit_indices: Tensor | None = None
    """(K): places whose logits are wanted; None = all."""
    balance: list[Tensor] | None = None
    """Balance losses (C) of the modules, appended in the forward pass; None when not wanted. Read it before the
    backward pass: gradient checkpointing appends to it again there."""
    embeddings: "dict[str, EmbeddingSum] | None" = None
    """Sums of router embeddings by module; None when not wanted."""
    weights: "dict[str, Tensor] | None" = None
    """Weights (T, n) of the domain experts for each token, by module, as the last pass had them; None when not
    wanted."""
    gates: Tensor | None = None
    """(rows, n): weights of the experts for each token or sequence, where they are weighted by instance."""
    hidden: list[Tensor] | None = None
    """Last hidden states (K, d) at the places whose logits are wanted; None when not wanted."""


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
    """What C clients have in one layer, stacked."""

    parts: tuple[Tensor, ...]
    """What trains: (down, up) of a linear as its layer reads them, (C, rows, width) each; or what makes a prompt."""
    gradients: tuple[Tensor, ...]
    """Where the gradients of the parts are added up, once they are asked for."""
    experts: list[list[int]]
    """Global ids of the domain experts of each client."""
    held: Tensor
    """Their numbers, (C)."""
    absent: Tensor | None
    """(C, n) of bool: room for experts that a client does not hold; None where all hold n."""
    delta: Tensor | None
    """(C, d_in, d_out): a fixed change of the frozen linear, transposed."""
    own: Tensor | None
    """(C, n): 1 for the client's own expert, where a mixer needs to know it."""


class BankLinear(nn.Module):
    """A frozen linear (nn.Linear, Conv1D or quantised) with room for adapters."""

    columns: Tensor

    def __init__(self, base_layer: nn.Module, name: str, index: int, width: int, tape: Tape) -> None:
        """Wrap the module `name` of this input width, the `index`-th of its base."""
        super().__init__()
        self.base_layer, self.name, self.index, self.tape = base_layer, name, index, tape
        self.spec: AdapterSpec | PromptSpec | None = None
        self.loaded: Loaded | None = None
        self.register_buffer("columns", column_keys(index, width), persistent=False)
        self._rank_columns: dict[int, Tensor] = {}

    @property
    def weight(self) -> Any:
        """Weight of the wrapped linear, as some models look at its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """Bias of the wrapped linear; None if it has none."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the base layer's output, plus each client's adapter's on its rows where adapters are loaded."""
        base_out: Tensor = self.base_layer(x)
        if self.loaded is None or not isinstance(self.spec, AdapterSpec):
            return base_out
        held, tokens = self.loaded, x.numel() // x.shape[-1]
        segments = Segments((tokens,), x.device) if self.tape.segments is None else self.tape.segments.scaled_to(tokens)
        drop = self._drop() if self.tape.keys is not None and self.spec.dropout else None
        if held.delta is not None:
            changed = add_product(base_out.flatten(0, -2), x.flatten(0, -2), held.delta.to(x.dtype), segments, 1.0)
            base_out = changed.view_as(base_out)
        down, up = held.parts
        if self.spec.router != "embedding":
            gates = self._gates(tokens) if self.spec.router == "instance" else None
            if self.tape.weights is not None:
                mixer = down[:, : down.shape[1] - up.shape[1]].to(x.dtype).transpose(1, 2)
                experts, flat = up.shape[1] // self.spec.rank, x.reshape(tokens, -1)
                self.tape.weights[self.name] = mixer_weights(flat, mixer, experts, segments, held.own, gates)
            return mixer_linear(x, base_out, down, up, self.spec, drop, segments, held.own, gates)
        y, routing = amole_linear(x, base_out, down, up, self.spec, drop, segments, held.absent)
        if routing is not None:
            self._collect(routing, segments, held)
        return y

    def _gates(self, tokens: int) -> Tensor:
        """Weights (tokens, n) of the experts; those of a sequence are repeated for all its tokens."""
        gates = self.tape.gates
        if gates is None:  # in training
            first = self.spec.instance_weight if isinstance(self.spec, AdapterSpec) else 1.0
            gates = torch.tensor([[first, 1 - first]], device=self.columns.device)
        return gates.repeat_interleave(tokens // len(gates), dim=0)

    def _drop(self) -> Drop:
        spec, keys = self.spec, self.tape.keys
        assert isinstance(spec, AdapterSpec)
        assert keys is not None

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

    def _collect(self, routing: Routing, segments: Segments, held: Loaded) -> None:
        tape = self.tape
        if tape.weights is not None:
            tape.weights[self.name] = mixture_weights(routing)[:, :-1]
        if tape.balance is not None:
            tape.balance.append(balance_loss(routing, tape.not_padding, segments, held.held))
        if tape.embeddings is not None:
            token, experts = routing.token_embedding.float(), routing.expert_embeddings.float()
            if tape.not_padding is not None:
                token, experts = token * tape.not_padding[:, None], experts * tape.not_padding[:, None, None]
            found = EmbeddingSum(segment_sum(token, segments), segment_sum(experts, segments))
            previous = tape.embeddings.get(self.name)
            if previous is not None:
                found = EmbeddingSum(previous.token + found.token, previous.experts + found.experts)
            tape.embeddings[self.name] = found


class BankPrompt:
    """Virtual tokens at the input embeddings: places with negative ids get the client's own embeddings."""

    def __init__(self, embedding: nn.Module, tape: Tape) -> None:
        """Hook into the embeddings; without a prompt loaded they see nothing of it."""
        self.tape = tape
        self.loaded: Loaded | None = None
        self._ids = torch.empty(0)
        embedding.register_forward_pre_hook(self._hide)
        embedding.register_forward_hook(self._show)

    def _hide(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.loaded is None:
            return None
        self._ids = inputs[0]
        return (self._ids.clamp(min=0), *inputs[1:])

    def _show(self, _: nn.Module, __: tuple[Any, ...], embedded: Tensor) -> Tensor | None:
        if self.loaded is None:
            return None
        ids, prompts = self._ids, virtual_tokens(self.loaded.parts)
        if self.tape.segments is None:
            owner = torch.zeros(ids.numel(), dtype=torch.long, device=ids.device)
        else:
            owner = self.tape.segments.scaled_to(ids.numel()).owner
        places = (-1 - ids).clamp(min=0).flatten()
        chosen = prompts.flatten(0, 1).index_select(0, owner * prompts.shape[1] + places).view_as(embedded)
        return torch.where((ids < 0).unsqueeze(-1), chosen.to(embedded.dtype), embedded)
