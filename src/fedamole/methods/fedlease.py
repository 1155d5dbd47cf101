"""FedLEASE: Wang, Bian, Zhang, Xu, "Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning", NeurIPS
2025, https://arxiv.org/abs/2509.15087.

The first rounds, a share `warmup_share` of all, are a warm-up:
    1. Each client trains a LoRA of its own and sends it.
    2. After the warm-up the server clusters the clients by the cosine distance of their B's (agglomerative clustering,
       with the number of clusters M that has the best silhouette). The mean LoRA of a cluster is its expert.
Every later round:
    1. The server sends all M experts, and the mixers of the client's cluster.
    2. Each client trains the expert of its cluster and the mixers, with the other experts frozen. A token takes the M
       largest of 2M - 1 logits, of which M - 1 stand for the own expert again, so that it may use one expert or all.
    3. The server averages experts and mixers within each cluster.
The model of a client is the next message, scored after the aggregation; during its warm-up, its own LoRA.
Deviations: a client that first replies after the warm-up warms up then and joins the cluster whose expert has the
nearest B. Three or more clients always form at least two clusters, because the silhouette is not defined for one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, Server, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.methods.local_only import OwnLora
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.checks import check_at_least
from fedamole.methods.shared.clustering import cosine_distances, silhouette_clusters
from fedamole.methods.shared.lora import DecayedLoraMethod
from fedamole.model.mixer import LearnedRouter
from fedamole.model.params import OWN, Adapter, expert_ids, expert_keys, mixer_key, new_shared, shared_keys


@dataclass(frozen=True)
class Lease:
    """Server state."""

    first: Mapping[str, Tensor]
    """LoRA that all clients start from."""
    warm: Mapping[str, Mapping[str, Tensor]]
    """LoRAs of the clients that are warming up, by client."""
    experts: Mapping[str, Tensor]
    """One expert per cluster."""
    mixers: Mapping[str, Mapping[str, Tensor]]
    """Mixers, by the index of the cluster."""
    cluster: dict[str, int]
    """Cluster of each client that has one."""
    rounds: int
    """Rounds with replies so far."""

    @property
    def clusters(self) -> int:
        """Number of clusters M; 0 before the first clustering."""
        return len(self.mixers)


@dataclass(frozen=True)
class Leased:
    """Message: all experts and the cluster's mixers, or (cluster -1) the LoRA to warm up with."""

    tensors: Mapping[str, Tensor]
    cluster: int


@dataclass(frozen=True)
class Returned:
    """Reply: the trained expert and mixers of the cluster, or (cluster -1) the client's LoRA."""

    tensors: Mapping[str, Tensor]
    cluster: int


@dataclass(frozen=True)
class FedLease(DecayedLoraMethod[Lease, Leased, OwnLora, Returned]):
    """Clusters of clients with one expert each; a token may use one expert or several."""

    warmup_share: float = 0.2
    """Share of the run's rounds that are warm-up, rounded, at least one round (the paper: 5 of 25)."""
    most_clusters: int = 4
    """Largest number of clusters M."""
    weighting: Weighting = "uniform"
    """Weight of a client in the averages: uniform, or by its training examples."""

    paper = "Wang et al., Adaptive LoRA Experts Allocation and Selection (FedLEASE), NeurIPS 2025, arXiv 2509.15087"
    communicates = "all M experts and mixers down, one expert and mixers up"
    stays_local = "the data"
    evaluates = "post_aggregation"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, most_clusters=1)
        if not 0 < self.warmup_share <= 1:
            raise ConfigError(f"method.warmup_share = {self.warmup_share}: must be above 0 and at most 1")

    # server
    @override
    def init(self, server: Server) -> Lease:
        first = new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora"))
        return Lease(first, {}, {}, {}, {}, 0)

    @override
    def message(self, state: Lease, client: ClientInfo) -> Leased:
        own = state.cluster.get(client.name, -1)
        if own < 0:
            return Leased(state.first, -1)
        return Leased({**state.experts, **state.mixers[str(own)]}, own)

    @override
    def aggregate(self, server: Server, state: Lease, replies: Mapping[str, Returned]) -> Lease:
        """Average within clusters; after the warm-up, assign clusters to the clients that have warmed up."""
        weights, mixer_keys = server.weights(self.weighting), {mixer_key(module) for module in server.shapes}
        warm = {name: reply.tensors for name, reply in replies.items() if reply.cluster < 0}
        experts = {
            name: {key: tensor for key, tensor in reply.tensors.items() if key not in mixer_keys}
            for name, reply in replies.items()
            if reply.cluster >= 0
        }
        mixers = {}
        for cluster, previous in state.mixers.items():
            members = {name: reply.tensors for name, reply in replies.items() if str(reply.cluster) == cluster}
            own = {name: {key: tensors[key] for key in mixer_keys} for name, tensors in members.items()}
            mixers[cluster] = mean_by_key(own, weights, previous)
        after = replace(
            state,
            rounds=state.rounds + 1,
            warm={**state.warm, **warm},
            experts=mean_by_key(experts, weights, state.experts),
            mixers=mixers,
        )
        warmed_up = after.rounds >= max(1, round(self.warmup_share * server.rounds))
        return self._allocate(server, after, weights) if warmed_up and after.warm else after

    def _allocate(self, server: Server, state: Lease, weights: Mapping[str, float]) -> Lease:
        """Assign clusters to the clients that have warmed up, and create the experts of new clusters."""
        loras, modules = state.warm, sorted(server.shapes)
        names, factors = sorted(loras), [[loras[n][shared_keys(m)[1]] for m in modules] for n in sorted(loras)]
        if state.clusters:
            experts = [[state.experts[expert_keys(m, k)[1]] for m in modules] for k in range(state.clusters)]
            nearest = cosine_distances(factors, experts).argmin(1)
            joined = dict(zip(names, nearest.tolist(), strict=True))
            return replace(state, warm={}, cluster={**state.cluster, **joined})
        labels = silhouette_clusters(cosine_distances(factors, factors), self.most_clusters)
        clusters, tensors = int(labels.max()) + 1, dict[str, Tensor]()
        mixers: dict[str, dict[str, Tensor]] = {}
        for k in range(clusters):
            members = {name: loras[name] for name, label in zip(names, labels, strict=True) if label == k}
            mean = mean_by_key(members, weights, {})
            generator, mixers[str(k)] = torch_generator(server.seed, f"mixer/{k}"), {}
            for module in modules:
                tensors.update(zip(expert_keys(module, k), (mean[key] for key in shared_keys(module)), strict=True))
                d_in = server.shapes[module][0]
                weights_of_mixer = torch.empty(2 * clusters - 1, d_in).uniform_(-1, 1, generator=generator) / np.sqrt(
                    d_in
                )
                mixers[str(k)][mixer_key(module)] = weights_of_mixer
        assigned = dict(zip(names, labels.tolist(), strict=True))
        return replace(state, warm={}, experts=tensors, mixers=mixers, cluster=assigned)

    # client
    @override
    def init_client_state(self, client: Client) -> OwnLora:
        return OwnLora({})

    @override
    def adapter(self, client: Client, client_state: OwnLora, message: Leased) -> Adapter:
        """Return the client's own LoRA in the warm-up, later all experts with the other clusters' frozen."""
        if message.cluster < 0:
            return Adapter(self.spec(), client_state.tensors or message.tensors)
        experts = expert_ids(message.tensors)[min(client.shapes)]
        others = [key for m in client.shapes for k in experts if k != message.cluster for key in expert_keys(m, k)]
        own = F.one_hot(torch.tensor(message.cluster), len(experts)).float()
        spec = replace(self.spec(), router=LearnedRouter(extra_own_logits=True))
        return Adapter(spec, message.tensors, {OWN: own}, tuple(sorted(others)))

    @override
    def reply(
        self, client: Client, client_state: OwnLora, message: Leased, trained: TrainingResult
    ) -> tuple[OwnLora, Returned]:
        """Return the trained tensors; keep the LoRA in the warm-up."""
        tensors, frozen = trained.adapter.tensors, self.adapter(client, client_state, message).frozen
        sent = {name: tensor for name, tensor in tensors.items() if name not in frozen}
        return OwnLora(sent if message.cluster < 0 else {}), Returned(sent, message.cluster)
