"""Rows that a training reads beside, or in place of, a client's own training examples."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedamole.model.batch import TokenPair
from fedamole.model.params import VECTORS, Adapter


@dataclass(frozen=True)
class SoftLabels:
    """Distributions of the first K answer tokens of N rows, each over k token ids; other ids have probability 0."""

    ids: Tensor
    """(N, K, k): token ids."""
    probabilities: Tensor
    """(N, K, k): probabilities that sum to 1 over k. A token whose probabilities are all 0 has no soft label."""

    def __post_init__(self) -> None:
        """Raise ValueError for shapes that differ."""
        if self.ids.dim() != 3 or self.ids.shape != self.probabilities.shape:
            raise ValueError("soft labels need ids and probabilities of one shape (N, K, k)")


@dataclass(frozen=True)
class ExtraRows:
    """Rows that are no training examples of a client: synthetic or generated ones."""

    rows: tuple[TokenPair, ...]
    """(prompt, answer) of each row. The negative id -1 - i in a prompt is the virtual token of `vectors[i]`."""
    vectors: Tensor | None = None
    """Embeddings (V, d) of the virtual tokens."""
    soft: SoftLabels | None = None
    """Soft labels of the rows. The prompts of such rows must differ."""

    def __post_init__(self) -> None:
        """Raise ValueError for no rows, virtual tokens without vectors, or soft labels that do not fit the rows."""
        if not self.rows:
            raise ValueError("extra rows need at least one row")
        lowest = min(token for prompt, _ in self.rows for token in (*prompt, 0))
        if lowest < -(0 if self.vectors is None else len(self.vectors)):
            raise ValueError(f"the virtual token {lowest} of the extra rows has no vector")
        if self.soft is not None and len(self.soft.ids) != len(self.rows):
            raise ValueError(f"{len(self.soft.ids)} soft labels for {len(self.rows)} extra rows")
        if self.soft is not None and len({tuple(prompt) for prompt, _ in self.rows}) < len(self.rows):
            raise ValueError("rows with soft labels must have different prompts")

    def kind(self) -> tuple[bool, bool]:
        """Return a key that is equal for rows that can be trained on in one group."""
        return self.vectors is not None, self.soft is not None

    def read_by(self, adapter: Adapter) -> Adapter:
        """Return the adapter with the vectors of the virtual tokens, which it needs to read these rows."""
        return adapter if self.vectors is None else replace(adapter, fixed={**adapter.fixed, VECTORS: self.vectors})


def joined(parts: Sequence[ExtraRows]) -> ExtraRows:
    """Join rows into one set with one table of vectors.

    Soft labels are kept where all parts have them, padded with probabilities of 0 to the largest K and k.
    """
    rows: list[TokenPair] = []
    tables: list[Tensor] = []
    shift = 0
    for part in parts:
        for prompt, answer in part.rows:
            rows.append((tuple(token - shift if token < 0 else token for token in prompt), answer))
        if part.vectors is not None:
            tables.append(part.vectors)
            shift += len(part.vectors)
    soft = [part.soft for part in parts if part.soft is not None]
    return ExtraRows(
        tuple(rows),
        torch.cat(tables) if tables else None,
        _joined_labels(soft) if len(soft) == len(parts) else None,
    )


def _joined_labels(parts: Sequence[SoftLabels]) -> SoftLabels:
    size = [max(part.ids.shape[i] for part in parts) for i in (1, 2)]

    def padded(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, size[1] - tensor.shape[2], 0, size[0] - tensor.shape[1]))

    ids, probabilities = (
        torch.cat([padded(getattr(part, name)) for part in parts]) for name in ("ids", "probabilities")
    )
    return SoftLabels(ids, probabilities)
