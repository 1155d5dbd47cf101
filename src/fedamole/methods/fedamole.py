"""FedAMoLE: Zhang, Qin, Wu, Hou, Deng, "Personalized Federated Fine-Tuning for LLMs via Data-Driven Heterogeneous
Model Architectures", https://arxiv.org/abs/2411.19128 (v4: WWW 2026, where the module is called HMoLE).

One round, in every module:
    1. The server sends each client the experts assigned to it, the shared expert and the token projection.
    2. The client trains them.
    3. It computes its mean token embedding, and that of each of its experts, over its embedding split.
    4. It returns experts, shared expert, token projection and these embeddings.
    5. The server averages each expert over the clients that hold it, shared expert and projection over all.
    6. The experts choose clients by relevance (reverse selection): the architectures until the next choice.
The model of a client is the one that it has trained, never the aggregate.

Deviations: an expert without embeddings has a uniform row, a client without them the mean of its row
(`select_for_remaining`). What fewer than `min_holders` clients return keeps its value; where that is unset, an expert
with one holder in a partial cohort is updated by that one, as in the paper, but never by the last of several whose
others failed. Embeddings are clipped (`limit_norms`). The experts of a module share a dropout mask (the authors: one
each). Adam's eps is 1e-8 (1e-6 there in fp16).
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from typing_extensions import override

from fedamole.assignment.reverse_selection import Bounds, check_feasible, check_holders
from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, Newcomer, Server, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.methods.shared.architectures import Assignment, add_most_relevant, by_expert_name, next_architectures
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.checks import check_at_least
from fedamole.methods.shared.holders import fewest_replies, group_exposure, limit_norms, mixture_of, with_enough_replies
from fedamole.methods.shared.lora import MIXTURE_RELEASES, LoraMethod
from fedamole.model.amole import AdapterSpec
from fedamole.model.layers import MeanEmbeddings
from fedamole.model.params import Adapter, Shapes, expert_ids, new_pool

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """Server state: all experts, the embeddings of experts and clients, and the next assignment."""

    tensors: Mapping[str, Tensor]
    expert_embeddings: Mapping[str, Mapping[str, Tensor]]  # e_i (r) by module and expert-07, once it was returned
    client_embeddings: Mapping[str, Mapping[str, Tensor]]  # t_c (r) by module and client, once it answered
    probabilities: Mapping[str, Tensor]  # P (E, C) by module, clients by name: what the assignment is solved for
    held: dict[str, dict[str, list[int]]]  # experts of each client by module: the coming round's architectures


@dataclass(frozen=True)
class Experts:
    """Message: the client's experts, the shared expert and the token projection of every module."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class TrainedExperts:
    """Reply: the trained tensors of the message, and mean embeddings over the client's embedding split."""

    tensors: Mapping[str, Tensor]
    token_embedding: Mapping[str, Tensor]  # t_c (r) by module
    expert_embeddings: Mapping[str, Mapping[str, Tensor]]  # e_{i,c} (r) by module and expert-07


@dataclass(frozen=True)
class FedAmole(LoraMethod[Pool, Experts, Nothing, TrainedExperts]):
    """A mixture of LoRA experts per client and module, with experts assigned by the data."""

    experts: int | None = None
    """Domain experts E in each module's pool; unset: 3 per client (the paper's 30 for 10), fewer for larger groups."""
    expert_choices: int | None = None
    """Clients k_c that each expert chooses; unset: 2, or 1 for a single client, and at least `min_holders`."""
    min_holders: int | None = None
    """Smallest number of holders of an expert, and of replies to average a tensor; unset: 2, in deployment 3."""
    min_experts: int = 2
    """Smallest number of domain experts of a client per module."""
    max_experts: int = 8
    """Largest number of domain experts of a client per module."""
    top_k: int = AdapterSpec.top_k
    """Domain experts k that each token is routed to, the shared expert not counted."""
    balance_weight: float = AdapterSpec.balance_weight
    """Weight lambda of the load-balancing loss."""
    assignment: Assignment = "reverse"
    """reverse: the paper's; its ablations: random every round, static (round 0 is kept), homogeneous sizes."""
    assign_every: int = 1
    """Renew the assignment after every n-th round; 1 is the paper's. Between renewals, clients keep their experts."""
    weighting: Weighting = "uniform"
    """Weight of a client in the averages: uniform (the paper), or by its training examples."""

    paper = "Zhang et al., Personalized Federated Fine-Tuning for LLMs (FedAMoLE), WWW 2026, arXiv 2411.19128"
    communicates = "the client's experts both ways, mean router embeddings up"
    stays_local = "the data"
    evaluates = "pre_aggregation"
    averaged_fields = ("tensors", "expert_embeddings")
    needs_embeddings = True
    releases = MIXTURE_RELEASES
    accepts_newcomers = True

    @override
    def spec(self) -> AdapterSpec:
        return replace(super().spec(), top_k=self.top_k, balance_weight=self.balance_weight)

    @override
    def reads_embeddings(self) -> bool:
        return self.assignment not in ("static", "random")

    def pool_size(self, clients: int) -> int:
        """Return the number of domain experts E per module."""
        each = 3 if self.expert_choices is not None else max(1, 6 // max(2, self.holders(clients)))
        return clients * each if self.experts is None else self.experts

    def holders(self, clients: int) -> int:
        """Return the smallest number of clients that hold an expert."""
        return min(2, clients, self.expert_choices or clients) if self.min_holders is None else self.min_holders

    def bounds(self, clients: int) -> Bounds:
        """Return the bounds of every assignment."""
        choices = max(min(2, clients), self.holders(clients)) if self.expert_choices is None else self.expert_choices
        return Bounds(choices, self.min_experts, self.max_experts)

    @override
    def for_deployment(self) -> "FedAmole":
        return replace(self, min_holders=3) if self.min_holders is None else self

    @override
    def check(self, clients: int) -> None:
        check_at_least(self, assign_every=1)
        if self.top_k > self.min_experts:
            raise ConfigError(
                f"method.top_k = {self.top_k} experts asked of each token, but a client may hold only "
                f"{self.min_experts}: set top_k to {self.min_experts} or method.min_experts to {self.top_k}"
            )
        bounds = self.bounds(clients)
        check_holders(min_holders=self.holders(clients), choices=bounds.expert_choices, clients=clients)
        check_feasible(experts=self.pool_size(clients), clients=clients, bounds=bounds, top_k=self.top_k)

    @override
    def exposes(self, clients: int | None, shapes: Shapes | None) -> list[str]:
        many = clients or 100  # if unknown, enough clients that they are no bound
        choices = self.bounds(many).expert_choices
        experts, least = self.pool_size(many) * choices / many, self.min_holders
        return group_exposure(clients, shapes, experts=experts, choices=choices, min_holders=least, rank=self.rank)

    # server
    @override
    def init(self, server: Server) -> Pool:
        """Return a random pool with a random assignment, because no embeddings exist yet."""
        size, generator = self.pool_size(len(server.clients)), torch_generator(server.seed, "pool")
        return self._assign(server, Pool(new_pool(server.shapes, self.rank, size, generator), {}, {}, {}, {}), 0)

    @override
    def message(self, state: Pool, client: ClientInfo) -> Experts:
        """Return the experts assigned to this client, shared expert and projection (step 1)."""
        return Experts(mixture_of(state.tensors, state.held, client.name))

    @override
    def aggregate(self, server: Server, state: Pool, replies: Mapping[str, TrainedExperts]) -> Pool:
        """Average the replies (step 5) and let the experts choose clients (step 6)."""
        weights = server.weights(self.weighting)
        asked = server.asked or tuple(client.name for client in server.clients)
        needed = fewest_replies(state.held, asked, self.min_holders)
        trained = with_enough_replies({name: reply.tensors for name, reply in replies.items()}, needed)
        if not any(trained.values()) and any(reply.tensors for reply in replies.values()):
            text = "%d clients answered, too few to average anything (method.min_holders); shared values stay unchanged"
            log.warning(text, len(replies))
        experts, clients = dict(state.expert_embeddings), dict(state.client_embeddings)
        for module in server.shapes:
            rows = limit_norms({name: reply.expert_embeddings.get(module, {}) for name, reply in replies.items()})
            enough = with_enough_replies(rows, needed, prefix=f"{module}/")
            experts[module] = mean_by_key(enough, weights, experts.get(module, {}))
            means = {name: reply.token_embedding for name, reply in replies.items() if module in reply.token_embedding}
            clipped = limit_norms({name: {module: mean[module]} for name, mean in means.items()})
            clients[module] = {**clients.get(module, {}), **{name: mean[module] for name, mean in clipped.items()}}
        tensors = mean_by_key(trained, weights, state.tensors)
        after = replace(state, tensors=tensors, expert_embeddings=experts, client_embeddings=clients)
        keep = self.assignment == "static" or (server.round + 1) % self.assign_every
        return after if keep else self._assign(server, after, server.round + 1)

    def _assign(self, server: Server, state: Pool, round_: int) -> Pool:
        clients = len(server.clients)
        held, probabilities = next_architectures(
            server,
            state.expert_embeddings,
            state.client_embeddings,
            kind=self.assignment,
            rank=self.rank,
            experts=self.pool_size(clients),
            bounds=self.bounds(clients),
            round_=round_,
        )
        return replace(state, held=held, probabilities=probabilities)

    @override
    def assignment_log(self, state: Pool) -> Iterator[dict[str, Any]]:
        """Yield the experts of each client in each module in the next round, with their relevance P."""
        for module, holders in state.held.items():
            for column, (name, experts) in enumerate(sorted(holders.items())):
                scores = [round(float(state.probabilities[module][expert, column]), 6) for expert in experts]
                yield {"module": module, "client": name, "experts": experts, "relevance": scores}

    @override
    def newcomer(
        self, server: Server, state: Pool, info: ClientInfo, embed: Callable[[Adapter], Mapping[str, MeanEmbeddings]]
    ) -> Newcomer[Experts]:
        """Let the experts choose among all clients, of which the others keep their last embeddings.

        Experts are added by relevance until the new client holds `min_experts`. The other clients keep their experts.
        """
        pool = max(len(experts) for experts in expert_ids(state.tensors).values())
        means = embed(Adapter(self.spec(), state.tensors))
        bounds = self.bounds(len(server.clients) - 1)
        # With one client more and the same experts, the number that every client can hold may be lower.
        least = min(bounds.min_experts, pool * bounds.expert_choices // len(server.clients))
        kind: Assignment = "reverse" if self.assignment == "static" else self.assignment
        choosing = replace(
            self, experts=pool, expert_choices=bounds.expert_choices, min_experts=least, assignment=kind, assign_every=1
        )
        embeddings = TrainedExperts({}, {module: mean.token for module, mean in means.items()}, {})
        after = choosing.aggregate(server, state, {info.name: embeddings})
        chosen, column = {m: holders[info.name] for m, holders in after.held.items()}, server.clients.index(info)
        held = add_most_relevant(chosen, after.probabilities, column, self.min_experts)
        final = replace(after, held={module: {info.name: experts} for module, experts in held.items()})
        columns = {module: P[:, [column]] for module, P in after.probabilities.items()}
        log_lines = tuple(self.assignment_log(replace(final, probabilities=columns)))
        counts = [sum(map(len, experts.values())) for experts in (chosen, held)]
        return Newcomer(self.message(final, info), log_lines, {"chosen_by": counts[0], "added": counts[1] - counts[0]})

    # client
    @override
    def adapter(self, client: Client, client_state: Nothing, message: Experts) -> Adapter:
        return Adapter(self.spec(), message.tensors)

    @override
    def reply(
        self, client: Client, client_state: Nothing, message: Experts, trained: TrainingResult
    ) -> tuple[Nothing, TrainedExperts]:
        """Return the trained tensors and the embeddings (steps 3 and 4)."""
        tokens, experts = {}, {}
        for module, means in trained.embeddings.items():
            tokens[module] = means.token
            experts[module] = by_expert_name(means.experts)
        return client_state, TrainedExperts(trained.adapter.tensors, tokens, experts)
