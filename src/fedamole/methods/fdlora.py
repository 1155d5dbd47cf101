"""FDLoRA: Qi, Luan, Huang, Fung, Yang, Qian, "FDLoRA: Personalized Federated Learning of Large Language Model via Dual
LoRA Tuning", 2024, https://arxiv.org/abs/2406.07925.

Round 0: every client trains a personal LoRA, keeps it and sends it; the server's mean of them is the first global LoRA.
Every later round:
    the server sends the global LoRA to the cohort;
    every client trains it (the inner optimiser) and sends it back; every `sync_every` rounds, from round 1 on, it
    becomes the client's personal LoRA as well;
    the server takes the mean difference for a gradient of the outer optimiser, SGD with Nesterov momentum.
A client's model is w1 times its personal plus w2 times the global LoRA (factor by factor, as in LoraHub), with weights
found without gradients on a few of its examples: the loss plus 0.05 mean |w|, within -1.5 .. 1.5.
Deviations: the search is SciPy's differential evolution, a whole population in one pass, begun at the personal and the
global LoRA, their sum, their mean and nothing; its examples are drawn from those set aside from training. Round 0 is
one of the run's rounds (FedAMoLE's authors add it to them). A client that misses round 0 has a personal LoRA that does
nothing until it is synchronised.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, LoraMethod, Records, Server, TrainingResult, Weighting
from fedamole.federation.randomness import numpy_generator, torch_generator
from fedamole.methods.fedit import GlobalLora
from fedamole.methods.local_only import OwnLora
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.model.params import Adapter, new_shared

BEGINNINGS = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5), (0.0, 0.0))
"""Weights (personal, global) that the search begins with."""
MOST, L1 = 1.5, 0.05


@dataclass(frozen=True)
class Outer:
    """The server's state: the global LoRA, and the outer optimiser's momentum once the rounds have begun."""

    tensors: Mapping[str, Tensor]
    momentum: Mapping[str, Tensor]
    begun: bool


@dataclass(frozen=True)
class Shared:
    """Message down: the global LoRA, and whether there is one yet."""

    tensors: Mapping[str, Tensor]
    begun: bool


@dataclass(frozen=True)
class FdLora(LoraMethod[Outer, Shared, OwnLora, GlobalLora]):
    """A personal and a global LoRA, fused without gradients."""

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
    """Examples on which the weights are found."""
    fusion_trials: int = 20
    """Pairs of weights that are tried, in populations of five."""

    paper = "Qi et al., FDLoRA: Personalized FL of LLMs via Dual LoRA Tuning, 2024, arXiv 2406.07925"
    communicates = "one LoRA down, one LoRA up"
    stays_local = "the data and the personal LoRA"
    records = Records(Outer, Shared, OwnLora, GlobalLora)
    evaluates = "post_aggregation"
    averaged = ("tensors",)

    def __post_init__(self) -> None:
        """Refuse counts below 1, and an optimiser that cannot work."""
        super().__post_init__()
        for key in ("sync_every", "fusion_examples", "fusion_trials"):
            if getattr(self, key) < 1:
                raise ConfigError(f"method.{key} = {getattr(self, key)}: must be at least 1")
        if self.outer_learning_rate <= 0 or not 0 <= self.outer_momentum < 1:
            raise ConfigError("method.outer_learning_rate must be above 0, method.outer_momentum from 0 to below 1")

    # server
    def init(self, server: Server) -> Outer:
        """Draw the LoRA that everybody begins with."""
        return Outer(new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora")), {}, False)

    def message(self, state: Outer, client: ClientInfo) -> Shared:
        """Send the global LoRA."""
        return Shared(state.tensors, state.begun)

    def aggregate(self, server: Server, state: Outer, replies: Mapping[str, GlobalLora]) -> Outer:
        """Take the mean of the personal LoRAs first, then steps of the outer optimiser."""
        returned = {name: reply.tensors for name, reply in replies.items()}
        means = mean_by_key(returned, server.weights(self.weighting), state.tensors)
        if not state.begun:
            return Outer(means, {name: torch.zeros_like(mean) for name, mean in means.items()}, True)
        tensors, momentum = {}, {}
        for name, before in state.tensors.items():
            gradient = before - means[name]
            momentum[name] = self.outer_momentum * state.momentum[name] + gradient
            tensors[name] = before - self.outer_learning_rate * (gradient + self.outer_momentum * momentum[name])
        return Outer(tensors, momentum, True)

    # client
    def init_client_state(self, client: Client) -> OwnLora:
        """Begin where the global LoRA begins."""
        return OwnLora(new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora")))

    def adapter(self, client: Client, client_state: OwnLora, message: Shared) -> Adapter:
        """Train the personal LoRA first, the global one from then on."""
        return Adapter(self.spec(), message.tensors if message.begun else client_state.tensors)

    def reply(
        self, client: Client, client_state: OwnLora, message: Shared, trained: TrainingResult
    ) -> tuple[OwnLora, GlobalLora]:
        """Send back the trained LoRA."""
        synced = not message.begun or (client.round - 1) % self.sync_every == 0
        return OwnLora(trained.adapter.tensors) if synced else client_state, GlobalLora(trained.adapter.tensors)

    def personal(
        self, client: Client, client_state: OwnLora, message: Shared | None, trained: Adapter | None
    ) -> Adapter | None:
        """Fuse the personal and the global LoRA."""
        return (
            trained
            if message is None
            else self.fused(client_state, message, self.search(client, client_state, message))
        )

    def fused(self, client_state: OwnLora, message: Shared, weights: tuple[float, float]) -> Adapter:
        """w1 times the personal plus w2 times the global LoRA, factor by factor."""
        own, shared = weights
        return Adapter(
            self.spec(),
            {name: own * client_state.tensors[name] + shared * value for name, value in message.tensors.items()},
        )

    def search(self, client: Client, client_state: OwnLora, message: Shared) -> tuple[float, float]:
        """Find the weights (personal, global) with the lowest regularised loss."""
        from scipy.optimize import differential_evolution

        def scores(population: np.ndarray) -> np.ndarray:
            pairs = population.reshape(2, -1).T
            adapters = [self.fused(client_state, message, (own, shared)) for own, shared in pairs.tolist()]
            losses = np.array(client.losses(adapters, self.fusion_examples))
            return np.asarray(losses + L1 * np.abs(pairs).mean(1))

        found = differential_evolution(
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
        return float(found.x[0]), float(found.x[1])
