"""Trajectory matching: synthetic rows on which a few gradient steps reproduce a given move of the parameters.

Source: Cazenavette et al., "Dataset Distillation by Matching Training Trajectories", CVPR 2022,
https://arxiv.org/abs/2203.11932, as FedPTR uses it. Parameters are one flat tensor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""Loss (scalar) of parameters (P) on synthetic rows; twice differentiable."""
MOST_NORM = 1.0
"""Gradients of an outer step are clipped to this norm."""


@dataclass(frozen=True)
class Matching:
    """How synthetic rows are optimised."""

    inner_steps: int
    """Gradient steps that are to make the move."""
    outer_steps: int
    """Steps of Adam on the rows and on the logarithm of the inner step size."""
    rate: float
    """Adam's learning rate for the rows."""
    step_rate: float
    """Adam's learning rate for the logarithm of the inner step size."""


@dataclass(frozen=True)
class Matched:
    """Rows that were optimised."""

    rows: Tensor
    log_step: Tensor
    """Logarithm of the inner step size, 0-d."""
    errors: tuple[float, ...]
    """Relative matching error before each outer step."""


def unrolled(loss: Loss, start: Tensor, rows: Tensor, log_step: Tensor, steps: int, differentiable: bool) -> Tensor:
    """Return the parameters after some gradient steps on the rows; `differentiable` keeps the graph to the rows."""
    weights = start if start.requires_grad else start.detach().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(weights, rows), weights, create_graph=differentiable)
        weights = weights - log_step.exp() * gradient
        if not differentiable:
            weights = weights.detach().requires_grad_()
    return weights


def match(loss: Loss, start: Tensor, end: Tensor, rows: Tensor, log_step: Tensor, how: Matching) -> Matched:
    """Optimise rows so that gradient steps on them lead from `start` to `end`.

    The error is |reached - end| / |start - end|. If start and end are equal, the rows stay as they are. It
    ends early when the error is no longer finite.
    """
    rows, log_step = (it.detach().clone().requires_grad_() for it in (rows, log_step))
    optimiser = torch.optim.Adam([{"params": [rows], "lr": how.rate}, {"params": [log_step], "lr": how.step_rate}])
    length, errors = torch.linalg.vector_norm(start - end), list[float]()
    for _ in range(how.outer_steps if length > 0 else 0):
        reached = unrolled(loss, start, rows, log_step, how.inner_steps, differentiable=True)
        error = torch.linalg.vector_norm(reached - end) / length
        rows.grad, log_step.grad = torch.autograd.grad(error, (rows, log_step))
        norm = torch.nn.utils.clip_grad_norm_([rows, log_step], MOST_NORM)
        if not math.isfinite(float(error.detach())) or not math.isfinite(float(norm)):
            break
        errors.append(float(error.detach()))
        optimiser.step()
    return Matched(rows.detach(), log_step.detach(), tuple(errors))
