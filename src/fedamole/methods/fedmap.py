"""FedMAP: Zhang, Kreuter, Esteve-Yagüe et al., "Unlocking Potential in Personalized Federated Learning through Bi-Level
MAP Optimization", 2024, https://arxiv.org/abs/2405.19000; the prior is that of the first version.

One round:
    1. The server sends the mean mu and the variance s^2 of a Gaussian prior over LoRAs to the selected clients.
    2. Each client continues to train its own LoRA theta, in its first round mu, with |theta - mu|^2 / (2 s^2) added to
       its loss. It sends back theta and its likelihood exp(-l), where l is the mean loss on examples set aside.
    3. The server averages the LoRAs into the next mu, with weights exp(-l) exp(-|theta - mu|^2 / (2 s^2)).
       With `variance_estimate = "fitted"` the next s^2 is the mean squared distance per value of the clients from the
       new mu, weighted by their training examples.
The model of a client is its own theta.
Deviations: the likelihood is that of examples set aside; in the released code it is that of the training data. The
server computes the prior's part of a weight itself, and a likelihood above 1 counts as 1. The released code contains
these weights and the fitted variance, but runs with weights by examples and a fixed variance. All clients start from
the same random LoRA. The prior of the paper's second version, an input-convex neural network, is not implemented.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from math import exp, log
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, Server, TrainingRequest, TrainingResult
from fedamole.federation.penalties import Proximal
from fedamole.federation.randomness import torch_generator
from fedamole.federation.weights import capped
from fedamole.methods.local_only import OwnLora
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.params import Adapter, Tensors, new_shared


@dataclass(frozen=True)
class Prior:
    """Server state and message: the Gaussian prior."""

    tensors: Mapping[str, Tensor]
    """Its mean, a LoRA."""
    numbers: Mapping[str, Tensor]
    """variance: that of every value, float64."""

    @property
    def variance(self) -> float:
        """Variance s^2 of every value."""
        return float(self.numbers["variance"])


@dataclass(frozen=True)
class Estimate:
    """Reply: the client's LoRA."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Tensor]
    """likelihood: exp(-l), where l is the mean loss per answer token on examples that are set aside, float64."""


def squared_distance(tensors: Tensors, mean: Tensors) -> float:
    """Return the squared Euclidean distance of two LoRAs."""
    return sum(float((tensors[name].double() - mean[name].double()).square().sum()) for name in sorted(mean))


@dataclass(frozen=True)
class FedMap(LoraMethod[Prior, Prior, OwnLora, Estimate]):
    """A LoRA per client under a Gaussian prior that the server fits to the clients' LoRAs."""

    variance: float = 15.0
    """Variance of the prior in the first round (the released code: 15)."""
    variance_estimate: Literal["fixed", "fitted"] = "fixed"
    """Whether the variance stays as it is, or is fitted to the clients' LoRAs in each round."""
    probe_examples: int = 64
    """Largest number of examples on which a client computes the likelihood of its LoRA."""
    weighting: Literal["posterior", "examples", "uniform"] = "posterior"
    """Weight of a client in the mean: its posterior density, its training examples, or uniform."""

    paper = "Zhang et al., Bi-Level MAP Optimization (FedMAP), 2024, arXiv 2405.19000"
    communicates = "one LoRA and a variance down, one LoRA and its likelihood up"
    stays_local = "the data"
    evaluates = "pre_aggregation"
    probes = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1e-12 <= self.variance <= 1e30:
            raise ConfigError(f"method.variance = {self.variance}: must be from 1e-12 to 1e30")
        if self.probe_examples < 1:
            raise ConfigError(f"method.probe_examples = {self.probe_examples}: must be at least 1")

    # server
    @override
    def init(self, server: Server) -> Prior:
        first = new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora"))
        return Prior(first, {"variance": torch.tensor(self.variance, dtype=torch.float64)})

    @override
    def message(self, state: Prior, client: ClientInfo) -> Prior:
        return state

    @override
    def aggregate(self, server: Server, state: Prior, replies: Mapping[str, Estimate]) -> Prior:
        """Return the prior with the weighted mean of the clients' LoRAs, and their variance if it is fitted."""
        trained = {name: reply.tensors for name, reply in replies.items()}
        mean = mean_by_key(trained, self.weights(server, state, replies), state.tensors)
        numbers = state.numbers
        if self.variance_estimate == "fitted":
            examples, values = server.weights("examples"), sum(tensor.numel() for tensor in mean.values())
            total = sum(examples[name] * squared_distance(trained[name], mean) for name in sorted(trained))
            fitted = total / values / sum(examples[name] for name in trained)
            # Of a single client, or equal ones, the variance is 0, with which nobody could learn any more.
            if fitted >= 1e-12:
                numbers = {"variance": torch.tensor(fitted, dtype=torch.float64)}
        return Prior(mean, numbers)

    def weights(self, server: Server, state: Prior, replies: Mapping[str, Estimate]) -> dict[str, float]:
        """Return the weights of the clients that replied in the mean of their LoRAs."""
        if self.weighting != "posterior":
            return server.weights(self.weighting)
        names = sorted(replies)
        # Limited, because a client may claim any number, and the logarithm of 0 is not finite.
        logarithms = torch.tensor(
            [
                log(min(1.0, max(1e-300, float(replies[name].numbers["likelihood"]))))
                - squared_distance(replies[name].tensors, state.tensors) / (2 * state.variance)
                for name in names
            ],
            dtype=torch.float64,
        )
        return capped(dict(zip(names, logarithms.softmax(0).tolist(), strict=True)), server.max_weight_share)

    # client
    @override
    def init_client_state(self, client: Client) -> OwnLora:
        return OwnLora({})

    @override
    def adapter(self, client: Client, client_state: OwnLora, message: Prior) -> Adapter:
        """Return the client's own LoRA, in its first round the mean of the prior."""
        return Adapter(self.spec(), client_state.tensors or message.tensors)

    @override
    def update(
        self, client: Client, client_state: OwnLora, message: Prior
    ) -> Generator[TrainingRequest, TrainingResult, tuple[OwnLora, Estimate, TrainingResult]]:
        adapter = self.adapter(client, client_state, message)
        trained = yield TrainingRequest(adapter, penalty=Proximal(message.tensors, 1 / message.variance))
        return (*self.reply(client, client_state, message, trained), trained)

    @override
    def reply(
        self, client: Client, client_state: OwnLora, message: Prior, trained: TrainingResult
    ) -> tuple[OwnLora, Estimate]:
        """Keep the trained LoRA and return it with its likelihood on examples that are set aside."""
        (loss,) = client.probe.losses([trained.adapter], self.probe_examples)
        tensors = trained.adapter.tensors
        return OwnLora(tensors), Estimate(tensors, {"likelihood": torch.tensor(exp(-loss), dtype=torch.float64)})
