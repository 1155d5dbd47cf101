"""Segmented tensor operations: products and sums in which each client's rows use that client's own weights.

A tensor of T rows holds the rows of client 0 first, then those of client 1, and so on. No operation mixes the rows of
different clients, not even by multiplying with 0, so NaN or infinity in one client's rows never reaches another's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device. Copies to a GPU use pinned memory and do not block the host."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Segments:
    """The number of consecutive rows of a tensor that belong to each of C clients."""

    lengths: tuple[int, ...]
    device: torch.device = CPU
    """Device of the segmented tensors."""
    _scaled: "dict[int, Segments]" = field(default_factory=dict, compare=False, repr=False)

    @property
    def equal(self) -> bool:
        """Whether all segments have the same length."""
        return len(set(self.lengths)) == 1

    @cached_property
    def rows(self) -> int:
        """Total number of rows T."""
        return sum(self.lengths)

    def scaled_to(self, rows: int) -> "Segments":
        """Return segments of `rows` rows in total with the same proportions.

        This converts segments of sequences into segments of their tokens. Raises ValueError if `rows` is not a
        multiple of T.
        """
        if rows == self.rows:
            return self
        if rows not in self._scaled:
            factor, rest = divmod(rows, self.rows)
            if rest:
                raise ValueError(f"{rows} rows are not a multiple of {self.rows}")
            self._scaled[rows] = Segments(tuple(length * factor for length in self.lengths), self.device)
        return self._scaled[rows]

    @cached_property
    def counts(self) -> Tensor:
        """The lengths as a tensor (C)."""
        return to_device(torch.tensor(self.lengths), self.device)

    @cached_property
    def owner(self) -> Tensor:
        """Index of the client that each row belongs to, (T)."""
        return torch.repeat_interleave(self.counts, output_size=self.rows)

    @cached_property
    def padding(self) -> "Padding":
        """Index tables that pad the non-empty segments to the length of the longest one."""
        return Padding.of([length for length in self.lengths if length], self.device)


@dataclass(frozen=True)
class Padding:
    """Conversion between segmented rows (T, ...) and a padded tensor (C, longest, ...).

    Padding repeats the last row of the same segment.
    """

    source_index: Tensor
    """(C * longest): index of the row that fills each position of the padded tensor."""
    padded_index: Tensor
    """(T): index of each row in the flattened padded tensor."""
    longest: int

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device = CPU) -> "Padding":
        """Compute the index tables for segments of these lengths."""
        counts = torch.tensor(lengths)
        longest, starts = int(counts.max()), counts.cumsum(0) - counts
        steps = torch.arange(longest)
        sources = (starts[:, None] + torch.minimum(steps, counts[:, None] - 1)).clamp(0, int(counts.sum()) - 1)
        is_row = steps < counts[:, None]
        padded_index = is_row.flatten().nonzero().squeeze(1)
        return Padding(to_device(sources.flatten(), device), to_device(padded_index, device), longest)

    def pad(self, rows: Tensor) -> Tensor:
        """(T, ...) -> (C, longest, ...). Drop the results on padding with `unpad`."""
        padded: Tensor = _Gather.apply(rows, self.source_index, self.padded_index, False)  # type: ignore[no-untyped-call]
        return padded.view(-1, self.longest, *rows.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """(C, longest, ...) -> (T, ...)."""
        rows: Tensor = _Gather.apply(padded.flatten(0, 1), self.padded_index, self.source_index, True)  # type: ignore[no-untyped-call]
        return rows


class _Gather(torch.autograd.Function):
    """Select rows by index. Copies that are padding contribute no gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, unpadding: bool) -> Tensor:
        ctx.index, ctx.inverse, ctx.unpadding, ctx.rows = index, inverse, unpadding, rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        if not ctx.unpadding:
            return gradient.index_select(0, ctx.inverse), None, None, None
        padded = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        return padded.index_copy_(0, ctx.index, gradient), None, None, None


class _LoopedProduct(torch.autograd.Function):
    """One matrix product per client, written into one output tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, lengths: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.lengths = lengths
        y = x.new_empty(x.shape[0], weights.shape[2])
        for rows, weight, out in zip(x.split(lengths), weights.unbind(0), y.split(lengths), strict=True):
            torch.mm(rows, weight, out=out)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weights = ctx.saved_tensors
        parts = gradients[0].split(ctx.lengths)
        to_x = to_weights = None
        if ctx.needs_input_grad[0]:
            to_x = torch.empty_like(x)
            for part, weight, out in zip(parts, weights.unbind(0), to_x.split(ctx.lengths), strict=True):
                torch.mm(part, weight.t(), out=out)
        if ctx.needs_input_grad[1]:
            to_weights = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
            for part, rows, out in zip(parts, x.split(ctx.lengths), to_weights.unbind(0), strict=True):
                torch.mm(rows.t(), part, out=out)
        return to_x, to_weights, None


def product(x: Tensor, weights: Tensor, segments: Segments) -> Tensor:
    """Return x_c @ weights_c for each client: x (T, m), weights (C, m, n) -> (T, n).

    Equal segments are one batched product. Unequal segments are one product per client on a CPU, where a padded row
    costs as much as a real one, and one padded batched product on a GPU, where launching a kernel costs more.
    """
    if len(segments.lengths) == 1:
        return x @ weights.squeeze(0)
    if segments.equal:
        return torch.bmm(x.unflatten(0, (weights.shape[0], -1)), weights).flatten(0, 1)
    if x.device.type == "cpu":
        y: Tensor = _LoopedProduct.apply(x, weights, segments.lengths)  # type: ignore[no-untyped-call]
        return y
    if 0 in segments.lengths:  # an empty segment has no row of its own to pad with
        weights = weights[[client for client, length in enumerate(segments.lengths) if length]]
    return segments.padding.unpad(torch.bmm(segments.padding.pad(x), weights))


def add_product(base: Tensor, x: Tensor, weights: Tensor, segments: Segments, alpha: float) -> Tensor:
    """Return base + alpha * x_c @ weights_c for each client: base (T, n), x (T, m), weights (C, m, n)."""
    if len(segments.lengths) == 1:
        return torch.addmm(base, x, weights.squeeze(0), alpha=alpha)
    if segments.equal:
        clients = weights.shape[0]
        rows = base.unflatten(0, (clients, -1)), x.unflatten(0, (clients, -1))
        return torch.baddbmm(rows[0], rows[1], weights, alpha=alpha).flatten(0, 1)
    return base + product(x * alpha, weights, segments)


def segment_sum(values: Tensor, segments: Segments) -> Tensor:
    """Sum the rows of each client: (T, ...) -> (C, ...)."""
    if segments.equal:
        return values.view(len(segments.lengths), -1, *values.shape[1:]).sum(1)
    sums: Tensor = torch.segment_reduce(values, "sum", lengths=segments.counts, axis=0, unsafe=True, initial=0)
    return sums


def expand(values: Tensor, segments: Segments) -> Tensor:
    """Repeat each client's value for all of its rows: (C, ...) -> (T, ...)."""
    if segments.equal:
        length = segments.lengths[0]
        return values.unsqueeze(1).expand(-1, length, *values.shape[1:]).flatten(0, 1)
    return values.index_select(0, segments.owner)
