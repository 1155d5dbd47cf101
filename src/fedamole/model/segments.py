"""Rows of several clients in one tensor: products with each client's own weights, sums over each client's rows.

A tensor of T rows holds client 0's rows first, then client 1's, and so on. Nothing here mixes rows of different
clients, not even by a factor of 0, so a client whose numbers are no longer finite changes nobody else's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; from pinned memory, so that the host does not wait for the device."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Shares:
    """How many rows of a tensor belong to each of C clients, in the order of the clients."""

    lengths: tuple[int, ...]
    device: torch.device = CPU
    """Where the rows are."""
    _scaled: "dict[int, Shares]" = field(default_factory=dict, compare=False, repr=False)

    @property
    def even(self) -> bool:
        """Whether all clients have the same number of rows."""
        return len(set(self.lengths)) == 1

    @cached_property
    def rows(self) -> int:
        """T, the rows of all clients."""
        return sum(self.lengths)

    def of(self, rows: int) -> "Shares":
        """Return the same shares in a tensor with a multiple of these rows (each sequence is then many tokens)."""
        if rows == self.rows:
            return self
        if rows not in self._scaled:
            factor, rest = divmod(rows, self.rows)
            if rest:
                raise ValueError(f"{rows} rows cannot be divided like {self.rows}")
            self._scaled[rows] = Shares(tuple(length * factor for length in self.lengths), self.device)
        return self._scaled[rows]

    @cached_property
    def counts(self) -> Tensor:
        """The lengths as a tensor, (C)."""
        return upload(torch.tensor(self.lengths), self.device)

    @cached_property
    def owner(self) -> Tensor:
        """The client of each row, (T)."""
        return torch.repeat_interleave(self.counts, output_size=self.rows)

    @cached_property
    def padding(self) -> "Padding":
        """Where rows go when those of each client that has any are padded to the longest share."""
        return Padding.of([length for length in self.lengths if length], self.device)


@dataclass(frozen=True)
class Padding:
    """Rows of C segments <-> a padded (C, longest, ...) tensor; padding repeats a segment's own last row."""

    take: Tensor
    """(C * longest): the row that each place of the padded tensor is filled from."""
    keep: Tensor
    """(T): the place of each row in the padded tensor."""
    longest: int

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device = CPU) -> "Padding":
        """Work out the places for segments of these lengths, for tensors on a device."""
        counts = torch.tensor(lengths)
        longest, starts = int(counts.max()), counts.cumsum(0) - counts
        steps = torch.arange(longest)
        take = (starts[:, None] + torch.minimum(steps, counts[:, None] - 1)).clamp(0, int(counts.sum()) - 1)
        inside = steps < counts[:, None]
        keep = inside.flatten().nonzero().squeeze(1)
        return Padding(upload(take.flatten(), device), upload(keep, device), longest)

    def pad(self, rows: Tensor) -> Tensor:
        """(T, ...) -> (C, longest, ...). What is computed on padding must be dropped again by `unpad`."""
        padded: Tensor = _Move.apply(rows, self.take, self.keep, False)  # type: ignore[no-untyped-call]
        return padded.view(-1, self.longest, *rows.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """(C, longest, ...) -> (T, ...)."""
        rows: Tensor = _Move.apply(padded.flatten(0, 1), self.keep, self.take, True)  # type: ignore[no-untyped-call]
        return rows


class _Move(torch.autograd.Function):
    """Select rows; the gradient goes back to the real rows alone, the copies that are padding carry none."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, take: Tensor, back: Tensor, dropping: bool) -> Tensor:
        ctx.take, ctx.back, ctx.dropping, ctx.rows = take, back, dropping, rows.shape[0]
        return rows.index_select(0, take)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        if not ctx.dropping:
            return gradient.index_select(0, ctx.back), None, None, None
        whole = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        return whole.index_copy_(0, ctx.take, gradient), None, None, None


class _Looped(torch.autograd.Function):
    """One matrix product per client, written side by side into one tensor."""

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


def product(x: Tensor, weights: Tensor, shares: Shares) -> Tensor:
    """Return x_c @ weights_c for each client: x (T, m), weights (C, m, n) -> (T, n).

    Even shares are one batched product. Uneven ones are a product per client on a CPU, where a padded row costs as
    much as a real one, and one padded batched product on a GPU, where a launch costs more than both.
    """
    if len(shares.lengths) == 1:
        return x @ weights.squeeze(0)
    if shares.even:
        return torch.bmm(x.unflatten(0, (weights.shape[0], -1)), weights).flatten(0, 1)
    if x.device.type == "cpu":
        looped: Tensor = _Looped.apply(x, weights, shares.lengths)  # type: ignore[no-untyped-call]
        return looped
    if 0 in shares.lengths:  # nobody's row could pad these without mixing clients
        weights = weights[[client for client, length in enumerate(shares.lengths) if length]]
    return shares.padding.unpad(torch.bmm(shares.padding.pad(x), weights))


def add_product(base: Tensor, x: Tensor, weights: Tensor, shares: Shares, alpha: float) -> Tensor:
    """Return base + alpha * x_c @ weights_c for each client: base (T, n), x (T, m), weights (C, m, n)."""
    if len(shares.lengths) == 1:
        return torch.addmm(base, x, weights.squeeze(0), alpha=alpha)
    if shares.even:
        clients = weights.shape[0]
        rows = base.unflatten(0, (clients, -1)), x.unflatten(0, (clients, -1))
        return torch.baddbmm(rows[0], rows[1], weights, alpha=alpha).flatten(0, 1)
    return base + product(x * alpha, weights, shares)


def totals(values: Tensor, shares: Shares) -> Tensor:
    """Sum over each client's rows: (T, ...) -> (C, ...)."""
    if shares.even:
        return values.view(len(shares.lengths), -1, *values.shape[1:]).sum(1)
    sums: Tensor = torch.segment_reduce(values, "sum", lengths=shares.counts, axis=0, unsafe=True, initial=0)
    return sums


def spread(rows: Tensor, shares: Shares) -> Tensor:
    """Repeat each client's row for all its rows: (C, ...) -> (T, ...)."""
    if shares.even:
        each = shares.lengths[0]
        return rows.unsqueeze(1).expand(-1, each, *rows.shape[1:]).flatten(0, 1)
    return rows.index_select(0, shares.owner)
