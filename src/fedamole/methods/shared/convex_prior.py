"""The prior of FedMAP's second version: an input-convex neural network and quadratic terms.

The prior's density at a LoRA theta is proportional to exp(-R(theta; mu)), where the mean mu is a LoRA too:

    R = sum over tensors t of  w net(x_t) + a |theta_t - mu_t|^2 + e (|theta_t|^2 + |mu_t|^2)

The net is an input-convex neural network (Amos, Xu, Kolter, "Input Convex Neural Networks", ICML 2017,
https://arxiv.org/abs/1609.07152) with two hidden layers of softplus units, shared by all tensors. Its inputs x_t are
eight numbers: |theta|, |theta - mu|, |mu|, the component of theta along mu, and four fixed random projections of
theta - mu. R is convex in theta: the first two are convex in theta and have non-negative weights, the others are affine
in it or constant and have any weights, and all weights of the later layers are non-negative. A cosine in place of the
component would not be convex. Non-negative weights are stored as numbers of any sign, of which the softplus is used, so
that R is convex whatever a server sends. Where a norm is 0 it has no derivative, and 0 is used.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import softplus
from typing_extensions import override

from fedamole.federation.penalties import LossFunction, ParameterLayout, Penalty
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import PayloadError
from fedamole.model.params import Tensors

HIDDEN = (64, 32)
"""Units of the two hidden layers, as in the released code."""
NORMS, PROJECTIONS = 2, 4
"""Inputs that are norms and need non-negative weights, and inputs that are random projections."""
OTHERS = 2 + PROJECTIONS
"""Inputs that are affine in theta or constant."""
SHAPES = {
    "first/norms": (HIDDEN[0], NORMS),
    "first/others": (HIDDEN[0], OTHERS),
    "first/bias": (HIDDEN[0],),
    "second/weight": (HIDDEN[1], HIDDEN[0]),
    "second/bias": (HIDDEN[1],),
    "third/weight": (HIDDEN[1],),
}
"""Tensors of the net. The last layer has no bias, which would change neither gradients nor ratios of densities."""
NON_NEGATIVE = ("first/norms", "second/weight", "third/weight")
"""Weights that are used as their softplus."""


def new_net(generator: torch.Generator) -> dict[str, Tensor]:
    """Draw a net: uniform values as of `torch.nn.Linear`, and non-negative weights around 1 / inputs of the layer."""
    inputs = {"first/norms": NORMS + OTHERS, "first/others": NORMS + OTHERS, "first/bias": NORMS + OTHERS}
    inputs |= {"second/weight": HIDDEN[0], "second/bias": HIDDEN[0], "third/weight": HIDDEN[1]}
    net = {}
    for name, shape in SHAPES.items():
        uniform = torch.rand(shape, generator=generator) * 2 - 1
        if name in NON_NEGATIVE:
            net[name] = math.log(math.expm1(1 / inputs[name])) + 0.5 * uniform
        else:
            net[name] = uniform / math.sqrt(inputs[name])
    return net


def check_net(net: Tensors) -> None:
    """Raise a PayloadError for anything but the finite float32 tensors of a net."""
    if set(net) != set(SHAPES):
        raise PayloadError("the net of the prior does not have the expected tensors")
    for name, shape in SHAPES.items():
        if net[name].shape != shape or net[name].dtype != torch.float32:
            raise PayloadError(f"the net of the prior: {name} does not have the expected shape and type")
        if not net[name].isfinite().all():
            raise PayloadError(f"the net of the prior: {name} holds NaN or infinity")


def net_values(net: Tensors, inputs: Tensor) -> Tensor:
    """Return the outputs (n, T) of one net, or of n stacked nets, for inputs (n, T, 8)."""
    norms, others = inputs[..., :NORMS], inputs[..., NORMS:]
    hidden = norms @ softplus(net["first/norms"]).mT + others @ net["first/others"].mT
    hidden = softplus(hidden + net["first/bias"].unsqueeze(-2))
    hidden = softplus(hidden @ softplus(net["second/weight"]).mT + net["second/bias"].unsqueeze(-2))
    return (hidden @ softplus(net["third/weight"]).unsqueeze(-1)).squeeze(-1)


def tensor_inputs(theta: Tensor, mean: Tensor, directions: Tensor) -> Tensor:
    """Return the net's inputs (n, 8) for one tensor of n LoRAs.

    Tensors are flat: `theta` (n, size), `mean` (n, size) or (1, size), `directions` (4, size).
    """
    change, norm = theta - mean, torch.linalg.vector_norm(mean, dim=1)
    along = (theta * mean).sum(1) / norm.clamp(min=1e-12)  # a B that nobody has trained is 0
    norms = [torch.linalg.vector_norm(part, dim=1) for part in (theta, change)]
    return torch.stack([*norms, norm.expand(len(theta)), along, *(change @ directions.mT).unbind(1)], dim=1)


def directions(tensors: Tensors, seed: int) -> list[dict[str, Tensor]]:
    """Draw four random directions of length 1 for each tensor, the same at the server and at all clients of a run."""
    generator, drawn = torch_generator(seed, "prior/directions"), list[dict[str, Tensor]]()
    for _ in range(PROJECTIONS):
        values = {name: torch.randn(tensors[name].shape, generator=generator) for name in sorted(tensors)}
        drawn.append({name: value / torch.linalg.vector_norm(value) for name, value in values.items()})
    return drawn


@dataclass(frozen=True)
class ConvexPrior(Penalty):
    """R(theta; mu) as a term of the loss of local training; the head of this file defines it."""

    mean: Tensors
    """mu."""
    net: Tensors
    """Tensors of the net, of the names and shapes in SHAPES."""
    net_weight: float
    """w."""
    distance_weight: float
    """a."""
    norm_weight: float
    """e."""
    seed: int
    """Seed of the run, from which the random directions are drawn."""

    @classmethod
    @override
    def loss(cls, penalties: Sequence[Self], layout: ParameterLayout) -> LossFunction:
        if len({penalty.seed for penalty in penalties}) > 1:
            raise ValueError("clients of one run have one seed")
        means = layout.rows([penalty.mean for penalty in penalties])
        # The rows of all clients are equal here: one of them is kept.
        drawn = directions(penalties[0].mean, penalties[0].seed)
        fixed = torch.stack([layout.rows([named] * len(penalties))[0] for named in drawn])
        net = {name: torch.stack([penalty.net[name] for penalty in penalties]).to(means) for name in SHAPES}
        weights = torch.tensor([penalty._weights for penalty in penalties], dtype=torch.float64).to(means)

        def flat(rows: Tensor) -> list[Tensor]:
            return [part.flatten(1) for factors in layout.factors(rows) for part in factors]

        tensors = list(zip(flat(means), flat(fixed), strict=True))

        def loss(parameters: Tensor) -> Tensor:
            thetas = zip(flat(parameters), tensors, strict=True)
            return _energy(net, torch.stack([tensor_inputs(theta, *given) for theta, given in thetas], dim=1), weights)

        return loss

    def inputs(self, loras: Sequence[Tensors]) -> Tensor:
        """Return the net's inputs (n, T, 8) for n LoRAs with T tensors, in float64."""
        drawn = directions(self.mean, self.seed)
        return torch.stack(
            [
                tensor_inputs(
                    torch.stack([lora[name].double().flatten() for lora in loras]),
                    self.mean[name].double().flatten().unsqueeze(0),
                    torch.stack([named[name].double().flatten() for named in drawn]),
                )
                for name in sorted(self.mean)
            ],
            dim=1,
        )

    def energies(self, loras: Sequence[Tensors]) -> Tensor:
        """Return R (n) of n LoRAs, in float64."""
        net = {name: tensor.double() for name, tensor in self.net.items()}
        return _energy(net, self.inputs(loras), torch.tensor([self._weights], dtype=torch.float64))

    @property
    def _weights(self) -> tuple[float, float, float]:
        return self.net_weight, self.distance_weight, self.norm_weight


def _energy(net: Tensors, inputs: Tensor, weights: Tensor) -> Tensor:
    """R (n) from the net's inputs (n, T, 8) and the weights w, a and e (n, 3) or (1, 3)."""
    theta, change, mean = inputs[..., :3].square().sum(1).unbind(1)
    of_net, of_distance, of_norm = weights.unbind(1)
    return of_net * net_values(net, inputs).sum(1) + of_distance * change + of_norm * (theta + mean)


def fitted_net(net: Tensors, inputs: Tensor, shares: Tensor, steps: int, rate: float) -> dict[str, Tensor]:
    """Return the net after steps of gradient descent on the sum over n LoRAs of share * net.

    `inputs` (n, T, 8) are those of the LoRAs; `shares` is (n). The norm of each gradient is limited to 1, so that no
    LoRA, however far away, moves the net by more than `rate` in a step.
    """
    parameters = {name: tensor.double() for name, tensor in net.items()}
    for _ in range(steps):
        with torch.enable_grad():
            leaves = {name: parameter.requires_grad_() for name, parameter in parameters.items()}
            objective = (shares * net_values(leaves, inputs).sum(1)).sum()
            gradients = torch.autograd.grad(objective, list(leaves.values()))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        step = rate / max(1.0, norm)
        changed = zip(parameters.items(), gradients, strict=True)
        parameters = {name: parameter.detach() - step * gradient for (name, parameter), gradient in changed}
    return {name: parameter.to(net[name].dtype) for name, parameter in parameters.items()}
