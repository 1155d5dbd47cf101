"""FedAMoLE: Zhang, Qin, Wu, Hou, Deng, "Personalized Federated Fine-Tuning for LLMs via Data-Driven Heterogeneous
Model Architectures", https://arxiv.org/abs/2411.19128 (v4: WWW 2026, where the module is called HMoLE).

One round, module by module:
    the server sends each client the experts assigned to it, the shared expert and the token projection;
    the client trains them, then reads its embedding split: its mean token embedding, and each expert's;
    it returns experts, shared expert, token projection and those embeddings;
    the server averages every expert over its holders, shared expert and projection over all;
    experts choose clients anew by relevance (reverse selection): the architectures of the next round.
A client's model is what it trained with the architecture it was given, never the aggregate.

Deviations: an expert never heard of has a uniform row, a client its row's mean (`select_for_remaining`). What fewer
than `min_holders` clients return keeps its value; where that is unset, an expert with one holder in a partial cohort is
updated by that one, as in the paper, but never by the last of several that did not fail. Embeddings are clipped
(`limit_norms`). A module's experts share a dropout mask (authors: one each). Adam's eps is 1e-8 (1e-6 there in fp16).
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedamole.assignment.reverse_selection import Bounds, check_feasible, check_holders
from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, LoraMethod, Records, Server, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.methods.shared.architectures import Assignment, expert_name, next_architectures
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.methods.shared.holders import fewest_replies, group_exposure, limit_norms, with_enough_replies
from fedamole.model.amole import AdapterSpec
from fedamole.model.params import Adapter, Shapes, expert_keys, new_pool, router_key, shared_keys

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """The server's state: all experts, what is known of experts and clients, and who holds what next."""

    tensors: Mapping[str, Tensor]
    expert_embeddings: Mapping[str, Mapping[str, Tensor]]  # e_i (r) by module and expert-07, once it was returned
    client_embeddings: Mapping[str, Mapping[str, Tensor]]  # t_c (r) by module and client, once it answered
    probabilities: Mapping[str, Tensor]  # P (E, C) by module, clients by name: what the assignment is solved for
    held: dict[str, dict[str, list[int]]]  # experts of each client by module: the coming round's architectures


@dataclass(frozen=True)
class Experts:
    """Message down: the client's experts, its shared expert and token projection in every module."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class TrainedExperts:
    """Reply up: the message's tensors trained, and their mean embeddings on the client's embedding split."""

    tensors: Mapping[str, Tensor]
    token_embedding: Mapping[str, Tensor]  # t_c (r) by module
    expert_embeddings: Mapping[str, Mapping[str, Tensor]]  # e_{i,c} (r) by module and expert-07


@dataclass(frozen=True)
class FedAmole(LoraMethod[Pool, Experts, Nothing, TrainedExperts]):
    """A mixture of LoRA experts per client and module; the data decide which experts it holds."""

    experts: int | None = None
    """Domain experts E in each module's pool; unset: 3 per client (the paper's 30 for 10), fewer for larger groups."""
    expert_choices: int | None = None
    """Clients k_c that each expert chooses; unset: 2, or 1 for a single client, and at least `min_holders`."""
    min_holders: int | None = None
    """Fewest clients that hold an expert, and that return a tensor before it is averaged; unset: 2, in deployment 3."""
    min_experts: int = 2
    """Fewest domain experts a client holds per module."""
    max_experts: int = 8
    """Most domain experts a client holds per module."""
    top_k: int = AdapterSpec.top_k
    """Domain experts k that each token is routed to, the shared expert not counted."""
    balance_weight: float = AdapterSpec.balance_weight
    """Weight lambda of the load-balancing loss."""
    assignment: Assignment = "reverse"
    """reverse: the paper's; its ablations: random every round, static (round 0 is kept), homogeneous sizes."""
    weighting: Weighting = "uniform"
    """Weight of a client in the averages: uniform (the paper), or by its training examples."""

    paper = "Zhang et al., Personalized Federated Fine-Tuning for LLMs (FedAMoLE), WWW 2026, arXiv 2411.19128"
    communicates = "the client's experts both ways, mean router embeddings up"
    stays_local = "the data"
    records = Records(Pool, Experts, Nothing, TrainedExperts)
    evaluates = "pre_aggregation"
    averaged = ("tensors", "expert_embeddings")
    embeds = True

    def spec(self) -> AdapterSpec:
        """What all adapters share, with the router's settings."""
        return replace(super().spec(), top_k=self.top_k, balance_weight=self.balance_weight)

    def pool_size(self, clients: int) -> int:
        """Domain experts E per module."""
        each = 3 if self.expert_choices is not None else max(1, 6 // max(2, self.holders(clients)))
        return clients * each if self.experts is None else self.experts

    def holders(self, clients: int) -> int:
        """Fewest holders of an expert."""
        return min(2, clients, self.expert_choices or clients) if self.min_holders is None else self.min_holders

    def bounds(self, clients: int) -> Bounds:
        """The numbers that every assignment keeps."""
        choices = max(min(2, clients), self.holders(clients)) if self.expert_choices is None else self.expert_choices
        return Bounds(choices, self.min_experts, self.max_experts)

    def for_deployment(self) -> "FedAmole":
        """Have three clients hold every expert, unless something else is set."""
        return replace(self, min_holders=3) if self.min_holders is None else self

    def check(self, clients: int) -> None:
        """Refuse numbers of experts for which no assignment exists."""
        if self.top_k > self.min_experts:
            raise ConfigError(
                f"method.top_k = {self.top_k} experts asked of each token, but a client may hold only "
                f"{self.min_experts}: set top_k to {self.min_experts} or method.min_experts to {self.top_k}"
            )
        bounds = self.bounds(clients)
        check_holders(min_holders=self.holders(clients), choices=bounds.expert_choices, clients=clients)
        check_feasible(experts=self.pool_size(clients), clients=clients, bounds=bounds, top_k=self.top_k)

    def exposes(self, clients: int | None, shapes: Shapes | None) -> list[str]:
        """Say what co-holders and the coordinator can compute."""
        many = clients or 100  # where they are not known, so many that they bound nothing
        choices = self.bounds(many).expert_choices
        experts, least = self.pool_size(many) * choices / many, self.min_holders
        return group_exposure(clients, shapes, experts=experts, choices=choices, min_holders=least, rank=self.rank)

    # server
    def init(self, server: Server) -> Pool:
        """Draw the pool and, as no embeddings exist yet, a random assignment (step 7)."""
        size = self.pool_size(len(server.clients))
        pool = new_pool(server.shapes, self.rank, size, torch_generator(server.seed, "pool"))
        return self._assign(server, Pool(pool, {}, {}, {}, {}), round_=0)

    def message(self, state: Pool, client: ClientInfo) -> Experts:
        """Send the experts assigned to this client (step 1)."""
        keys: list[str] = []
        for module, held in state.held.items():
            keys += [router_key(module), *shared_keys(module)]
            keys += [key for expert in held[client.name] for key in expert_keys(module, expert)]
        return Experts({key: state.tensors[key] for key in keys})

    def aggregate(self, server: Server, state: Pool, replies: Mapping[str, TrainedExperts]) -> Pool:
        """Average what came back (step 5) and let the experts choose their clients anew (step 6)."""
        weights = server.weights(self.weighting)
        asked = server.asked or tuple(client.name for client in server.clients)
        needed = fewest_replies(state.held, asked, self.min_holders)
        trained = with_enough_replies({name: reply.tensors for name, reply in replies.items()}, needed)
        if not any(trained.values()):
            log.warning(
                "%d clients answered, too few to average anything (method.min_holders); shared values stay unchanged",
                len(replies),
            )
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
        return after if self.assignment == "static" else self._assign(server, after, server.round + 1)

    def _assign(self, server: Server, state: Pool, round_: int) -> Pool:
        """Solve the assignment of every module for a round."""
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

    def assignment_log(self, state: Pool) -> Iterator[dict[str, Any]]:
        """Who holds which expert in the coming round, where, and with what relevance P."""
        for module, holders in state.held.items():
            for column, (name, experts) in enumerate(sorted(holders.items())):
                scores = [round(float(state.probabilities[module][expert, column]), 6) for expert in experts]
                yield {"module": module, "client": name, "experts": experts, "relevance": scores}

    # client
    def init_client_state(self, client: Client) -> Nothing:
        """Keep nothing: what was trained is kept by the worker, as for every method scored so."""
        return Nothing()

    def adapter(self, client: Client, client_state: Nothing, message: Experts) -> Adapter:
        """Train the mixture that was sent (step 2)."""
        return Adapter(self.spec(), message.tensors)

    def reply(
        self, client: Client, client_state: Nothing, message: Experts, trained: TrainingResult
    ) -> tuple[Nothing, TrainedExperts]:
        """Send back the experts and what the trained model makes of this client's data (steps 3 and 4)."""
        tokens, experts = {}, {}
        for module, means in trained.embeddings.items():
            tokens[module] = means.token
            experts[module] = {expert_name(expert): row for expert, row in means.experts.items()}
        return client_state, TrainedExperts(trained.adapter.tensors, tokens, experts)
