"""FedALT: Bian, Wang, Zhang, Xu, "FedALT: Federated Fine-Tuning through Adaptive Local Training with Rest-of-World
LoRA", AAAI 2026, https://arxiv.org/abs/2503.11880.

One round:
    1. The server sends each selected client the mean of all other clients' LoRAs, the rest-of-world LoRA.
    2. The client trains a LoRA of its own beside the frozen rest-of-world LoRA and, in every module, a mixer: a softmax
       over the two for each token.
    3. It keeps its LoRA and the mixers, and sends its LoRA.
The model of a client is its own LoRA, its mixers and the rest-of-world LoRA, scored after the aggregation.
Deviations: mixers start at 0, which weights both LoRAs equally (random in the authors' code). Before any reply the
rest-of-world LoRA has B = 0. Clients that are not selected count with the LoRA that they sent last.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.federation.method import OWN_EXPERT, Client, ClientInfo, Server, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.lora import DecayedLoraMethod
from fedamole.model.amole import AdapterSpec
from fedamole.model.mixer import LearnedRouter
from fedamole.model.params import Adapter, as_expert, expert_as_lora, mixer_key, new_shared

OWN, REST = 0, 1


@dataclass(frozen=True)
class LatestLoras:
    """Server state: the LoRA that each client sent last, by client, and a LoRA with B = 0."""

    latest: Mapping[str, Mapping[str, Tensor]]
    initial: Mapping[str, Tensor]
    weights: dict[str, float]


@dataclass(frozen=True)
class RestOfWorld:
    """Message: the mean of the other clients' LoRAs."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class OwnAndMixer:
    """Client state: the client's LoRA, as expert 0 of a mixture, and the mixers."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class SentLora:
    """Reply: the client's LoRA."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class FedAlt(DecayedLoraMethod[LatestLoras, RestOfWorld, OwnAndMixer, SentLora]):
    """A LoRA per client beside the frozen mean of all others, mixed for each token."""

    weighting: Weighting = "uniform"
    """Weight of a client in the rest of the world: uniform, or by its training examples."""

    paper = "Bian et al., FedALT: Adaptive Local Training with Rest-of-World LoRA, AAAI 2026, arXiv 2503.11880"
    communicates = "the mean of the others' LoRAs down, the client's LoRA up"
    stays_local = "the data and the mixers"
    evaluates = "post_aggregation"
    expert_roles = (OWN_EXPERT, "the mean of the other clients")

    # server
    @override
    def init(self, server: Server) -> LatestLoras:
        initial = new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora"))
        return LatestLoras({}, initial, server.weights(self.weighting))

    @override
    def message(self, state: LatestLoras, client: ClientInfo) -> RestOfWorld:
        others = {name: lora for name, lora in state.latest.items() if name != client.name}
        return RestOfWorld(mean_by_key(others, state.weights, state.initial))

    @override
    def aggregate(self, server: Server, state: LatestLoras, replies: Mapping[str, SentLora]) -> LatestLoras:
        latest = {**state.latest, **{name: reply.tensors for name, reply in replies.items()}}
        return replace(state, latest=latest, weights=server.weights(self.weighting))

    # client
    @override
    def spec(self) -> AdapterSpec:
        return replace(super().spec(), router=LearnedRouter())

    @override
    def init_client_state(self, client: Client) -> OwnAndMixer:
        lora = new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora"))
        mixers = {mixer_key(module): torch.zeros(2, d_in) for module, (d_in, _) in client.shapes.items()}
        return OwnAndMixer({**as_expert(lora, OWN), **mixers})

    @override
    def adapter(self, client: Client, client_state: OwnAndMixer, message: RestOfWorld) -> Adapter:
        rest = as_expert(message.tensors, REST)
        return Adapter(self.spec(), {**client_state.tensors, **rest}, frozen=tuple(sorted(rest)))

    @override
    def reply(
        self, client: Client, client_state: OwnAndMixer, message: RestOfWorld, trained: TrainingResult
    ) -> tuple[OwnAndMixer, SentLora]:
        tensors = trained.adapter.tensors
        own = {name: tensors[name] for name in client_state.tensors}
        return OwnAndMixer(own), SentLora(expert_as_lora(tensors, OWN))
