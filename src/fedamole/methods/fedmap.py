"""FedMAP: Zhang, Kreuter, Esteve-Yagüe et al., "Unlocking Potential in Personalized Federated Learning through Bi-Level
MAP Optimization", 2024, https://arxiv.org/abs/2405.19000.

The prior over LoRAs has the density exp(-R(theta; mu)). `prior = "gaussian"` is that of the paper's first version,
R = |theta - mu|^2 / (2 s^2); "icnn" is that of the second: R = w ICNN(theta, mu) + |theta - mu|^2 / (2 s^2)
+ e (|theta|^2 + |mu|^2), with an input-convex neural network (`shared/convex_prior.py`) that the server trains.

One round:
    1. The server sends the prior to the selected clients: its mean mu, the variance s^2, and with "icnn" the network.
    2. Each client continues to train its own LoRA theta, in its first round mu, with R added to its loss. It sends back
       theta and its likelihood exp(-l), where l is the mean loss on examples set aside.
    3. The server averages the LoRAs into the next mu, with weights exp(-l) exp(-R).
       With "icnn" it takes gradient steps of the network on the mean of R over the clients' LoRAs, at the new mu and
       with the same weights (the outer level of the bi-level optimisation).
       With `variance_estimate = "fitted"` the next s^2 is the mean squared distance per value of the clients from the
       new mu, weighted by their training examples.
The model of a client is its own theta.
Deviations: the likelihood is that of examples set aside; in the released code it is that of the training data. The
server computes R in a weight itself, and a likelihood above 1 counts as 1. All clients start from the same random LoRA.
First version: the released code contains these weights and the fitted variance, but runs with weights by examples and a
fixed variance. Second version: a network per tensor that reads all values of theta and mu would be far larger than the
LoRAs, so one small network for all tensors reads eight numbers of each. Weights that must not be negative are softplus
values; the released code sets negative ones to 0. The network's gradient has at most norm 1. R is not divided by the
client's number of examples in the weights, and a client continues from its own theta: the released code divides, and
starts from mu. Its |theta - mu|^2 / 200 is `variance = 100`. The objective has no normalising constant of the density,
as in the released code, so that the network can only become lower and flatter where the clients' LoRAs are.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, Server, TrainingRequest, TrainingResult
from fedamole.federation.penalties import Penalty, Proximal
from fedamole.federation.randomness import torch_generator
from fedamole.federation.weights import capped
from fedamole.methods.local_only import OwnLora
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.checks import check_at_least
from fedamole.methods.shared.convex_prior import ConvexPrior, check_net, fitted_net, new_net
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.params import Adapter, Tensors, new_shared


@dataclass(frozen=True)
class Prior:
    """Server state and message: the prior."""

    tensors: Mapping[str, Tensor]
    """Its mean, a LoRA."""
    numbers: Mapping[str, Tensor]
    """variance: that of every value, float64."""
    net: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights of the network; empty with a Gaussian prior."""

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
    """A LoRA per client under a prior that the server fits to the clients' LoRAs."""

    prior: Literal["gaussian", "icnn"] = "gaussian"
    """Prior of the paper's first version (gaussian), or of the second, with an input-convex neural network (icnn)."""
    variance: float = 15.0
    """Variance of the prior in the first round (the released code: 15)."""
    variance_estimate: Literal["fixed", "fitted"] = "fixed"
    """Whether the variance stays as it is, or is fitted to the clients' LoRAs in each round."""
    probe_examples: int = 64
    """Largest number of examples on which a client computes the likelihood of its LoRA."""
    net_weight: float = 1.0
    """icnn: weight w of the network's output."""
    norm_weight: float = 1e-4
    """icnn: weight e of the squared norms of a LoRA and of the mean (the released code: 1e-4)."""
    net_learning_rate: float = 1e-3
    """icnn: learning rate of the network at the server (the released code: 1e-3)."""
    net_steps: int = 2
    """icnn: gradient steps of the network in a round (the released code: 2)."""
    weighting: Literal["posterior", "examples", "uniform"] = "posterior"
    """Weight of a client in the mean: its posterior density, its training examples, or uniform."""

    paper = "Zhang et al., Bi-Level MAP Optimization (FedMAP), 2024, arXiv 2405.19000"
    communicates = "one LoRA, a variance and with icnn a network down, one LoRA and its likelihood up"
    stays_local = "the data"
    evaluates = "pre_aggregation"
    probes = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1e-12 <= self.variance <= 1e30:
            raise ConfigError(f"method.variance = {self.variance}: must be from 1e-12 to 1e30")
        check_at_least(self, probe_examples=1)
        for key in ("net_weight", "norm_weight"):
            if not 0 <= getattr(self, key) <= 1e30:
                raise ConfigError(f"method.{key} = {getattr(self, key)}: must be from 0 to 1e30")
        if not 0 < self.net_learning_rate <= 10:
            raise ConfigError(f"method.net_learning_rate = {self.net_learning_rate}: must be above 0 and at most 10")
        if not 0 <= self.net_steps <= 10_000:
            raise ConfigError(f"method.net_steps = {self.net_steps}: must be from 0 to 10000")

    def convex_prior(self, prior: Prior, seed: int) -> ConvexPrior:
        """Return R of the second version; `seed` is that of the run."""
        distance_weight = 1 / (2 * prior.variance)
        return ConvexPrior(prior.tensors, prior.net, self.net_weight, distance_weight, self.norm_weight, seed)

    # server
    @override
    def init(self, server: Server) -> Prior:
        first = new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora"))
        net = new_net(torch_generator(server.seed, "prior/net")) if self.prior == "icnn" else {}
        return Prior(first, {"variance": torch.tensor(self.variance, dtype=torch.float64)}, net)

    @override
    def message(self, state: Prior, client: ClientInfo) -> Prior:
        return state

    @override
    def aggregate(self, server: Server, state: Prior, replies: Mapping[str, Estimate]) -> Prior:
        """Return the prior with the weighted mean of the clients' LoRAs, and network and variance fitted to them."""
        trained = {name: reply.tensors for name, reply in replies.items()}
        weights = self.weights(server, state, replies)
        mean = mean_by_key(trained, weights, state.tensors)
        numbers = state.numbers
        if self.variance_estimate == "fitted":
            examples, values = server.weights("examples"), sum(tensor.numel() for tensor in mean.values())
            total = sum(examples[name] * squared_distance(trained[name], mean) for name in sorted(trained))
            fitted = total / values / sum(examples[name] for name in trained)
            # Of a single client, or equal ones, the variance is 0, with which nobody could learn any more.
            if fitted >= 1e-12:
                numbers = {"variance": torch.tensor(fitted, dtype=torch.float64)}
        after = Prior(mean, numbers, state.net)
        if self.prior == "icnn":
            names = sorted(trained)
            shares = torch.tensor([weights[name] for name in names], dtype=torch.float64)
            shares *= self.net_weight / shares.sum()
            inputs = self.convex_prior(after, server.seed).inputs([trained[name] for name in names])
            after = replace(after, net=fitted_net(state.net, inputs, shares, self.net_steps, self.net_learning_rate))
        return after

    def weights(self, server: Server, state: Prior, replies: Mapping[str, Estimate]) -> dict[str, float]:
        """Return the weights of the clients that replied in the mean of their LoRAs."""
        if self.weighting != "posterior":
            return server.weights(self.weighting)
        names = sorted(replies)
        # Limited, because a client may claim any number, and the logarithm of 0 is not finite.
        likelihoods = [log(min(1.0, max(1e-300, float(replies[name].numbers["likelihood"])))) for name in names]
        logarithms = torch.tensor(likelihoods, dtype=torch.float64) - self.energies(
            server, state, [replies[name].tensors for name in names]
        )
        return capped(dict(zip(names, logarithms.softmax(0).tolist(), strict=True)), server.max_weight_share)

    def energies(self, server: Server, state: Prior, loras: Sequence[Tensors]) -> Tensor:
        """Return R (n) of n LoRAs, in float64."""
        if self.prior == "icnn":
            return self.convex_prior(state, server.seed).energies(loras)
        distances = [squared_distance(lora, state.tensors) for lora in loras]
        return torch.tensor(distances, dtype=torch.float64) / (2 * state.variance)

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
        trained = yield TrainingRequest(adapter, penalty=self.penalty(client, message))
        return (*self.reply(client, client_state, message, trained), trained)

    def penalty(self, client: Client, message: Prior) -> Penalty:
        """Return R as a term of the loss; a PayloadError for a network that is not finite or has another form."""
        if self.prior == "gaussian":
            return Proximal(message.tensors, 1 / message.variance)
        check_net(message.net)
        return self.convex_prior(message, client.seed)

    @override
    def reply(
        self, client: Client, client_state: OwnLora, message: Prior, trained: TrainingResult
    ) -> tuple[OwnLora, Estimate]:
        """Keep the trained LoRA and return it with its likelihood on examples that are set aside."""
        (loss,) = client.probe.losses([trained.adapter], self.probe_examples)
        tensors = trained.adapter.tensors
        return OwnLora(tensors), Estimate(tensors, {"likelihood": torch.tensor(exp(-loss), dtype=torch.float64)})
