"""FedALT: Bian, Wang, Zhang, Xu, "FedALT: Federated Fine-Tuning through Adaptive Local Training with Rest-of-World
LoRA", AAAI 2026, https://arxiv.org/abs/2503.11880.

One round:
    the server sends each client of the cohort the mean of all other clients' LoRAs, the rest of the world;
    the client goes on training a LoRA of its own beside it, which is frozen, and in every module a mixer, a softmax
    over the two for each token;
    it keeps both and sends its LoRA back.
A client's model is its own LoRA, its mixer and the rest of the world, scored after the aggregation.
Deviations: mixers begin at 0, both weighed alike (the authors' code draws them). Before anybody has answered the rest
of the world is a LoRA that does nothing; absent clients count with the LoRA that they sent last.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedamole.federation.method import Client, ClientInfo, DecayedLoraMethod, Records, Server, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.model.amole import AdapterSpec
from fedamole.model.mixer import LearnedRouter
from fedamole.model.params import Adapter, as_expert, expert_keys, mixer_key, new_shared, shared_keys

OWN, REST = 0, 1


@dataclass(frozen=True)
class Everybody:
    """The server's state: the LoRA that each client sent last, by <client>/<name>, and one that does nothing."""

    latest: Mapping[str, Tensor]
    nothing: Mapping[str, Tensor]
    weights: dict[str, float]


@dataclass(frozen=True)
class RestOfWorld:
    """Message down: the mean of the other clients' LoRAs."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class OwnAndMixer:
    """What a client keeps: its LoRA, as expert 0 of a mixture, and the mixers."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class SentLora:
    """Reply up: the client's LoRA."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class FedAlt(DecayedLoraMethod[Everybody, RestOfWorld, OwnAndMixer, SentLora]):
    """A LoRA per client beside the frozen mean of all others, mixed token by token."""

    weighting: Weighting = "uniform"
    """Weight of a client in the rest of the world: uniform, or by its training examples."""

    paper = "Bian et al., FedALT: Adaptive Local Training with Rest-of-World LoRA, AAAI 2026, arXiv 2503.11880"
    communicates = "the mean of the others' LoRAs down, the client's LoRA up"
    stays_local = "the data and the mixers"
    records = Records(Everybody, RestOfWorld, OwnAndMixer, SentLora)
    evaluates = "post_aggregation"

    # server
    def init(self, server: Server) -> Everybody:
        """Know nobody's LoRA."""
        nothing = new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora"))
        return Everybody({}, nothing, server.weights(self.weighting))

    def message(self, state: Everybody, client: ClientInfo) -> RestOfWorld:
        """Send the mean of all others."""
        others: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.latest.items():
            owner, _, rest = name.partition("/")
            if owner != client.name:
                others.setdefault(owner, {})[rest] = tensor
        return RestOfWorld(mean_by_key(others, state.weights, state.nothing))

    def aggregate(self, server: Server, state: Everybody, replies: Mapping[str, SentLora]) -> Everybody:
        """Remember what each client sent last."""
        sent = {f"{client}/{name}": t for client, reply in replies.items() for name, t in reply.tensors.items()}
        latest = dict(sorted({**state.latest, **sent}.items()))
        return replace(state, latest=latest, weights=server.weights(self.weighting))

    # client
    def spec(self) -> AdapterSpec:
        """What all adapters share, weighted by a mixer."""
        return replace(super().spec(), router=LearnedRouter())

    def init_client_state(self, client: Client) -> OwnAndMixer:
        """Begin with the LoRA that does nothing, and mixers that weigh both alike."""
        drawn = new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora"))
        mixers = {mixer_key(module): torch.zeros(2, d_in) for module, (d_in, _) in client.shapes.items()}
        return OwnAndMixer({**as_expert(drawn, OWN), **mixers})

    def adapter(self, client: Client, client_state: OwnAndMixer, message: RestOfWorld) -> Adapter:
        """Put the client's LoRA and mixers beside the frozen rest of the world."""
        rest = as_expert(message.tensors, REST)
        return Adapter(self.spec(), {**client_state.tensors, **rest}, frozen=tuple(sorted(rest)))

    def reply(
        self, client: Client, client_state: OwnAndMixer, message: RestOfWorld, trained: TrainingResult
    ) -> tuple[OwnAndMixer, SentLora]:
        """Keep LoRA and mixers, send the LoRA."""
        tensors, sent = trained.adapter.tensors, dict[str, Tensor]()
        for module in client.shapes:
            for key, expert_key in zip(shared_keys(module), expert_keys(module, OWN), strict=True):
                sent[key] = tensors[expert_key]
        return OwnAndMixer({name: tensors[name] for name in client_state.tensors}), SentLora(sent)
