"""IFCA-style clusters of LoRA: Ghosh, Chung, Yin, Ramchandran, "An Efficient Framework for Clustered Federated
Learning", NeurIPS 2020, https://arxiv.org/abs/2006.04088.

One round:
    1. The server sends the LoRAs of all K clusters to the selected clients.
    2. Each client computes the loss of every LoRA on its data, trains the one with the lowest loss and sends it back.
    3. The server averages within each cluster.
The model of a client is the LoRA with the lowest loss on its data, scored after the aggregation.
Deviations: losses are computed on a draw from the embedding split (the paper: on the training data). While all LoRAs
are 0, so that their losses are equal, a client draws its cluster at random (the paper starts from different models). A
cluster that no client has chosen yet takes part as the untuned base.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, Server, TrainingRequest, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.params import Adapter, new_shared


@dataclass(frozen=True)
class Clusters:
    """Server state and message: the LoRA of each cluster, by its index."""

    loras: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Choice:
    """Client state: the cluster that it trained last; -1 before its first round."""

    cluster: int


@dataclass(frozen=True)
class ClusterLora:
    """Reply: the trained LoRA of the chosen cluster."""

    cluster: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class IfcaLora(LoraMethod[Clusters, Clusters, Choice, ClusterLora]):
    """K LoRAs, of which each client trains the one with the lowest loss on its data."""

    clusters: int = 3
    """Number of clusters K."""
    probe_examples: int = 64
    """Largest number of examples on which a client compares the clusters."""
    weighting: Weighting = "uniform"
    """Weight of a client in its cluster's average: uniform, or by its training examples."""

    paper = "Ghosh et al., A Framework for Clustered Federated Learning (IFCA), NeurIPS 2020, arXiv 2006.04088"
    communicates = "all K LoRAs down, one LoRA up"
    stays_local = "the data"
    evaluates = "post_aggregation"
    probes = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("clusters", "probe_examples"):
            if getattr(self, key) < 1:
                raise ConfigError(f"method.{key} = {getattr(self, key)}: must be at least 1")

    # server
    @override
    def init(self, server: Server) -> Clusters:
        return Clusters(
            {
                str(cluster): new_shared(server.shapes, self.rank, torch_generator(server.seed, f"lora/{cluster}"))
                for cluster in range(self.clusters)
            }
        )

    @override
    def message(self, state: Clusters, client: ClientInfo) -> Clusters:
        return state

    @override
    def aggregate(self, server: Server, state: Clusters, replies: Mapping[str, ClusterLora]) -> Clusters:
        """Average within each cluster; a cluster that no client chose keeps its LoRA."""
        weights, loras = server.weights(self.weighting), {}
        for cluster, lora in state.loras.items():
            members = {name: reply.tensors for name, reply in replies.items() if str(reply.cluster) == cluster}
            loras[cluster] = mean_by_key(members, weights, lora)
        return Clusters(loras)

    @override
    def expected_reply(self, template: ClusterLora, reply: ClusterLora) -> ClusterLora:
        return replace(template, cluster=reply.cluster if reply.cluster in range(self.clusters) else 0)

    # client
    @override
    def init_client_state(self, client: Client) -> Choice:
        return Choice(-1)

    @override
    def adapter(self, client: Client, client_state: Choice, message: Clusters) -> Adapter:
        return self._adapters(message)[self.choose(client, message)]

    def choose(self, client: Client, message: Clusters) -> int:
        """Return the cluster with the lowest loss on the client's embedding split."""
        adapters = self._adapters(message)
        changes = [tensor for lora in message.loras.values() for name, tensor in lora.items() if name.endswith("/B")]
        if not any(tensor.any() for tensor in changes):
            generator = torch_generator(client.seed, "cluster", client.name)
            return int(torch.randint(self.clusters, (), generator=generator))
        losses = client.probe.losses(adapters, self.probe_examples)
        return min(range(self.clusters), key=losses.__getitem__)

    @override
    def update(
        self, client: Client, client_state: Choice, message: Clusters
    ) -> Generator[TrainingRequest, TrainingResult, tuple[Choice, ClusterLora, TrainingResult]]:
        chosen = Choice(self.choose(client, message))
        trained = yield TrainingRequest(self._adapters(message)[chosen.cluster])
        return (*self.reply(client, chosen, message, trained), trained)

    @override
    def reply(
        self, client: Client, client_state: Choice, message: Clusters, trained: TrainingResult
    ) -> tuple[Choice, ClusterLora]:
        return client_state, ClusterLora(client_state.cluster, trained.adapter.tensors)

    def _adapters(self, message: Clusters) -> list[Adapter]:
        return [Adapter(self.spec(), message.loras[str(cluster)]) for cluster in range(self.clusters)]
