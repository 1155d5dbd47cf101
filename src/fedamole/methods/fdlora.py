"""FDLoRA: Qi, Luan, Huang, Fung, Yang, Qian, "FDLoRA: Personalized Federated Learning of Large Language Model via Dual
LoRA Tuning", 2024, https://arxiv.org/abs/2406.07925.

Round 0: each client trains a personal LoRA, keeps it and sends it; their mean is the first global LoRA.
Every later round:
    1. The server sends the global LoRA to the selected clients.
    2. Each client trains it (the inner optimiser) and sends it back. In rounds 1, 1 + `sync_every`, ... the trained
       LoRA also replaces the client's personal LoRA.
    3. The server uses the mean difference as the gradient of an outer optimiser, SGD with Nesterov momentum.
The model of a client is w1 times its personal LoRA plus w2 times the global LoRA (factor by factor, as in LoraHub). The
weights minimise the loss on a few of its examples plus 0.05 mean |w|, within -1.5 .. 1.5, without gradients.
Deviations: the search is SciPy's differential evolution with one forward pass per population. It starts from the
personal LoRA, the global LoRA, their sum, their mean and zero. Its examples are drawn from the embedding split. Round 0
is one of the run's rounds (FedAMoLE's authors add it to them). A client that misses round 0 has a personal LoRA with
B = 0 until it is synchronised.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, Server, TrainingResult, Weighting
from fedamole.federation.randomness import numpy_generator, torch_generator
from fedamole.methods.local_only import OwnLora
from fedamole.methods.shared.averaging import SharedTensors, mean_by_key
from fedamole.methods.shared.checks import check_at_least
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.params import Adapter, new_shared

BEGINNINGS = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5), (0.0, 0.0))
"""First population of the search: weights (personal, global)."""
MOST, L1 = 1.5, 0.05


@dataclass(frozen=True)
class Outer:
    """Server state: the global LoRA and, from round 1 on, the momentum of the outer optimiser."""

    tensors: Mapping[str, Tensor]
    momentum: Mapping[str, Tensor]
    begun: bool


@dataclass(frozen=True)
class Shared:
    """Message: the global LoRA, and whether it is a trained one."""

    tensors: Mapping[str, Tensor]
    begun: bool


@dataclass(frozen=True)
class FdLora(LoraMethod[Outer, Shared, OwnLora, SharedTensors]):
    """A personal and a global LoRA, combined with weights found without gradients."""

    weighting: Weighting = "uniform"
    """Weight of a client in the means: uniform, or by its training examples."""
    outer_learning_rate: float = 1.0
    """Step of the outer optimiser."""
    outer_momentum: float = 0.5
    """Nesterov momentum of the outer optimiser."""
    sync_every: int = 5
    """Rounds from one synchronisation to the next: in rounds 1, 1 + this, 1 + 2 times this, ... the trained global LoRA
    becomes the personal one too."""
    fusion_examples: int = 16
    """Number of examples on which the weights are found."""
    fusion_trials: int = 20
    """Number of pairs of weights that are tried, in populations of five."""

    paper = "Qi et al., FDLoRA: Personalized FL of LLMs via Dual LoRA Tuning, 2024, arXiv 2406.07925"
    communicates = "one LoRA down, one LoRA up"
    stays_local = "the data and the personal LoRA"
    evaluates = "post_aggregation"
    averaged_fields = ("tensors",)

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, sync_every=1, fusion_examples=1, fusion_trials=1)
        if self.outer_learning_rate <= 0 or not 0 <= self.outer_momentum < 1:
            raise ConfigError("method.outer_learning_rate must be above 0, method.outer_momentum from 0 to below 1")

    # server
    @override
    def init(self, server: Server) -> Outer:
        return Outer(new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora")), {}, False)

    @override
    def message(self, state: Outer, client: ClientInfo) -> Shared:
        return Shared(state.tensors, state.begun)

    @override
    def aggregate(self, server: Server, state: Outer, replies: Mapping[str, SharedTensors]) -> Outer:
        """Return the mean of the personal LoRAs after round 0, the step of the outer optimiser after later rounds."""
        trained = {name: reply.tensors for name, reply in replies.items()}
        means = mean_by_key(trained, server.weights(self.weighting), state.tensors)
        if not state.begun:
            return Outer(means, {name: torch.zeros_like(mean) for name, mean in means.items()}, True)
        tensors, momentum = {}, {}
        for name, before in state.tensors.items():
            gradient = before - means[name]
            momentum[name] = self.outer_momentum * state.momentum[name] + gradient
            tensors[name] = before - self.outer_learning_rate * (gradient + self.outer_momentum * momentum[name])
        return Outer(tensors, momentum, True)

    # client
    @override
    def init_client_state(self, client: Client) -> OwnLora:
        return OwnLora(new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora")))

    @override
    def adapter(self, client: Client, client_state: OwnLora, message: Shared) -> Adapter:
        """Return the personal LoRA in round 0, the global one afterwards."""
        return Adapter(self.spec(), message.tensors if message.begun else client_state.tensors)

    @override
    def reply(
        self, client: Client, client_state: OwnLora, message: Shared, trained: TrainingResult
    ) -> tuple[OwnLora, SharedTensors]:
        synchronised = not message.begun or (client.round - 1) % self.sync_every == 0
        return OwnLora(trained.adapter.tensors) if synchronised else client_state, SharedTensors(
            trained.adapter.tensors
        )

    @override
    def personal(
        self, client: Client, client_state: OwnLora, message: Shared | None, trained: Adapter | None
    ) -> Adapter | None:
        if message is None:
            return trained
        return self.fused(client_state, message, self.search(client, client_state, message))

    def fused(self, client_state: OwnLora, message: Shared, weights: tuple[float, float]) -> Adapter:
        """Return w1 times the personal plus w2 times the global LoRA, factor by factor."""
        own, shared, personal = *weights, client_state.tensors
        fused = {name: own * personal[name] + shared * value for name, value in message.tensors.items()}
        return Adapter(self.spec(), fused)

    def search(self, client: Client, client_state: OwnLora, message: Shared) -> tuple[float, float]:
        """Return the weights (personal, global) with the lowest regularised loss."""
        from scipy.optimize import differential_evolution

        def scores(population: np.ndarray) -> np.ndarray:
            pairs = population.reshape(2, -1).T
            adapters = [self.fused(client_state, message, (own, shared)) for own, shared in pairs.tolist()]
            losses = np.array(client.probe.losses(adapters, self.fusion_examples))
            return np.asarray(losses + L1 * np.abs(pairs).mean(1))

        result = differential_evolution(
            scores,
            [(-MOST, MOST)] * 2,
            init=np.array(BEGINNINGS),
            maxiter=-(-self.fusion_trials // 5) - 1,
            tol=0,
            polish=False,
            updating="deferred",
            vectorized=True,
            rng=numpy_generator(client.seed, "fusion", client.name, client.round),
        )
        return float(result.x[0]), float(result.x[1])
