"""FedAWA: Shi, Zhao, Zhang, Zhou, Guo, Chang, "Adaptive Optimization of Aggregation Weights in Federated Learning Using
Client Vectors", CVPR 2025, https://arxiv.org/abs/2503.15842.

One round:
    1. The server sends the global LoRA w to the selected clients.
    2. Each client trains it and sends back its LoRA w_k. Its client vector is tau_k = w_k - w.
    3. The server has a logit per client. The weights p are the softmax of the logits of those that replied. The logits
       take `weight_steps` steps of Adam on
           sum_k p_k (1 - cos(w, w_k)) + gamma sum_k p_k |tau_k - sum_j p_j tau_j|,
       so that clients whose vectors are far from the mean lose weight.
    4. The server averages the LoRAs with the new weights.
The model of every client is the global LoRA, scored after the aggregation.
Deviations: the parameters are those of LoRAs: the factors A and B that are averaged, or (`space = "change"`) the
changes B A. Adam starts anew in each round, so that a step moves a logit by about the learning rate. Clients that do
not reply keep their logits. Logits start at 0, or (`weighting = "examples"`) at the logarithm of the training examples;
the released code takes the softmax of the shares themselves, which is nearly uniform.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, Server, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.federation.weights import capped
from fedamole.methods.shared.averaging import SharedTensors, mean_by_key
from fedamole.methods.shared.checks import check_at_least
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.params import Adapter, Tensors, new_shared, shared_keys

BETAS = (0.5, 0.999)
"""Decay rates of Adam, as in the released code."""


@dataclass(frozen=True)
class WeightedLora:
    """Server state."""

    tensors: Mapping[str, Tensor]
    """The global LoRA."""
    logits: Mapping[str, Tensor]
    """Logits (groups), float64, of each client that has replied; a group is the LoRA, or one of its modules."""


def factor_products(before: Tensors, after: Sequence[Tensors], modules: Sequence[str]) -> Tensor:
    """Return the inner products (n + 1, n + 1) of w, w_1 - w, ..., w_n - w, as vectors of the factors; float64."""
    total = torch.zeros(len(after) + 1, len(after) + 1, dtype=torch.float64)
    for key in (key for module in modules for key in shared_keys(module)):
        start = before[key].double().flatten()
        vectors = torch.stack([start, *(tensors[key].double().flatten() - start for tensors in after)])
        total += vectors @ vectors.T
    return total


def change_products(before: Tensors, after: Sequence[Tensors], modules: Sequence[str], scaling: float) -> Tensor:
    """Return the inner products of the same vectors in terms of the changes `scaling` B A, which are never formed."""
    count = len(after) + 1
    total = torch.zeros(count, count, dtype=torch.float64)
    for module in modules:
        key_a, key_b = shared_keys(module)
        a, b = before[key_a].double(), before[key_b].double()
        # B_k A_k - B A is the product of [B_k, -B] and [A_k; A]. Both stacks are (n + 1, 2 r, d).
        right = torch.stack([torch.cat([a, a]), *(torch.cat([tensors[key_a].double(), a]) for tensors in after)])
        left = [torch.cat([b, 0 * b], 1).T, *(torch.cat([tensors[key_b].double(), -b], 1).T for tensors in after)]
        outputs, inputs = torch.stack(left).flatten(0, 1), right.flatten(0, 1)
        blocks = (outputs @ outputs.T) * (inputs @ inputs.T)
        total += blocks.unflatten(0, (count, -1)).unflatten(2, (count, -1)).sum((1, 3)) * scaling**2
    return total


def objective(products: Tensor, weights: Tensor, update_weight: float) -> Tensor:
    """Return the objective of step 3, summed over groups.

    `products` (groups, n + 1, n + 1) are the inner products of w, tau_1, ..., tau_n; `weights` (n, groups).
    """
    p, inner = weights.T, products[:, 1:, 1:]
    squares, start, along = inner.diagonal(dim1=1, dim2=2), products[:, :1, 0], products[:, 0, 1:]
    cosines = (start + along) / (start * (start + 2 * along + squares)).clamp(min=1e-30).sqrt()
    to_mean = (inner @ p[:, :, None]).squeeze(2)
    # The derivative of a square root at 0 is infinite: a client vector that is the mean has no derivative.
    distances = (squares - 2 * to_mean + (p * to_mean).sum(1, keepdim=True)).clamp(min=1e-30).sqrt()
    return (p * (1 - cosines + update_weight * distances)).sum()


@dataclass(frozen=True)
class FedAwa(LoraMethod[WeightedLora, SharedTensors, Nothing, SharedTensors]):
    """One LoRA for all clients, averaged with weights that the server learns from the clients' updates."""

    weight_learning_rate: float = 1e-3
    """Learning rate of the logits of the clients' weights (the released code: 0.001). At 0.1 a client that harms the
    others loses its weight within ten rounds, and so does an honest client whose task is unlike the others'."""
    weight_steps: int = 1
    """Steps of Adam that the logits take in a round."""
    update_weight: float = 1.0
    """Weight gamma of the distances of the clients' updates from their mean."""
    space: Literal["factors", "change"] = "factors"
    """What is compared: the factors A and B as they are averaged, or the changes B A."""
    per_module: bool = False
    """Whether each module has weights of its own, as in the paper's variant by layer."""
    weighting: Weighting = "uniform"
    """Weights before the first step: uniform, or by training examples."""

    paper = "Shi et al., Adaptive Optimization of Aggregation Weights (FedAWA), CVPR 2025, arXiv 2503.15842"
    communicates = "one LoRA down, one LoRA up"
    stays_local = "the data"
    evaluates = "post_aggregation"
    accepts_newcomers = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.weight_learning_rate <= 10:
            raise ConfigError(
                f"method.weight_learning_rate = {self.weight_learning_rate}: must be above 0 and at most 10"
            )
        check_at_least(self, weight_steps=1)
        if self.update_weight < 0:
            raise ConfigError(f"method.update_weight = {self.update_weight}: must not be negative")

    # server
    @override
    def init(self, server: Server) -> WeightedLora:
        return WeightedLora(new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora")), {})

    @override
    def message(self, state: WeightedLora, client: ClientInfo) -> SharedTensors:
        return SharedTensors(state.tensors)

    @override
    def aggregate(self, server: Server, state: WeightedLora, replies: Mapping[str, SharedTensors]) -> WeightedLora:
        """Move the logits of the clients that replied, and average their LoRAs with the weights that follow."""
        names, modules = sorted(replies), sorted(server.shapes)
        groups = [[module] for module in modules] if self.per_module else [modules]
        trained = {name: replies[name].tensors for name in names}
        products = torch.stack([self._products(state.tensors, [*trained.values()], group) for group in groups])
        first = server.weights(self.weighting)
        logits = torch.stack(
            [
                state.logits.get(name, torch.full((len(groups),), first[name], dtype=torch.float64).log())
                for name in names
            ]
        )
        logits = self.step(logits, products)
        weights, merged = logits.softmax(0), dict[str, Tensor]()
        for i, group in enumerate(groups):
            keys = [key for module in group for key in shared_keys(module)]
            shares = capped(dict(zip(names, weights[:, i].tolist(), strict=True)), server.max_weight_share)
            merged |= mean_by_key({name: {key: trained[name][key] for key in keys} for name in names}, shares, {})
        return WeightedLora(merged, {**state.logits, **dict(zip(names, logits, strict=True))})

    def step(self, logits: Tensor, products: Tensor) -> Tensor:
        """Return the logits (n, groups) after the steps of Adam of a round; `products` as in `objective`."""
        with torch.enable_grad():
            logits = logits.clone().requires_grad_()
            adam = torch.optim.Adam([logits], self.weight_learning_rate, BETAS)
            for _ in range(self.weight_steps):
                adam.zero_grad()
                objective(products, logits.softmax(0), self.update_weight).backward()
                adam.step()
        return logits.detach()

    def _products(self, before: Tensors, after: Sequence[Tensors], modules: Sequence[str]) -> Tensor:
        if self.space == "factors":
            return factor_products(before, after, modules)
        return change_products(before, after, modules, self.alpha / self.rank)

    # client
    @override
    def adapter(self, client: Client, client_state: Nothing, message: SharedTensors) -> Adapter:
        return Adapter(self.spec(), message.tensors)

    @override
    def reply(
        self, client: Client, client_state: Nothing, message: SharedTensors, trained: TrainingResult
    ) -> tuple[Nothing, SharedTensors]:
        return client_state, SharedTensors(trained.adapter.tensors)
