"""IFCA-style clusters of LoRA: Ghosh, Chung, Yin, Ramchandran, "An Efficient Framework for Clustered Federated
Learning", NeurIPS 2020, https://arxiv.org/abs/2006.04088.

One round:
    the server sends the LoRAs of all K clusters to the cohort;
    every client looks which has the lowest loss on its data, trains that one and sends it back;
    the server averages within each cluster.
A client's model is the LoRA of the cluster that fits it best, scored after the aggregation.
Deviations: the look is at a draw of the examples set aside from training (the paper: at the training data), and
while all LoRAs are still 0, and their losses equal, a client draws its cluster (the paper begins with distinct models).
A cluster that nobody has chosen yet competes as the bare base.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.federation.method import (
    Client,
    ClientInfo,
    LoraMethod,
    Records,
    Server,
    TrainingRequest,
    TrainingResult,
    Weighting,
)
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.model.params import Adapter, new_shared


@dataclass(frozen=True)
class Clusters:
    """Server state and message: the LoRA of each cluster, by its index."""

    loras: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Choice:
    """The cluster that a client trained last; -1 before its first round."""

    cluster: int


@dataclass(frozen=True)
class ClusterLora:
    """Reply up: the trained LoRA of the chosen cluster."""

    cluster: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class IfcaLora(LoraMethod[Clusters, Clusters, Choice, ClusterLora]):
    """K LoRAs, of which each client trains the one that fits its data."""

    clusters: int = 3
    """Clusters K."""
    probe_examples: int = 64
    """Most examples that a client looks at to choose."""
    weighting: Weighting = "uniform"
    """Weight of a client in its cluster's average: uniform, or by its training examples."""

    paper = "Ghosh et al., A Framework for Clustered Federated Learning (IFCA), NeurIPS 2020, arXiv 2006.04088"
    communicates = "all K LoRAs down, one LoRA up"
    stays_local = "the data"
    records = Records(Clusters, Clusters, Choice, ClusterLora)
    evaluates = "post_aggregation"
    looks = True

    def __post_init__(self) -> None:
        """Refuse no clusters, or no look."""
        super().__post_init__()
        for key in ("clusters", "probe_examples"):
            if getattr(self, key) < 1:
                raise ConfigError(f"method.{key} = {getattr(self, key)}: must be at least 1")

    # server
    def init(self, server: Server) -> Clusters:
        """Draw the LoRAs of all clusters."""
        return Clusters(
            {
                str(cluster): new_shared(server.shapes, self.rank, torch_generator(server.seed, f"lora/{cluster}"))
                for cluster in range(self.clusters)
            }
        )

    def message(self, state: Clusters, client: ClientInfo) -> Clusters:
        """Send all LoRAs."""
        return state

    def aggregate(self, server: Server, state: Clusters, replies: Mapping[str, ClusterLora]) -> Clusters:
        """Average within each cluster; one that nobody chose keeps its LoRA."""
        weights, loras = server.weights(self.weighting), {}
        for cluster, lora in state.loras.items():
            members = {name: reply.tensors for name, reply in replies.items() if str(reply.cluster) == cluster}
            loras[cluster] = mean_by_key(members, weights, lora)
        return Clusters(loras)

    def expected_reply(self, template: ClusterLora, reply: ClusterLora) -> ClusterLora:
        """A client chooses its cluster."""
        return replace(template, cluster=reply.cluster if reply.cluster in range(self.clusters) else 0)

    # client
    def init_client_state(self, client: Client) -> Choice:
        """Have chosen nothing."""
        return Choice(-1)

    def adapter(self, client: Client, client_state: Choice, message: Clusters) -> Adapter:
        """Start from the LoRA of the cluster that fits best."""
        return self._adapters(message)[self.choose(client, message)]

    def choose(self, client: Client, message: Clusters) -> int:
        """The cluster with the lowest loss on the client's examples set aside."""
        adapters = self._adapters(message)
        changes = [tensor for lora in message.loras.values() for name, tensor in lora.items() if name.endswith("/B")]
        if not any(tensor.any() for tensor in changes):
            generator = torch_generator(client.seed, "cluster", client.name)
            return int(torch.randint(self.clusters, (), generator=generator))
        losses = client.losses(adapters, self.probe_examples)
        return min(range(self.clusters), key=losses.__getitem__)

    def update(
        self, client: Client, client_state: Choice, message: Clusters
    ) -> Generator[TrainingRequest, TrainingResult, tuple[Choice, ClusterLora, TrainingResult]]:
        """Choose a cluster and train its LoRA."""
        chosen = Choice(self.choose(client, message))
        trained = yield TrainingRequest(self._adapters(message)[chosen.cluster])
        return (*self.reply(client, chosen, message, trained), trained)

    def reply(
        self, client: Client, client_state: Choice, message: Clusters, trained: TrainingResult
    ) -> tuple[Choice, ClusterLora]:
        """Send back the trained LoRA of the cluster that was chosen."""
        return client_state, ClusterLora(client_state.cluster, trained.adapter.tensors)

    def _adapters(self, message: Clusters) -> list[Adapter]:
        return [Adapter(self.spec(), message.loras[str(cluster)]) for cluster in range(self.clusters)]
