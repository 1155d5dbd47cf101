"""Penalties: terms that a method adds to the loss of local training.

A request for training names its penalty (`TrainingRequest.penalty`). Penalties of one class are computed together for
all clients that train in lock-step, on one tensor (n, P) with a row of parameters per client. A new penalty is one
class here or in a method's file; `fit` needs no change.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.model.bank import Bank
from fedamole.model.params import Adapter, Tensors

LossFunction = Callable[[Tensor], Tensor]
"""From the parameters (n, P) of n clients to their terms (n), differentiable."""


class ParameterLayout:
    """How the parameters of n clients lie in rows (n, P) of a bank."""

    def __init__(self, bank: Bank, adapters: Sequence[Adapter], clients: Sequence[int]) -> None:
        """Describe the rows of some of the clients whose adapters are loaded and whose weights are all selected."""
        self._bank, self._clients = bank, clients
        self.adapters = [adapters[client] for client in clients]
        """Adapters that the clients start from."""
        self._shapes = [part.shape[1:] for part in bank.parameters()]

    def rows(self, tensors: Sequence[Tensors]) -> Tensor:
        """Lay out tensors that are named like those of each client's adapter, (n, P)."""
        rows = [self._bank.store.row(client, named) for client, named in zip(self._clients, tensors, strict=True)]
        return torch.stack(rows).to(self._bank.store.weights)

    def factors(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return views of rows (n, P): the stacked factors of each module, (n, R, d_in) and (n, R, d_out).

        For a LoRA of rank r these are A (n, r, d_in) and the transpose of B (n, r, d_out).
        """
        parts = rows.split([shape.numel() for shape in self._shapes], dim=1)
        views = [part.unflatten(1, shape) for part, shape in zip(parts, self._shapes, strict=True)]
        return list(zip(views[::2], views[1::2], strict=True))


class Penalty(ABC):
    """A differentiable term of a client's parameters; the base class of all penalties."""

    @classmethod
    @abstractmethod
    def loss(cls, penalties: Sequence[Self], layout: ParameterLayout) -> LossFunction:
        """Return the function that computes the terms (n) of n clients from their parameters (n, P).

        Called once before the first step, with the penalty of each client; the result is called in every step. It must
        not wait for the device.
        """


@dataclass(frozen=True)
class Proximal(Penalty):
    """`weight` / 2 |w - anchor|^2 over the tensors named in `anchor` (FedProx, Ditto)."""

    anchor: Tensors
    """Centre of the term, by the names of the adapter's tensors; other tensors are not penalised."""
    weight: float

    @classmethod
    @override
    def loss(cls, penalties: Sequence["Proximal"], layout: ParameterLayout) -> LossFunction:
        pairs = list(zip(penalties, [adapter.tensors for adapter in layout.adapters], strict=True))
        centres = layout.rows([{**tensors, **penalty.anchor} for penalty, tensors in pairs])
        weights = layout.rows(
            [
                {
                    name: torch.full_like(t, penalty.weight if name in penalty.anchor else 0.0, dtype=torch.float64)
                    for name, t in tensors.items()
                }
                for penalty, tensors in pairs
            ]
        )
        return lambda parameters: 0.5 * ((parameters - centres).square() * weights).sum(1)


@dataclass(frozen=True)
class TailNorm(Penalty):
    """`weight` * sum over modules |A[first_rank:]| |B[:, first_rank:]|, Frobenius norms, of a LoRA (HetLoRA)."""

    first_rank: int
    """First rank, from 0, of those that are penalised."""
    weight: float

    @classmethod
    @override
    def loss(cls, penalties: Sequence["TailNorm"], layout: ParameterLayout) -> LossFunction:
        if len({penalty.first_rank for penalty in penalties}) > 1:
            raise ValueError("LoRAs of one rank must be penalised from the same rank on")
        first = penalties[0].first_rank
        weights = torch.tensor([penalty.weight for penalty in penalties], dtype=torch.float64)

        def loss(parameters: Tensor) -> Tensor:
            norms = [
                torch.linalg.vector_norm(a[:, first:], dim=(1, 2)) * torch.linalg.vector_norm(b[:, first:], dim=(1, 2))
                for a, b in layout.factors(parameters)
            ]
            return weights * torch.stack(norms).sum(0)

        weights = weights.to(layout.rows([adapter.tensors for adapter in layout.adapters]))
        return loss
