"""Inputs and outputs of one forward pass beside the token ids, shared by all layers of a bank."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from fedamole.model.segments import Segments

if TYPE_CHECKING:
    from fedamole.model.batch import Batch


@dataclass(frozen=True)
class ForwardContext:
    """Per-token inputs of the layers, and containers that collect the layers' intermediate results.

    A container that is None is not filled. Symbols: T tokens, C clients, n domain experts, K requested logits.
    """

    segments: Segments | None = None
    """Number of tokens, or of whole sequences, of each client; None if one client owns all."""
    not_padding: Tensor | None = None
    """(T) bool: True for tokens that are not padding; None if no token is padding."""
    dropout_keys: Tensor | None = None
    """(T): keys of this step's dropout masks; None disables dropout."""
    logit_indices: Tensor | None = None
    """(K): indices of the tokens whose logits are computed; None computes all."""
    expert_weights: Tensor | None = None
    """(rows, n): weights of the experts for each token or sequence, for `InstanceWeights`."""
    balance_losses: list[Tensor] | None = None
    """Balance losses (C), appended by each routed module in the forward pass. Read them before the backward pass:
    gradient checkpointing appends them again there."""
    embedding_sums: dict[str, Tensor] | None = None
    """Sums over tokens, (C, 1 + n, r), of W_t x (first) and each A_i x by module, added up over forward passes."""
    routing_weights: dict[str, Tensor] | None = None
    """Weights (T, n) of the domain experts for each token by module, from the last forward pass."""
    hidden_states: list[Tensor] | None = None
    """Last hidden states (K, d) of the tokens whose logits are computed, appended by each forward pass."""
    layer_states: list[Tensor] | None = None
    """Hidden states (K, d) of the same tokens after each decoder layer, the last after the final norm, appended by each
    forward pass."""

    def over(self, batch: "Batch") -> "ForwardContext":
        """Return the context, with these containers and weights, of a forward pass over a batch."""
        return replace(
            self,
            segments=batch.segments,
            not_padding=batch.not_padding,
            dropout_keys=batch.dropout_keys,
            logit_indices=batch.logit_indices,
        )


class ActiveContext:
    """Holder of the context of the forward pass in progress."""

    def __init__(self) -> None:
        """Start with the empty context: one client, all logits, no dropout."""
        self.context = ForwardContext()

    @contextmanager
    def enter(self, context: ForwardContext) -> Iterator[None]:
        """Use `context` for the forward passes inside the block and restore the previous one afterwards."""
        previous, self.context = self.context, context
        try:
            yield
        finally:
            self.context = previous
