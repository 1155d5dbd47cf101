"""FLoRA: Wang, Shen, He, Sun, Wang, Lyu, Li, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
Low-Rank Adaptations", NeurIPS 2024, https://arxiv.org/abs/2409.05976.

One round:
    1. The server sends the stacked LoRAs of the rounds that the client has not merged yet.
    2. The client adds their product to its base, initialises a new LoRA, trains it and sends it.
    3. The server stacks the LoRAs: the product of the stacks is exactly the weighted mean of the clients' products.
The model of every client is the base with all changes so far, scored after the aggregation. Ranks may differ between
clients.
Deviations: the frozen base is not changed; a client keeps the sum of the changes beside it. All clients have the same
weight unless `weighting` is "examples" (the paper weights by examples).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from fedamole.federation.method import Client, ClientInfo, Server, TrainingResult, Weighting
from fedamole.federation.privacy.releases import Release
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.ranks import RankedMethod
from fedamole.methods.shared.stacks import Changes, Log, Merged, stacked
from fedamole.model.params import Adapter, new_shared, shared_keys


@dataclass(frozen=True)
class FloraState:
    """Server state: the stacked changes, and the rank of each client."""

    log: Log
    ranks: dict[str, int]


@dataclass(frozen=True)
class Stack:
    """Message: stacked LoRAs to merge, and the client's rank."""

    changes: Changes
    rank: int


@dataclass(frozen=True)
class FreshLora:
    """Reply: the trained LoRA, and how many changes the client has merged."""

    tensors: Mapping[str, Tensor]
    merged: int


@dataclass(frozen=True)
class Flora(RankedMethod[FloraState, Stack, Merged, FreshLora]):
    """LoRAs that are stacked, not averaged, and merged into the base every round."""

    ranks: tuple[int, ...] = ()
    """Ranks assigned to the clients in turn, by name; empty: `rank` for all."""
    weighting: Weighting = "uniform"
    """Weight of a client in the mean of the products: uniform, or by its training examples."""

    paper = "Wang et al., FLoRA: Federated Fine-Tuning with Heterogeneous LoRA, NeurIPS 2024, arXiv 2409.05976"
    communicates = "the stacked LoRAs of the last round down, one LoRA up"
    stays_local = "the data"
    evaluates = "post_aggregation"
    releases: ClassVar[Mapping[str, Release]] = {"tensors": "trained", "merged": "public"}

    # server
    @override
    def init(self, server: Server) -> FloraState:
        return FloraState(Log(Changes({})), self.in_turn(server.clients, self.ranks or (self.rank,)))

    @override
    def message(self, state: FloraState, client: ClientInfo) -> Stack:
        return Stack(state.log.pending(client.name), state.ranks[client.name])

    @override
    def aggregate(self, server: Server, state: FloraState, replies: Mapping[str, FreshLora]) -> FloraState:
        weights, change = server.weights(self.weighting), {}
        trained = {name: reply.tensors for name, reply in replies.items()}
        for module in sorted(server.shapes):
            a, b = stacked(trained, weights, shared_keys(module))
            change[module] = {"A": a, "B": b * (self.alpha / self.rank)}
        merged = {name: reply.merged for name, reply in replies.items()}
        return FloraState(state.log.add(change, merged, server.clients), state.ranks)

    # client
    @override
    def init_client_state(self, client: Client) -> Merged:
        return Merged.nothing(client.shapes)

    @override
    def adapter(self, client: Client, client_state: Merged, message: Stack) -> Adapter:
        """Return a new LoRA with B = 0 on the base with all changes."""
        generator = torch_generator(client.seed, "lora", client.name, client.round)
        lora = new_shared(client.shapes, message.rank, generator)
        return Adapter(self.spec_of(message.rank), lora, client_state.merge(message.changes).deltas)

    @override
    def reply(
        self, client: Client, client_state: Merged, message: Stack, trained: TrainingResult
    ) -> tuple[Merged, FreshLora]:
        merged = client_state.merge(message.changes)
        return merged, FreshLora(trained.adapter.tensors, merged.count)
