"""FedMoE on a pool of LoRA experts: Mei, Cai, Zhou, Wang, Xu, "FedMoE: Personalized Federated Learning via
Heterogeneous Mixture of Experts", 2024, https://arxiv.org/abs/2408.11304.

One round, in every module:
    1. The server sends each client the experts that it holds, the shared expert and the router.
    2. The client trains them.
    3. It counts which share of its tokens the router gives to each expert, its usage, over its embedding split.
    4. It returns the trained tensors and the usage.
    5. The server averages each expert over its holders, weighted by usage and examples; the shared parts over all.
    6. A client in its first `search_rounds` rounds holds all experts, or `search_experts` random ones. After these it
       keeps the smallest set that covers most of its usage. Every `review_every` of its rounds it drops experts that
       it hardly uses, and gets the expert that the client with the most similar usage uses most.
The model of a client is the one that it has trained, never the aggregate.

Deviations: the experts are LoRAs beside a dense base (the paper: feed-forward blocks of a sparse base), with the
router, the shared expert and the load-balancing loss of FedAMoLE. The paper publishes no code; how experts are chosen,
dropped and recommended, and the thresholds, are this project's (`assignment/activation.py`). By default the search
measures the usage of the same experts at every client, because the usage of different random experts is hard to
compare. What fewer than `min_holders` clients return keeps its value.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.assignment.activation import Thresholds, next_experts, usage_shares
from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, Server, TrainingResult
from fedamole.federation.randomness import numpy_generator, torch_generator
from fedamole.federation.record import Nothing
from fedamole.methods.fedamole import Experts
from fedamole.methods.shared.architectures import Held
from fedamole.methods.shared.averaging import mean_by_key, mean_of_experts
from fedamole.methods.shared.checks import check_at_least
from fedamole.methods.shared.holders import fewest_replies, mixture_of, with_enough_replies
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.amole import AdapterSpec
from fedamole.model.params import Adapter, Shapes, expert_name, new_pool


@dataclass(frozen=True)
class UsedPool:
    """Server state: all experts, who holds which, and how much they are used."""

    tensors: Mapping[str, Tensor]
    shares: Mapping[str, Mapping[str, Tensor]]
    """Share of each expert (E) in a client's last usage, by client and module, once it has answered."""
    held: dict[str, dict[str, list[int]]]
    """Experts of each client in the coming round, by module."""
    rounds: dict[str, int]
    """Number of rounds in which each client has answered."""


@dataclass(frozen=True)
class UsedExperts:
    """Reply: the trained tensors of the message, and the usage."""

    tensors: Mapping[str, Tensor]
    usage: Mapping[str, Mapping[str, Tensor]]
    """Share of the client's tokens that each expert got, a number, by module and expert-07."""


@dataclass(frozen=True)
class FedMoe(LoraMethod[UsedPool, Experts, Nothing, UsedExperts]):
    """A mixture of LoRA experts per client and module, with the experts that its tokens use."""

    experts: int = 16
    """Domain experts E in each module's pool."""
    min_experts: int = 2
    """Smallest number of domain experts of a client per module, after the search."""
    max_experts: int = 8
    """Largest number of domain experts of a client per module, after the search."""
    top_k: int = AdapterSpec.top_k
    """Domain experts k that each token is routed to, the shared expert not counted."""
    balance_weight: float = AdapterSpec.balance_weight
    """Weight lambda of the load-balancing loss."""
    search_rounds: int = 1
    """A client's first rounds, in which its usage of many experts is measured."""
    search_experts: int | None = None
    """Number of random experts that a client holds per module in the search; unset: all experts."""
    coverage: float = 0.9
    """Share of its usage that the experts cover which a client keeps after the search."""
    review_every: int = 5
    """Rounds of a client after the search from one review of its experts to the next."""
    drop_below: float = 0.5
    """A review drops an expert whose usage is below this multiple of an even share."""
    probe_examples: int = 64
    """Largest number of examples on which a client measures its usage."""
    assignment: Literal["usage", "random"] = "usage"
    """usage: the experts are chosen by usage; random, an ablation: as many experts, drawn anew in every round."""
    weighting: Literal["usage", "uniform", "examples"] = "usage"
    """Weight of a client in the average of an expert: usage times examples, uniform, or by its training examples."""
    min_holders: int | None = None
    """Smallest number of clients that return a tensor before it is averaged; unset: 2 where several clients that
    hold it take part in a round, in deployment 3."""

    paper = "Mei et al., FedMoE: Personalized FL via Heterogeneous Mixture of Experts, 2024, arXiv 2408.11304"
    communicates = "the client's experts both ways, usage of the experts up"
    stays_local = "the data"
    evaluates = "pre_aggregation"
    logged_relevance = "token share"
    probes = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, min_holders=1, search_rounds=1, review_every=1, probe_examples=1)
        smallest = {"min_experts": self.top_k, "search_experts": self.min_experts, "experts": self.max_experts}
        check_at_least(self, **smallest, max_experts=self.min_experts)
        if self.search_experts is not None and self.search_experts > self.experts:
            raise ConfigError(f"method.search_experts = {self.search_experts}: must be at most {self.experts}")
        for key in ("coverage", "drop_below"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"method.{key} = {getattr(self, key)}: must be at least 0 and at most 1")

    @override
    def spec(self) -> AdapterSpec:
        return replace(super().spec(), top_k=self.top_k, balance_weight=self.balance_weight)

    @override
    def for_deployment(self) -> "FedMoe":
        """Return the method with `min_holders` = 3 if it is unset."""
        return replace(self, min_holders=3) if self.min_holders is None else self

    @override
    def check(self, clients: int) -> None:
        if (self.min_holders or 1) > clients:
            raise ConfigError(f"method.min_holders = {self.min_holders}: must be at most {clients}, the clients")

    @override
    def exposes(self, clients: int | None, shapes: Shapes | None) -> list[str]:
        sentences = [
            "The coordinator gets the share of each client's tokens that every expert of a module is used for."
        ]
        if (self.min_holders or 1) < 3:
            sentences += [
                "An expert may have one or two holders: the next one, or the other one, can compute an update."
            ]
        if self.weighting == "usage":
            sentences += ["Where one client alone uses an expert, its other holders get that client's update."]
        return sentences

    # server
    @override
    def init(self, server: Server) -> UsedPool:
        """Return a random pool; all clients begin with the search."""
        pool = new_pool(server.shapes, self.rank, self.experts, torch_generator(server.seed, "pool"))
        count = self.search_experts or self.experts
        held = {
            module: {info.name: self._draw(server, module, info.name, count) for info in server.clients}
            for module in server.shapes
        }
        return UsedPool(pool, {}, held, {})

    def _draw(self, server: Server, module: str, client: str, count: int, round_: int = 0) -> list[int]:
        """Draw a client's experts in a module for a round."""
        rng = numpy_generator(server.seed, f"assignment/{module}", client, round_)
        return sorted(rng.choice(self.experts, count, replace=False).tolist())

    @override
    def message(self, state: UsedPool, client: ClientInfo) -> Experts:
        """Return the experts of this client, shared expert and router (step 1)."""
        return Experts(mixture_of(state.tensors, state.held, client.name))

    @override
    def aggregate(self, server: Server, state: UsedPool, replies: Mapping[str, UsedExperts]) -> UsedPool:
        """Average the replies (step 5) and choose the experts of the clients that answered (step 6)."""
        answered = sorted(replies)
        shares = {**state.shares, **{name: self._shares(server, state, name, replies[name]) for name in answered}}
        rounds = {**state.rounds, **{name: state.rounds.get(name, 0) + 1 for name in answered}}
        after = replace(state, tensors=self._averaged(server, state, shares, replies), shares=shares, rounds=rounds)
        return replace(after, held=self._next_held(server, after, answered))

    def _shares(self, server: Server, state: UsedPool, client: str, reply: UsedExperts) -> dict[str, Tensor]:
        """Return a client's shares by module, from its usage."""
        shares = {}
        for module in server.shapes:
            usage, held = reply.usage.get(module, {}), state.held[module][client]
            counts = {expert: float(usage[expert_name(expert)]) for expert in held if expert_name(expert) in usage}
            shares[module] = torch.from_numpy(usage_shares(counts, self.experts))
        return shares

    def _averaged(
        self,
        server: Server,
        state: UsedPool,
        shares: Mapping[str, Mapping[str, Tensor]],
        replies: Mapping[str, UsedExperts],
    ) -> dict[str, Tensor]:
        """Return the pool after a round; an expert that no client has used keeps its value."""
        asked = server.asked or tuple(client.name for client in server.clients)
        needed = fewest_replies(state.held, asked, self.min_holders)
        trained = with_enough_replies({name: reply.tensors for name, reply in replies.items()}, needed)
        weights = server.weights("uniform" if self.weighting == "uniform" else "examples")
        if self.weighting != "usage":
            return mean_by_key(trained, weights, state.tensors)
        used = {name: {m: weights[name] * share for m, share in shares[name].items()} for name in trained}
        experts = mean_of_experts(trained, used, state.tensors)
        shared = {
            name: {key: tensor for key, tensor in tensors.items() if key not in experts}
            for name, tensors in trained.items()
        }
        return {**mean_by_key(shared, weights, state.tensors), **experts}

    def _next_held(self, server: Server, state: UsedPool, answered: Sequence[str]) -> Held:
        """Return the experts of all clients in the next round; only those of clients that answered change."""
        held: Held = {}
        limits = Thresholds(self.coverage, self.drop_below, self.review_every, self.min_experts, self.max_experts)
        for module, before in state.held.items():
            known = {name: by_module[module].numpy() for name, by_module in state.shares.items()}
            held[module] = dict(before)
            for name in answered:
                rounds = state.rounds[name] - self.search_rounds
                chosen = next_experts(known, before, name, rounds, limits)
                if self.assignment == "random" and rounds >= 0:
                    chosen = self._draw(server, module, name, len(chosen), server.round + 1)
                held[module][name] = chosen
        return held

    @override
    def assignment_log(self, state: UsedPool) -> Iterator[dict[str, Any]]:
        """Yield the experts of each client in each module in the next round, with their share of its last usage."""
        for module, holders in state.held.items():
            for name, experts in sorted(holders.items()):
                known = state.shares.get(name, {}).get(module, torch.zeros(self.experts))
                shares = [round(float(known[expert]), 6) for expert in experts]
                yield {"module": module, "client": name, "experts": experts, "relevance": shares}

    # client
    @override
    def adapter(self, client: Client, client_state: Nothing, message: Experts) -> Adapter:
        return Adapter(self.spec(), message.tensors)

    @override
    def reply(
        self, client: Client, client_state: Nothing, message: Experts, trained: TrainingResult
    ) -> tuple[Nothing, UsedExperts]:
        """Return the trained tensors and the usage (steps 3 and 4)."""
        measured = client.probe.usage(trained.adapter, self.probe_examples)
        usage = {
            module: {expert_name(expert): torch.tensor(share) for expert, share in shares.items()}
            for module, shares in measured.items()
        }
        return client_state, UsedExperts(trained.adapter.tensors, usage)
