"""Model-GLUE on LoRAs: Zhao et al., "Model-GLUE: Democratized LLM Scaling for A Large Model Zoo in the Wild", NeurIPS
2024, https://arxiv.org/abs/2410.05357.

The first rounds, a share `train_share` of all, collect LoRAs (the zoo):
    1. Each client trains a LoRA of its own and sends it.
In the last of these rounds the server merges them, in further exchanges that train nothing:
    2. It clusters the LoRAs by the cosine similarity of their changes BA.
    3. The clients of a cluster return the loss of each of its LoRAs and of the untuned base on their embedding split. A
       LoRA whose loss at its own client is not below the base's is left out.
    4. Starting with the best LoRA of a cluster, the next is merged as (1 - c) * best + c * next. The clients return the
       losses for c = 0.1 .. 0.9, and the best c is taken if the mean loss falls; otherwise the LoRA is left out.
Every later round:
    1. The server sends one expert per cluster, and a mixer that weighs them token by token.
    2. Each client trains the mixer, or experts and mixer (`train_experts`); the server averages what was trained.
The model of a client is the mixture, scored after the aggregation; before the merge, its own LoRA.
Deviations: the zoo is trained here. Clusters are those of the best silhouette, as the released threshold of 0.95 is for
full weights. The proxy is the mean loss of the cluster's clients, who are sent the pair and blend it themselves. The
recipe is linear; there is no evolutionary search. The mixture is of LoRAs. While no LoRA beats the base, the rounds go
on collecting LoRAs, and the merge is tried again. Losses that clients report are trusted.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, Exchange, Server, TrainingRequest, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.merging.adapters import lora_factors, lora_tensors
from fedamole.merging.low_rank import LoraFactors, change_similarities
from fedamole.merging.selective import COEFFICIENTS, blend, mean_losses, merge_selectively, useful
from fedamole.methods.local_only import OwnLora
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.checks import check_at_least
from fedamole.methods.shared.clustering import silhouette_clusters
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.mixer import LearnedRouter
from fedamole.model.params import Adapter, Tensors, as_expert, mixer_key, new_shared

UNTUNED, BEST, NEXT = "untuned", "best", "next"
Zoo = Mapping[str, Mapping[str, Mapping[str, Tensor]]]
"""LoRAs by cluster and name."""


@dataclass(frozen=True)
class GlueState:
    """Server state."""

    first: Mapping[str, Tensor]
    """LoRA that all clients start from."""
    zoo: Mapping[str, Mapping[str, Tensor]]
    """The LoRA of each client; empty after the merge."""
    mixture: Mapping[str, Tensor]
    """One expert per cluster, and the mixers; empty before the merge."""
    taken: dict[str, dict[str, float]]
    """Clients whose LoRA is part of an expert, with its coefficient, by cluster."""
    refused: list[str]
    """Clients whose LoRA is part of none."""
    rounds: int
    """Rounds with replies so far."""


@dataclass(frozen=True)
class GlueMessage:
    """Message: a LoRA or mixture to train, or LoRAs to measure."""

    tensors: Mapping[str, Tensor]
    mixture: bool
    measured: Zoo
    """LoRAs to measure, by cluster; a cluster with `BEST` and `NEXT` is a pair to blend."""
    blends: bool


@dataclass(frozen=True)
class GlueReply:
    """Reply: trained tensors, or what was measured."""

    tensors: Mapping[str, Tensor]
    mixture: bool
    likelihoods: Mapping[str, Mapping[str, Tensor]]
    """exp(-loss), 0-d, by cluster and LoRA or coefficient: from 0 to 1, also for a LoRA whose loss is infinite."""


@dataclass(frozen=True)
class ModelGlue(LoraMethod[GlueState, GlueMessage, OwnLora, GlueReply]):
    """LoRAs trained apart, clustered, merged selectively, and mixed."""

    train_share: float = 0.5
    """Share of the run's rounds in which the zoo is trained, rounded, at least one round."""
    most_clusters: int = 4
    """Largest number of clusters, and so of experts."""
    merge_steps: int = 4
    """Largest number of LoRAs that are tried in each cluster after the best; each is one exchange."""
    probe_examples: int = 64
    """Largest number of examples on which a client measures LoRAs."""
    train_experts: bool = False
    """Whether the rounds after the merge train the experts too, and not only the mixer."""
    weighting: Weighting = "uniform"
    """Weight of a client in the averages: uniform, or by its training examples."""

    paper = "Zhao et al., Model-GLUE: Democratized LLM Scaling, NeurIPS 2024, arXiv 2410.05357"
    communicates = "one LoRA up per round, once the LoRAs of a client's cluster down; then all experts and mixers down"
    stays_local = "the data"
    evaluates = "post_aggregation"
    probes = True
    accepts_newcomers = True
    expert_roles = ("a cluster's",)

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.train_share <= 1:
            raise ConfigError(f"method.train_share = {self.train_share}: must be above 0 and at most 1")
        check_at_least(self, most_clusters=1, merge_steps=0, probe_examples=1)

    @override
    def exchanges(self) -> int:
        return 2 + self.merge_steps

    # server
    @override
    def init(self, server: Server) -> GlueState:
        return GlueState(new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora")), {}, {}, {}, [], 0)

    @override
    def message(self, state: GlueState, client: ClientInfo) -> GlueMessage:
        return GlueMessage(state.mixture or state.first, bool(state.mixture), {}, False)

    @override
    def aggregate(self, server: Server, state: GlueState, replies: Mapping[str, GlueReply]) -> GlueState:
        """Add LoRAs to the zoo, or average the mixture."""
        now = bool(state.mixture)
        trained = {name: reply.tensors for name, reply in replies.items() if reply.mixture == now}
        after = replace(state, rounds=state.rounds + 1)
        if now:
            return replace(after, mixture=mean_by_key(trained, server.weights(self.weighting), state.mixture))
        return replace(after, zoo={**state.zoo, **trained})

    @override
    def round(self, server: Server, state: GlueState, cohort: Sequence[ClientInfo], exchange: Exchange) -> GlueState:
        after = super().round(server, state, cohort, exchange)
        due = after.rounds >= max(1, round(self.train_share * server.rounds))
        if after.mixture or not due or not after.zoo:
            return after
        return self._glued(server, after, [client.name for client in cohort], exchange)

    def _glued(self, server: Server, state: GlueState, cohort: Sequence[str], exchange: Exchange) -> GlueState:
        """Cluster the zoo, merge selectively and build the mixture; the state as it is if no LoRA is useful."""
        names = sorted(state.zoo)
        factors = {name: lora_factors(state.zoo[name]) for name in names}
        similarities = change_similarities([factors[name] for name in names])
        labels = silhouette_clusters((1 - similarities).numpy(), self.most_clusters)
        cluster = {name: str(label) for name, label in zip(names, labels.tolist(), strict=True)}
        members = {label: [name for name in names if cluster[name] == label] for label in sorted(set(cluster.values()))}
        # A cluster of which no client takes part in this round is measured by all that do.
        measuring = {label: [n for n in cohort if cluster.get(n) == label] or list(cohort) for label in members}

        def measure(loras: Zoo, blends: bool) -> Mapping[str, GlueReply]:
            messages: dict[str, GlueMessage] = {}
            for name in cohort:
                own = {label: loras[label] for label in loras if name in measuring[label]}
                if own:
                    messages[name] = GlueMessage({}, False, own, blends)
            return exchange(messages)

        def means(replies: Mapping[str, GlueReply], label: str) -> dict[str, float]:
            return mean_losses([reply.likelihoods.get(label, {}) for reply in replies.values()])

        replies = measure({label: {name: state.zoo[name] for name in each} for label, each in members.items()}, False)
        losses = {label: means(replies, label) for label in members}
        groups: dict[str, list[str]] = {}
        for label in (label for label, measured in losses.items() if measured):
            # A LoRA whose client did not measure is judged by those that did.
            own = {n: means({n: replies[n]} if n in replies else replies, label) for n in members[label]}
            if kept := useful({n: own[n][n] for n in own}, {n: own[n][UNTUNED] for n in own}):
                groups[label] = kept
        if not groups:
            return state

        def evaluate(pairs: Mapping[str, tuple[LoraFactors, LoraFactors]]) -> dict[str, list[float]]:
            sent = {label: {BEST: lora_tensors(a), NEXT: lora_tensors(b)} for label, (a, b) in pairs.items()}
            replies = measure(sent, True)
            return {label: [means(replies, label).get(f"{c:g}", math.inf) for c in COEFFICIENTS] for label in pairs}

        alone = {name: losses[cluster[name]][name] for each in groups.values() for name in each}
        chosen = merge_selectively(groups, factors, alone, evaluate, rank=self.rank, steps=self.merge_steps)
        mixture: dict[str, Tensor] = {}
        for expert, selection in enumerate(chosen.values()):
            mixture |= as_expert(lora_tensors(selection.factors), expert)
        for module, (d_in, _) in server.shapes.items():
            mixture[mixer_key(module)] = torch.zeros(len(chosen), d_in)  # the mixture starts as the mean of the experts
        taken = {label: dict(selection.taken) for label, selection in chosen.items()}
        refused = sorted(set(names) - {name for each in taken.values() for name in each})
        return replace(state, zoo={}, mixture=mixture, taken=taken, refused=refused)

    # client
    @override
    def init_client_state(self, client: Client) -> OwnLora:
        return OwnLora({})

    @override
    def adapter(self, client: Client, client_state: OwnLora, message: GlueMessage) -> Adapter:
        """Return the mixture, or the client's own LoRA; while it only measures, its own or a measured LoRA."""
        if message.mixture:
            mixers = {mixer_key(module) for module in client.shapes}
            frozen = () if self.train_experts else tuple(sorted(set(message.tensors) - mixers))
            return Adapter(replace(self.spec(), router=LearnedRouter()), message.tensors, {}, frozen)
        measured = [lora for loras in message.measured.values() for lora in loras.values()]
        return Adapter(self.spec(), client_state.tensors or message.tensors or measured[0])

    @override
    def update(
        self, client: Client, client_state: OwnLora, message: GlueMessage
    ) -> Generator[TrainingRequest, TrainingResult, tuple[OwnLora, GlueReply, TrainingResult]]:
        adapter = self.adapter(client, client_state, message)
        if message.measured:
            likelihoods = {
                label: self._measure(client, loras, message.blends) for label, loras in message.measured.items()
            }
            return client_state, GlueReply({}, False, likelihoods), TrainingResult(adapter, 0, 0.0)
        trained = yield TrainingRequest(adapter)
        return (*self.reply(client, client_state, message, trained), trained)

    def _measure(self, client: Client, loras: Mapping[str, Tensors], blends: bool) -> dict[str, Tensor]:
        """Return exp(-loss) of the LoRAs and the untuned base, or of the blends of a pair."""
        tensors: dict[str, Tensors] = dict(loras)
        if blends:
            best, other = lora_factors(loras[BEST]), lora_factors(loras[NEXT])
            tensors = {f"{c:g}": lora_tensors(blend(best, other, c, self.rank)) for c in COEFFICIENTS}
        else:
            first = next(iter(loras.values()))
            tensors[UNTUNED] = {key: torch.zeros_like(tensor) for key, tensor in first.items()}
        losses = client.probe.losses([Adapter(self.spec(), lora) for lora in tensors.values()], self.probe_examples)
        return {
            name: torch.tensor(loss).neg().exp().nan_to_num(0.0) for name, loss in zip(tensors, losses, strict=True)
        }

    @override
    def reply(
        self, client: Client, client_state: OwnLora, message: GlueMessage, trained: TrainingResult
    ) -> tuple[OwnLora, GlueReply]:
        """Return what was trained; keep the LoRA before the merge."""
        frozen = self.adapter(client, client_state, message).frozen
        sent = {name: tensor for name, tensor in trained.adapter.tensors.items() if name not in frozen}
        return OwnLora({} if message.mixture else sent), GlueReply(sent, message.mixture, {})
