"""Adaptive Expert Models on LoRAs: Isaksson, Listo Zec, Coster, Gillblad, Girdzijauskas, "Adaptive Expert Models for
Personalization in Federated Learning", 2022, https://arxiv.org/abs/2206.07832.

One round:
    1. The server sends the LoRAs of all J clusters to the selected clients.
    2. With probability epsilon a client draws a cluster. Otherwise it takes the one with the lowest loss on its data.
    3. It trains the LoRA of this cluster and sends it back.
    4. Beside the frozen LoRAs of the clusters it trains a LoRA of its own and, in every module, a mixer: a softmax over
       these J + 1 experts for each token. It keeps both.
    5. The server averages within each cluster.
The model of a client is its own LoRA and its mixers with the LoRAs of all clusters, scored after the aggregation.
Deviations: the mixers weight experts in every module and for each token, where the paper mixes the probabilities that
whole models give to an answer. The mixture is trained in every round and the own LoRA together with the mixers, where
the paper trains first a local model and then the gate, once after the last round. The experts of the clusters are
frozen in it (the authors' code has both settings). Losses are computed on a draw from the embedding split (the paper:
on the training data). The authors' fourth schedule of epsilon, a power fitted to the length of a run, is left out. With
`training.budget = "steps"` each of the two trainings takes half of the round's steps; with "paper" each takes all.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import OWN_EXPERT, Client, TrainingRequest, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.cluster_loras import ClusteredLora, ClusterLora, Clusters
from fedamole.model.mixer import LearnedRouter
from fedamole.model.params import Adapter, as_expert, expert_as_lora, mixer_key, new_shared

OWN, FIRST_CLUSTER = 0, 1
"""Ids of the experts of a mixture: the client's own LoRA, and the first of the clusters."""


@dataclass(frozen=True)
class OwnMixture:
    """Client state: the client's LoRA, as an expert of a mixture, and the mixers."""

    tensors: Mapping[str, Tensor]
    cluster: int
    """The cluster that the client trained last; -1 before its first round."""


@dataclass(frozen=True)
class AdaptiveExperts(ClusteredLora[OwnMixture]):
    """J LoRAs of clusters, chosen by loss or explored at random, and mixed with a LoRA of the client's own."""

    clusters: int = 2
    """Number of clusters J, at least 2 (the authors' configurations: 2)."""
    epsilon_schedule: Literal["constant", "inverse", "inverse_clusters"] = "constant"
    """Probability with which a client draws its cluster in round t = 0, 1, ...: constant, `epsilon`; inverse,
    1 / (t + 1); inverse_clusters, 1 / (t + 1)^(2 / J)."""
    epsilon: float = 0.1
    """Constant probability with which a client draws its cluster; 0 is the choice of IFCA."""

    paper = "Isaksson et al., Adaptive Expert Models for Personalization in FL, 2022, arXiv 2206.07832"
    communicates = "all J LoRAs down, one LoRA up"
    stays_local = "the data, the client's own LoRA and the mixers"
    evaluates = "post_aggregation"
    expert_roles = (OWN_EXPERT, "a cluster's")
    paper_steps = 2.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters < 2:
            raise ConfigError(f"method.clusters = {self.clusters}: must be at least 2, as a client chooses among them")
        if not 0 <= self.epsilon <= 1:
            raise ConfigError(f"method.epsilon = {self.epsilon}: must be at least 0 and at most 1")

    def exploration_rate(self, round_: int) -> float:
        """Return the probability with which a client draws its cluster in a round, counted from 0."""
        if self.epsilon_schedule == "constant":
            return self.epsilon
        power = 1.0 if self.epsilon_schedule == "inverse" else 2 / self.clusters
        return float((round_ + 1) ** -power)

    @override
    def init_client_state(self, client: Client) -> OwnMixture:
        lora = new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora"))
        mixers = {mixer_key(m): torch.zeros(self.clusters + 1, d_in) for m, (d_in, _) in client.shapes.items()}
        return OwnMixture({**as_expert(lora, OWN), **mixers}, -1)

    @override
    def adapter(self, client: Client, client_state: OwnMixture, message: Clusters) -> Adapter:
        """Return the mixture of the client's own LoRA with those of the clusters, which are frozen."""
        experts: dict[str, Tensor] = {}
        for cluster, lora in message.loras.items():
            experts.update(as_expert(lora, FIRST_CLUSTER + int(cluster)))
        spec = replace(self.spec(), router=LearnedRouter())
        return Adapter(spec, {**client_state.tensors, **experts}, frozen=tuple(sorted(experts)))

    def choose(self, client: Client, message: Clusters) -> int:
        """Return the cluster that the client trains in this round.

        Clusters with the same loss are drawn. All have the same loss while all LoRAs are 0, so that nothing is read.
        """
        generator = torch_generator(client.seed, "exploration", client.name, client.round)
        explores = bool(torch.rand((), generator=generator) < self.exploration_rate(client.round))
        candidates = list(range(self.clusters))
        if not explores and not message.untrained:
            losses = self.losses(client, message)
            lowest = min(losses)
            candidates = [cluster for cluster in candidates if losses[cluster] == lowest] or candidates  # NaN: draw
        return candidates[int(torch.randint(len(candidates), (), generator=generator))]

    @override
    def update(
        self, client: Client, client_state: OwnMixture, message: Clusters
    ) -> Generator[TrainingRequest, TrainingResult, tuple[OwnMixture, ClusterLora, TrainingResult]]:
        state = replace(client_state, cluster=self.choose(client, message))
        cluster = yield TrainingRequest(
            self.cluster_adapters(message)[state.cluster], step_fraction=0.5, paper_step_fraction=1.0
        )
        loras = {**message.loras, str(state.cluster): cluster.adapter.tensors}
        mixture = yield TrainingRequest(
            self.adapter(client, state, Clusters(loras)), step_fraction=0.5, paper_step_fraction=1.0
        )
        return (*self.reply(client, state, message, mixture), mixture)

    @override
    def reply(
        self, client: Client, client_state: OwnMixture, message: Clusters, trained: TrainingResult
    ) -> tuple[OwnMixture, ClusterLora]:
        """Return the LoRA of the trained cluster, which is a frozen expert of the mixture; keep the rest."""
        tensors = trained.adapter.tensors
        sent = expert_as_lora(tensors, FIRST_CLUSTER + client_state.cluster)
        kept = {name: tensors[name] for name in client_state.tensors}
        return replace(client_state, tensors=kept), ClusterLora(client_state.cluster, sent)
