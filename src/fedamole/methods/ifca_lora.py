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

from collections.abc import Generator
from dataclasses import dataclass

import torch
from typing_extensions import override

from fedamole.federation.method import Client, TrainingRequest, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.cluster_loras import ClusteredLora, ClusterLora, Clusters
from fedamole.model.params import Adapter


@dataclass(frozen=True)
class Choice:
    """Client state: the cluster that it trained last; -1 before its first round."""

    cluster: int


@dataclass(frozen=True)
class IfcaLora(ClusteredLora[Choice]):
    """K LoRAs, of which each client trains the one with the lowest loss on its data."""

    paper = "Ghosh et al., A Framework for Clustered Federated Learning (IFCA), NeurIPS 2020, arXiv 2006.04088"
    communicates = "all K LoRAs down, one LoRA up"
    stays_local = "the data"
    evaluates = "post_aggregation"

    @override
    def init_client_state(self, client: Client) -> Choice:
        return Choice(-1)

    @override
    def adapter(self, client: Client, client_state: Choice, message: Clusters) -> Adapter:
        return self.cluster_adapters(message)[self.choose(client, message)]

    def choose(self, client: Client, message: Clusters) -> int:
        """Return the cluster with the lowest loss on the client's embedding split."""
        if message.untrained:
            generator = torch_generator(client.seed, "cluster", client.name)
            return int(torch.randint(self.clusters, (), generator=generator))
        losses = self.losses(client, message)
        return min(range(self.clusters), key=losses.__getitem__)

    @override
    def update(
        self, client: Client, client_state: Choice, message: Clusters
    ) -> Generator[TrainingRequest, TrainingResult, tuple[Choice, ClusterLora, TrainingResult]]:
        chosen = Choice(self.choose(client, message))
        trained = yield TrainingRequest(self.cluster_adapters(message)[chosen.cluster])
        return (*self.reply(client, chosen, message, trained), trained)

    @override
    def reply(
        self, client: Client, client_state: Choice, message: Clusters, trained: TrainingResult
    ) -> tuple[Choice, ClusterLora]:
        return client_state, ClusterLora(client_state.cluster, trained.adapter.tensors)
