"""FedAMoLE-Peers: this project's own variant of FedAMoLE (Zhang et al., https://arxiv.org/abs/2411.19128), in which
clients with similar data share experts.

As in FedAMoLE, the data decide which client holds which expert, and the experts choose the clients. Ours:
    - Each client is the home of one expert. The expert chooses the clients that are most similar to its home, and none
      that are not similar enough. A client to which no other is similar trains as with `local_only`.
    - Similarity is the cosine of the changes of B in the clients' first training, which all start from the same LoRA,
      averaged over the modules. A client sends nothing for it that it does not send anyway.
    - A part of the rank is private: it is trained with the expert, as one LoRA, and never leaves the client. It takes
      the place of FedAMoLE's always-on expert, which is averaged over all clients.
    - A client's model is scored after the aggregation.

One round:
    1. The server sends each selected client the mean of the experts that have chosen it, with that of its own home.
    2. The client trains it together with its private part, and sends it back as the expert of its home.
    3. The server compares the first changes of new clients with those of all others, and the experts choose again.
"""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, Server, TrainingRequest, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.params import Adapter, Shapes, Tensors, new_shared

MEMORY = 0.5
"""Share of the earlier comparisons that a client keeps when it compares again."""


@dataclass(frozen=True)
class Homes:
    """Server state: the expert of each client, its first change, and the clients that it has chosen."""

    first: Mapping[str, Tensor]
    """The expert that all clients start from."""
    experts: Mapping[str, Mapping[str, Tensor]]
    """The expert that each client returned last, by client."""
    changes: Mapping[str, Mapping[str, Tensor]]
    """Change of B in each client's first training, by client and module."""
    chosen: dict[str, list[str]]
    """Clients that the expert of each client has chosen, sorted, with its home."""
    weights: dict[str, float]
    """Weight of each client's expert in a mean."""


@dataclass(frozen=True)
class PeerExpert:
    """Message and reply: the shared part of a LoRA."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class OwnParts:
    """Client state: what the client has trained last, and how it compares with the mean of its experts."""

    private: Mapping[str, Tensor]
    expert: Mapping[str, Tensor]
    """The client's own expert; empty before its first round."""
    excess: float
    """Running sum of the loss with the mean minus the loss with the own expert, in nats; above 0: the client uses its
    own."""


@dataclass(frozen=True)
class FedAmolePeers(LoraMethod[Homes, PeerExpert, OwnParts, PeerExpert]):
    """Experts shared among clients with similar data, beside a private part."""

    private_share: float = 0.5
    """Share of the rank that is private, rounded down, from 0 (all is shared) to below 1."""
    min_similarity: float = 0.65
    """Smallest cosine similarity between the home of an expert and a client that it chooses."""
    expert_choices: int = 8
    """Largest number of clients, besides its home, that an expert chooses."""
    min_group: int = 2
    """Smallest number of experts in a mean; a client chosen by fewer gets its own alone. 3 in a deployment."""
    fallback: bool = True
    """Whether a client uses its own expert where that has a lower loss on its embedding split than the mean."""
    probe_examples: int = 64
    """Largest number of examples on which a client compares the two."""
    weighting: Weighting = "uniform"
    """Weight of a client's expert in a mean: uniform, or by its training examples."""

    paper = "this project's variant of FedAMoLE (Zhang et al., WWW 2026, arXiv 2411.19128)"
    communicates = "the shared part of one LoRA both ways"
    stays_local = "the data and the private part of the LoRA"
    evaluates = "post_aggregation"
    probes = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.private_share < 1:
            raise ConfigError(f"method.private_share = {self.private_share}: must be at least 0 and below 1")
        if not -1 <= self.min_similarity <= 1:
            raise ConfigError(f"method.min_similarity = {self.min_similarity}: must be between -1 and 1")
        for key, least in (("expert_choices", 0), ("min_group", 2), ("probe_examples", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"method.{key} = {getattr(self, key)}: must be at least {least}")

    @override
    def for_deployment(self) -> "FedAmolePeers":
        """Return the method with `min_group` = 3, so that no client can compute the expert of a single other."""
        return replace(self, min_group=max(3, self.min_group))

    @override
    def exposes(self, clients: int | None, shapes: Shapes | None) -> list[str]:
        if self.min_group > 2 or self.expert_choices == 0:
            return []
        return [
            "Two clients with similar data may share experts between them alone. Each can subtract its own part of the "
            "mean, and has the other's update. method.min_group = 3 prevents it."
        ]

    # server
    @override
    def init(self, server: Server) -> Homes:
        lora = new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora"))
        return Homes(self._parts(lora)[1], {}, {}, {}, server.weights(self.weighting))

    @override
    def message(self, state: Homes, client: ClientInfo) -> PeerExpert:
        experts = {home: state.experts[home] for home, chosen in state.chosen.items() if client.name in chosen}
        if len(experts) < self.min_group:
            experts = {home: expert for home, expert in experts.items() if home == client.name}
        return PeerExpert(mean_by_key(experts, state.weights, state.first))

    @override
    def aggregate(self, server: Server, state: Homes, replies: Mapping[str, PeerExpert]) -> Homes:
        """Keep the returned experts and let all experts choose (step 3)."""
        first = {
            name: {key: tensor - state.first[key] for key, tensor in reply.tensors.items() if key.endswith("/B")}
            for name, reply in replies.items()
            if name not in state.changes
        }
        experts = {**state.experts, **{name: reply.tensors for name, reply in replies.items()}}
        changes = {**state.changes, **first}
        weights = server.weights(self.weighting)
        return replace(state, experts=experts, changes=changes, chosen=self.choose(changes), weights=weights)

    def choose(self, changes: Mapping[str, Tensors]) -> dict[str, list[str]]:
        """Return the clients that each client's expert chooses, from the first changes by client."""
        names, similarity = sorted(changes), similarities(changes)
        chosen = {}
        for i, home in enumerate(names):
            others = sorted((j for j in range(len(names)) if j != i), key=lambda j: (-float(similarity[i, j]), j))
            near = [names[j] for j in others if similarity[i, j] >= self.min_similarity][: self.expert_choices]
            chosen[home] = sorted([home, *near])
        return chosen

    @override
    def assignment_log(self, state: Homes) -> Iterator[dict[str, Any]]:
        """Yield the experts of each client by the index of their home, with the similarity of home and client."""
        names = sorted(state.chosen)
        similarity = similarities(state.changes) if names else torch.zeros(0, 0)
        for i, name in enumerate(names):
            held = [j for j, home in enumerate(names) if name in state.chosen[home]]
            relevance = [round(float(similarity[i, j]), 6) for j in held]
            yield {"module": "all", "client": name, "experts": held, "relevance": relevance}

    # client
    @override
    def init_client_state(self, client: Client) -> OwnParts:
        lora = new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora"))
        return OwnParts(self._parts(lora)[0], {}, 0.0)

    @override
    def adapter(self, client: Client, client_state: OwnParts, message: PeerExpert) -> Adapter:
        """Return the LoRA of the private part, and the message or the client's own expert."""
        return self._adapters(client_state, message)[self.excess(client, client_state, message) > 0]

    def excess(self, client: Client, client_state: OwnParts, message: PeerExpert) -> float:
        """Return the client's `excess` after a comparison of the message with its own expert."""
        if not (self.fallback and client_state.expert) or same(client_state.expert, message.tensors):
            return 0.0
        with_mean, with_own = client.probe.losses(self._adapters(client_state, message), self.probe_examples)
        return MEMORY * client_state.excess + with_mean - with_own

    def _adapters(self, client_state: OwnParts, message: PeerExpert) -> list[Adapter]:
        """Return the LoRAs with the message and with the client's own expert, if it has one."""
        private, parts = (
            client_state.private,
            [message.tensors, *([client_state.expert] if client_state.expert else [])],
        )
        joined = [
            {key: torch.cat([private[key], tensor], 0 if key.endswith("/A") else 1) for key, tensor in part.items()}
            if private
            else part
            for part in parts
        ]
        return [Adapter(self.spec(), tensors) for tensors in joined]

    @override
    def update(
        self, client: Client, client_state: OwnParts, message: PeerExpert
    ) -> Generator[TrainingRequest, TrainingResult, tuple[OwnParts, PeerExpert, TrainingResult]]:
        compared = replace(client_state, excess=self.excess(client, client_state, message))
        trained = yield TrainingRequest(self._adapters(client_state, message)[compared.excess > 0])
        return (*self.reply(client, compared, message, trained), trained)

    @override
    def reply(
        self, client: Client, client_state: OwnParts, message: PeerExpert, trained: TrainingResult
    ) -> tuple[OwnParts, PeerExpert]:
        private, expert = self._parts(trained.adapter.tensors)
        return OwnParts(private, expert, client_state.excess), PeerExpert(expert)

    def _parts(self, lora: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Split a LoRA into its private part, the first rows of A and columns of B, and the rest."""
        own, shared, rank = dict[str, Tensor](), dict[str, Tensor](), int(self.private_share * self.rank)
        for key, tensor in lora.items():
            private, rest = tensor.split([rank, self.rank - rank], 0 if key.endswith("/A") else 1)
            shared[key] = rest.contiguous()
            if rank:
                own[key] = private.contiguous()
        return own, shared


def same(first: Tensors, second: Tensors) -> bool:
    """Return whether two sets of tensors with the same names are equal."""
    return all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def similarities(changes: Mapping[str, Tensors]) -> Tensor:
    """Return the mean over modules of the cosine similarity of changes, (C, C) in float64, clients by name."""
    names = sorted(changes)
    total = torch.zeros(len(names), len(names), dtype=torch.float64)
    modules = sorted(changes[names[0]]) if names else []
    for module in modules:
        unit = F.normalize(torch.stack([changes[name][module].flatten().double() for name in names]), dim=1)
        total += unit @ unit.T
    return total / max(len(modules), 1)
