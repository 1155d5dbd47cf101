"""Trajectory matching at the server, on the resident base, for one LoRA at a time."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedamole.model.bank import Bank
from fedamole.model.batch import TokenPair, collate, token_losses
from fedamole.model.params import Adapter, Tensors
from fedamole.synthesis.trajectory import Matched, Matching, match, unrolled


@dataclass(frozen=True)
class TrajectoryRequest:
    """A move of a LoRA that gradient steps on rows of virtual tokens are to reproduce, and then to continue."""

    start: Adapter
    end: Tensors
    """Where the steps are to lead."""
    labels: tuple[int, ...]
    """Answer token of each of n rows."""
    vectors: Tensor
    """Vectors (n, L, d) of their virtual tokens, with which the optimisation starts."""
    log_step: Tensor
    """Logarithm of the step size with which it starts, 0-d."""
    matching: Matching


@dataclass(frozen=True)
class TrajectoryResult:
    """Rows that were optimised, and where the same steps lead from the end of the move."""

    matched: Matched
    projected: Tensors
    tokens: int
    """Tokens of the passes; each has two backward passes through it."""


def match_trajectory(bank: Bank, request: TrajectoryRequest) -> TrajectoryResult:
    """Optimise the rows, and take the same steps from the end of the move."""
    bank.load([request.start])
    device, (count, length, _) = bank.base.device, request.vectors.shape
    rows: list[TokenPair] = [
        (tuple(range(-1 - i * length, -1 - (i + 1) * length, -1)), (label,)) for i, label in enumerate(request.labels)
    ]
    batch, passes = collate([rows], bank.base.pad_id, bank.packs, device=device), 0
    start, end = (bank.store.row(0, it).to(bank.store.weights) for it in (request.start.tensors, request.end))

    def loss(weights: Tensor, vectors: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        use_weights(bank, weights)
        with bank.virtual_vectors(vectors.flatten(0, 1).unsqueeze(0)), bank.forward(batch) as logits:
            return token_losses(logits, batch.labels).mean()

    vectors, log_step = (it.float().to(device) for it in (request.vectors, request.log_step))
    how = request.matching
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        matched = match(loss, start, end, vectors, log_step, how)
        reached = unrolled(loss, end, matched.rows, matched.log_step, how.inner_steps, differentiable=False)
    bank.select_clients(0, 1)
    projected = named(bank, reached.detach()) if bool(reached.isfinite().all()) else request.end
    matched = replace(matched, rows=matched.rows.cpu(), log_step=matched.log_step.cpu())
    return TrajectoryResult(matched, projected, passes * count * (length + 1))


def use_weights(bank: Bank, weights: Tensor) -> None:
    """Run the forward passes of the one loaded LoRA with these weights (P), into which gradients flow."""
    position = 0
    for name, adapters in bank.selected.items():
        parts = list[Tensor]()
        for part in adapters.parts:
            parts.append(weights[position : position + part.numel()].view(part.shape))
            position += part.numel()
        bank.layers[name].adapters = replace(adapters, parts=tuple(parts))


def named(bank: Bank, weights: Tensor) -> dict[str, Tensor]:
    """Return weights (P) in the layout of the one loaded LoRA as named tensors on the CPU."""
    with torch.no_grad():
        bank.store.weights[0].copy_(weights)
    return dict(bank.adapter().tensors)
