"""FedAMoLE-Peers: this project's own variant of FedAMoLE (Zhang et al., https://arxiv.org/abs/2411.19128), in which
clients with similar data share experts.

As in FedAMoLE, the data decide which client holds which expert, and the experts choose the clients. Ours:
    - Each client is the home of one expert, which chooses the clients that are similar enough to its home. A client
      without similar ones trains as with `local_only`.
    - Similarity is the cosine of the changes of B in the clients' first training, which all start from the same LoRA,
      averaged over the modules. A client sends nothing for it that it does not send anyway.
    - There is no always-on expert that is averaged over all clients. A part of the rank can be private instead
      (`private_share`): it is trained with the expert, as one LoRA, and never leaves the client.
    - A client's model is scored after the aggregation. It is the mean, or the client's own expert (see `max_excess`).

One round:
    1. The server sends each client the mean of its own expert and those that chose it; less similar ones count less.
    2. The client trains it together with its private part, and sends it back as the expert of its home.
    3. The server compares the first changes of new clients with those of all others, and the experts choose again.
"""

import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, Server, TrainingRequest, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.checks import check_at_least
from fedamole.methods.shared.lora import LoraMethod
from fedamole.methods.shared.similarity import similarities
from fedamole.model.params import Adapter, Shapes, Tensors, new_shared

MEMORY = 0.75
"""Weight of the earlier comparisons in `excess`: right after an average the loss is often higher, and later lower."""
MAX_EXCESS = 1.0
"""Largest difference that counts, in nats, so that a client forgets one bad mean after some rounds."""
MAX_LOSS = 20.0
"""Larger losses count as this one, in nats: equal guesses have a lower one."""


@dataclass(frozen=True)
class Homes:
    """Server state: the expert of each client, its first change, and the clients that it has chosen."""

    first: Mapping[str, Tensor]
    """The expert that all clients start from."""
    experts: Mapping[str, Mapping[str, Tensor]]
    """The expert that each client returned last, by client."""
    changes: Mapping[str, Mapping[str, Tensor]]
    """Change of B in each client's first training, by client and module."""
    similarity: Mapping[str, Tensor]
    """Similarity of each client that has a first change to all of them, sorted by name (C)."""
    weights: dict[str, dict[str, float]]
    """Weights of the experts that have chosen each client, by client and home; that of its own home is among them."""


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
    """Moving average over the rounds of the loss with the mean minus that with the own expert, in nats."""


@dataclass(frozen=True)
class FedAmolePeers(LoraMethod[Homes, PeerExpert, OwnParts, PeerExpert]):
    """Experts shared among clients with similar data, beside a private part."""

    private_share: float = 0.0
    """Share of the rank that is private, rounded down, from 0 (all is shared) to below 1."""
    min_similarity: float = 0.5
    """Smallest cosine similarity between the home of an expert and a client that it chooses."""
    temperature: float = 0.05
    """An expert whose similarity is lower by d than the highest one has the weight exp(-d / temperature)."""
    expert_choices: int = 8
    """Largest number of clients, besides its home, that an expert chooses."""
    min_group: int = 2
    """Smallest number of experts in a mean; a client chosen by fewer gets its own alone. 3 in a deployment. In a mean,
    the min_group - 1 heaviest experts of other clients have equal weights."""
    max_excess: float = 0.1
    """The client uses its own expert while its `excess` is above this, in nats; with 1 it always uses the mean."""
    probe_examples: int = 64
    """Largest number of examples on which a client compares the two."""
    weighting: Weighting = "uniform"
    """Weight of a client's expert in a mean: uniform, or by its training examples."""

    paper = "this project's variant of FedAMoLE (Zhang et al., WWW 2026, arXiv 2411.19128)"
    communicates = "the shared part of one LoRA both ways"
    stays_local = "the data, and the private part of the LoRA if there is one"
    evaluates = "post_aggregation"
    logged_relevance = "similarity"
    probes = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.private_share < 1:
            raise ConfigError(f"method.private_share = {self.private_share}: must be at least 0 and below 1")
        if not -1 <= self.min_similarity <= 1:
            raise ConfigError(f"method.min_similarity = {self.min_similarity}: must be between -1 and 1")
        if not self.temperature > 0:
            raise ConfigError(f"method.temperature = {self.temperature}: must be above 0")
        check_at_least(self, expert_choices=0, min_group=2, probe_examples=1, max_excess=0)

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
        return Homes(self._parts(lora)[1], {}, {}, {}, {})

    @override
    def message(self, state: Homes, client: ClientInfo) -> PeerExpert:
        weights = state.weights.get(client.name, {})
        homes = weights if len(weights) >= self.min_group else {client.name} & weights.keys()
        return PeerExpert(mean_by_key({home: state.experts[home] for home in homes}, weights, state.first))

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
        similarity = similarities(changes) if first else state.similarity
        weights = self.choose(similarity, server.weights(self.weighting))
        return replace(state, experts=experts, changes=changes, similarity=similarity, weights=weights)

    def choose(self, similarity: Tensors, sizes: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Return the weights of the experts that choose each client, by client and home.

        `similarity` is that of the state, `sizes` are the weights of the homes before similarity counts."""
        names = sorted(similarity)
        cosines = [similarity[name].tolist() for name in names]
        chosen: dict[int, list[int]] = {i: [] for i in range(len(names))}
        for home in chosen:
            order = sorted((i for i in chosen if i != home), key=lambda i: (-cosines[home][i], i))
            for i in order[: self.expert_choices]:
                if cosines[home][i] >= self.min_similarity:
                    chosen[i].append(home)
        weights = {}
        for i, homes in chosen.items():
            nearest = max((cosines[i][home] for home in homes), default=0.0)
            shares = {home: math.exp((cosines[i][home] - nearest) / self.temperature) for home in homes}
            others = {names[home]: sizes[names[home]] * share for home, share in shares.items()}
            # A client knows its own expert. If one other had nearly all of the rest, the client could compute it.
            cap = min(sorted(others.values(), reverse=True)[: self.min_group - 1], default=0.0)
            weights[names[i]] = {home: min(weight, cap) for home, weight in others.items()}
            weights[names[i]][names[i]] = sizes[names[i]]
        return weights

    @override
    def assignment_log(self, state: Homes) -> Iterator[dict[str, Any]]:
        """Yield the experts of each client by the index of their home, with the similarity of home and client."""
        names = sorted(state.weights)
        for name in names:
            homes = sorted(names.index(home) for home in state.weights[name])
            yield {
                "module": "all",
                "client": name,
                "experts": homes,
                "relevance": [round(float(state.similarity[name][home]), 6) for home in homes],
            }

    # client
    @override
    def init_client_state(self, client: Client) -> OwnParts:
        lora = new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora"))
        return OwnParts(self._parts(lora)[0], {}, 0.0)

    @override
    def adapter(self, client: Client, client_state: OwnParts, message: PeerExpert) -> Adapter:
        """Return the LoRA of the private part, and the message or the client's own expert."""
        return self._adapters(client_state, message)[self.excess(client, client_state, message) > self.max_excess]

    def excess(self, client: Client, client_state: OwnParts, message: PeerExpert) -> float:
        """Return the client's `excess` after a comparison of the message with its own expert."""
        own = client_state.expert
        same = all(torch.equal(own[key], value) for key, value in message.tensors.items()) if own else True
        if same or self.max_excess >= MAX_EXCESS:
            return 0.0
        with_mean, with_own = client.probe.losses(self._adapters(client_state, message), self.probe_examples)
        difference = min(MAX_LOSS, with_mean) - min(MAX_LOSS, with_own)  # NaN counts as MAX_LOSS
        return MEMORY * client_state.excess + (1 - MEMORY) * max(-MAX_EXCESS, min(difference, MAX_EXCESS))

    def _adapters(self, client_state: OwnParts, message: PeerExpert) -> list[Adapter]:
        """Return the LoRAs with the message and with the client's own expert, if it has one."""
        private, own = client_state.private, client_state.expert
        parts: list[Tensors] = [message.tensors, own] if own else [message.tensors]
        if private:
            parts = [
                {key: torch.cat([private[key], tensor], 0 if key.endswith("/A") else 1) for key, tensor in part.items()}
                for part in parts
            ]
        return [Adapter(self.spec(), part) for part in parts]

    @override
    def update(
        self, client: Client, client_state: OwnParts, message: PeerExpert
    ) -> Generator[TrainingRequest, TrainingResult, tuple[OwnParts, PeerExpert, TrainingResult]]:
        compared = replace(client_state, excess=self.excess(client, client_state, message))
        trained = yield TrainingRequest(self._adapters(client_state, message)[compared.excess > self.max_excess])
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
