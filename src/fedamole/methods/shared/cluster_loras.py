"""The LoRAs of K clusters: the server's half of methods whose clients train the LoRA of one cluster per round."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from typing_extensions import override

from fedamole.federation.method import Client, ClientInfo, K, Server, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.checks import check_at_least
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.params import Adapter, new_shared


@dataclass(frozen=True)
class Clusters:
    """Server state and message: the LoRA of each cluster, by its index."""

    loras: Mapping[str, Mapping[str, Tensor]]

    @property
    def untrained(self) -> bool:
        """Whether all LoRAs are 0, so that each of them is the untuned base."""
        return not any(
            tensor.any() for lora in self.loras.values() for name, tensor in lora.items() if name.endswith("/B")
        )


@dataclass(frozen=True)
class ClusterLora:
    """Reply: the trained LoRA of the chosen cluster."""

    cluster: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class ClusteredLora(LoraMethod[Clusters, Clusters, K, ClusterLora]):
    """A method that sends the LoRAs of all clusters, and averages the returned ones within each cluster."""

    clusters: int = 3
    """Number of clusters K."""
    probe_examples: int = 64
    """Largest number of examples on which a client compares the clusters."""
    weighting: Weighting = "uniform"
    """Weight of a client in its cluster's average: uniform, or by its training examples."""

    probes = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, clusters=1, probe_examples=1)

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
    def cluster_adapters(self, message: Clusters) -> list[Adapter]:
        """Return the LoRA of each cluster as an adapter."""
        return [Adapter(self.spec(), message.loras[str(cluster)]) for cluster in range(self.clusters)]

    def losses(self, client: Client, message: Clusters) -> list[float]:
        """Return the loss of each cluster's LoRA on the client's embedding split, in nats per answer token."""
        return client.probe.losses(self.cluster_adapters(message), self.probe_examples)
