"""FLoRA: Wang, Shen, He, Sun, Wang, Lyu, Li, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
Low-Rank Adaptations", NeurIPS 2024, https://arxiv.org/abs/2409.05976.

One round:
    the server sends the stacked LoRAs of the rounds that the client has not merged yet;
    the client adds their product to its base, draws a fresh LoRA, trains it and sends it back;
    the server stacks what came back: the product of the stacks is the weighted mean of the clients' products, exactly.
Every client's model is the base with all changes so far, scored after the aggregation. Clients may have other ranks.
Deviations: the frozen base is not written; a client keeps the sum of the changes beside it. Clients count alike unless
`weighting` says otherwise (the paper: by their examples).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedamole.federation.method import Client, ClientInfo, Records, Server, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.ranks import RankedMethod
from fedamole.methods.shared.stacks import Changes, Log, Merged, stacked
from fedamole.model.params import Adapter, new_shared, shared_keys


@dataclass(frozen=True)
class FloraState:
    """The server's state: the stacked changes, and the rank of each client."""

    log: Log
    ranks: dict[str, int]


@dataclass(frozen=True)
class Stack:
    """Message down: stacked LoRAs to merge, and the client's rank."""

    changes: Changes
    rank: int


@dataclass(frozen=True)
class FreshLora:
    """Reply up: the trained LoRA, and how many changes the client has merged."""

    tensors: Mapping[str, Tensor]
    merged: int


@dataclass(frozen=True)
class Flora(RankedMethod[FloraState, Stack, Merged, FreshLora]):
    """Clients' LoRAs are stacked, not averaged, and merged into the base every round."""

    ranks: tuple[int, ...] = ()
    """Ranks given to the clients in turn, by name; empty: `rank` for all."""
    weighting: Weighting = "uniform"
    """Weight of a client in the mean of the products: uniform, or by its training examples."""

    paper = "Wang et al., FLoRA: Federated Fine-Tuning with Heterogeneous LoRA, NeurIPS 2024, arXiv 2409.05976"
    communicates = "the stacked LoRAs of the last round down, one LoRA up"
    stays_local = "the data"
    records = Records(FloraState, Stack, Merged, FreshLora)
    evaluates = "post_aggregation"

    # server
    def init(self, server: Server) -> FloraState:
        """Begin with no change."""
        return FloraState(Log(Changes({})), self.in_turn(server.clients, self.ranks or (self.rank,)))

    def message(self, state: FloraState, client: ClientInfo) -> Stack:
        """Send what the client has not merged yet."""
        return Stack(state.log.pending(client.name), state.ranks[client.name])

    def aggregate(self, server: Server, state: FloraState, replies: Mapping[str, FreshLora]) -> FloraState:
        """Stack what came back."""
        weights, change = server.weights(self.weighting), {}
        trained = {name: reply.tensors for name, reply in replies.items()}
        for module in sorted(server.shapes):
            a, b = stacked(trained, weights, shared_keys(module))
            change[module] = {"A": a, "B": b * (self.alpha / self.rank)}
        merged = {name: reply.merged for name, reply in replies.items()}
        return FloraState(state.log.add(change, merged, server.clients), state.ranks)

    # client
    def init_client_state(self, client: Client) -> Merged:
        """Begin with no change."""
        return Merged.nothing(client.shapes)

    def adapter(self, client: Client, client_state: Merged, message: Stack) -> Adapter:
        """Merge what was sent and put a fresh LoRA, B = 0, on top."""
        generator = torch_generator(client.seed, "lora", client.name, client.round)
        fresh = new_shared(client.shapes, message.rank, generator)
        return Adapter(self.spec_of(message.rank), fresh, client_state.merge(message.changes).deltas)

    def reply(
        self, client: Client, client_state: Merged, message: Stack, trained: TrainingResult
    ) -> tuple[Merged, FreshLora]:
        """Keep the sum of the changes, send the trained LoRA."""
        now = client_state.merge(message.changes)
        return now, FreshLora(trained.adapter.tensors, now.count)
