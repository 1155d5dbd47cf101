"""FedLEASE: Wang, Bian, Zhang, Xu, "Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning", NeurIPS
2025, https://arxiv.org/abs/2509.15087.

The first rounds, a share `warmup_share` of all: every client trains a LoRA of its own and sends it. Then the server
clusters clients by the cosine distance of their B's (agglomerative, as many clusters M as the silhouette likes best);
the mean LoRA of a cluster is its expert.
Every later round:
    the server sends all M experts, and the mixers of the client's cluster;
    every client trains its cluster's expert and the mixers, the other experts frozen: a token takes the best M of
    2M - 1 logits, of which M - 1 stand for the own expert again, so that it may use one expert or all;
    the server averages experts and mixers within each cluster.
A client's model is what it is sent next, scored after the aggregation (while warming up, its own LoRA).
Deviations: a client that first answers later warms up then and joins the cluster whose expert's B is nearest. Three or
more clients are never one cluster, as the silhouette knows no such case.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, DecayedLoraMethod, Records, Server, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.methods.local_only import OwnLora
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.clustering import cosine_distances, silhouette_clusters
from fedamole.model.mixer import LearnedRouter
from fedamole.model.params import OWN, Adapter, expert_ids, expert_keys, mixer_key, new_shared, shared_keys


@dataclass(frozen=True)
class Lease:
    """The server's state."""

    first: Mapping[str, Tensor]  # the LoRA that everybody begins with
    warm: Mapping[str, Tensor]  # <client>/<name> of those warming up
    tensors: Mapping[str, Tensor]  # experts, and mixers by cluster-0/<name>
    cluster: dict[str, int]  # of each client that has one
    clusters: int  # M, 0 before there are any
    rounds: int  # with replies so far


@dataclass(frozen=True)
class Leased:
    """Message down: all experts and the cluster's mixers, or (cluster -1) the LoRA to warm up with."""

    tensors: Mapping[str, Tensor]
    cluster: int


@dataclass(frozen=True)
class Returned:
    """Reply up: the cluster's expert and mixers, trained; or (cluster -1) the client's LoRA."""

    tensors: Mapping[str, Tensor]
    cluster: int


@dataclass(frozen=True)
class FedLease(DecayedLoraMethod[Lease, Leased, OwnLora, Returned]):
    """Clusters of clients with an expert each; every client uses as many experts as a token needs."""

    warmup_share: float = 0.2
    """Share of the run's rounds that warm up, rounded, at least one (the paper: 5 of 25)."""
    most_clusters: int = 4
    """Most clusters M."""
    weighting: Weighting = "uniform"
    """Weight of a client in the averages: uniform, or by its training examples."""

    paper = "Wang et al., Adaptive LoRA Experts Allocation and Selection (FedLEASE), NeurIPS 2025, arXiv 2509.15087"
    communicates = "all M experts and mixers down, one expert and mixers up"
    stays_local = "the data"
    records = Records(Lease, Leased, OwnLora, Returned)
    evaluates = "post_aggregation"

    def __post_init__(self) -> None:
        """Refuse no clusters, and a share of rounds outside 0 .. 1."""
        super().__post_init__()
        if self.most_clusters < 1:
            raise ConfigError(f"method.most_clusters = {self.most_clusters}: must be at least 1")
        if not 0 < self.warmup_share <= 1:
            raise ConfigError(f"method.warmup_share = {self.warmup_share}: must be above 0 and at most 1")

    # server
    def init(self, server: Server) -> Lease:
        """Draw the LoRA that everybody warms up with."""
        return Lease(new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora")), {}, {}, {}, 0, 0)

    def message(self, state: Lease, client: ClientInfo) -> Leased:
        """Send experts and mixers to whoever has a cluster."""
        own = state.cluster.get(client.name, -1)
        if own < 0:
            return Leased(state.first, -1)
        mine = f"cluster-{own}/"
        client_state = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("cluster-")}
        mixers = {name.removeprefix(mine): t for name, t in state.tensors.items() if name.startswith(mine)}
        return Leased({**client_state, **mixers}, own)

    def aggregate(self, server: Server, state: Lease, replies: Mapping[str, Returned]) -> Lease:
        """Average within clusters; cluster those that have warmed up when it is time to."""
        weights = server.weights(self.weighting)
        settled = {name: _named(reply) for name, reply in replies.items() if reply.cluster >= 0}
        warm = {
            f"{name}/{key}": t
            for name, reply in replies.items()
            if reply.cluster < 0
            for key, t in reply.tensors.items()
        }
        after = replace(
            state,
            rounds=state.rounds + 1,
            warm=dict(sorted({**state.warm, **warm}.items())),
            tensors=mean_by_key(settled, weights, state.tensors),
        )
        warm_enough = after.rounds >= max(1, round(self.warmup_share * server.rounds))
        return self._allocate(server, after, weights) if warm_enough and after.warm else after

    def _allocate(self, server: Server, state: Lease, weights: Mapping[str, float]) -> Lease:
        """Give those that have warmed up a cluster, and each new cluster its expert."""
        loras: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.warm.items():
            client, _, key = name.partition("/")
            loras.setdefault(client, {})[key] = tensor
        modules = sorted(server.shapes)
        names, found = sorted(loras), [[loras[n][shared_keys(m)[1]] for m in modules] for n in sorted(loras)]
        if state.clusters:
            experts = [[state.tensors[expert_keys(m, k)[1]] for m in modules] for k in range(state.clusters)]
            nearest = cosine_distances(found, experts).argmin(1)
            joined = dict(zip(names, nearest.tolist(), strict=True))
            return replace(state, warm={}, cluster={**state.cluster, **joined})
        labels = silhouette_clusters(cosine_distances(found, found), self.most_clusters)
        clusters, tensors = int(labels.max()) + 1, dict[str, Tensor]()
        for k in range(clusters):
            members = {name: loras[name] for name, label in zip(names, labels, strict=True) if label == k}
            mean = mean_by_key(members, weights, {})
            generator = torch_generator(server.seed, f"mixer/{k}")
            for module in modules:
                tensors.update(zip(expert_keys(module, k), (mean[key] for key in shared_keys(module)), strict=True))
                d_in = server.shapes[module][0]
                drawn = torch.empty(2 * clusters - 1, d_in).uniform_(-1, 1, generator=generator) / np.sqrt(d_in)
                tensors[f"cluster-{k}/{mixer_key(module)}"] = drawn
        held = dict(zip(names, labels.tolist(), strict=True))
        return replace(state, warm={}, tensors=tensors, cluster=held, clusters=clusters)

    # client
    def init_client_state(self, client: Client) -> OwnLora:
        """Have no LoRA yet."""
        return OwnLora({})

    def adapter(self, client: Client, client_state: OwnLora, message: Leased) -> Adapter:
        """Warm up, or train the cluster's expert and mixers beside the other experts."""
        if message.cluster < 0:
            return Adapter(self.spec(), client_state.tensors or message.tensors)
        experts = expert_ids(message.tensors)[min(client.shapes)]
        others = [key for m in client.shapes for k in experts if k != message.cluster for key in expert_keys(m, k)]
        own = F.one_hot(torch.tensor(message.cluster), len(experts)).float()
        spec = replace(self.spec(), router=LearnedRouter(extra_own_logits=True))
        return Adapter(spec, message.tensors, {OWN: own}, tuple(sorted(others)))

    def reply(
        self, client: Client, client_state: OwnLora, message: Leased, trained: TrainingResult
    ) -> tuple[OwnLora, Returned]:
        """Send back what was trained; keep a LoRA while warming up."""
        tensors, frozen = trained.adapter.tensors, self.adapter(client, client_state, message).frozen
        sent = {name: tensor for name, tensor in tensors.items() if name not in frozen}
        return OwnLora(sent if message.cluster < 0 else {}), Returned(sent, message.cluster)


def _named(reply: Returned) -> dict[str, Tensor]:
    """A reply under the server's names: mixers belong to their cluster, experts have names of their own."""
    mixers = {name for name in reply.tensors if name.endswith("/mixer/W")}
    return {f"cluster-{reply.cluster}/{n}" if n in mixers else n: tensor for n, tensor in reply.tensors.items()}
