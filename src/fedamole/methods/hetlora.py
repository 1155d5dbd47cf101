"""HetLoRA: Cho, Liu, Xu, Fahrezi, Joshi, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
EMNLP 2024, https://arxiv.org/abs/2401.06432.

One round:
    1. The server sends each selected client the global LoRA truncated to the client's rank r_k.
    2. The client trains it with lambda |A[t:]| |B[:, t:]| added to its loss, t = gamma r_k: the norm of the last ranks.
    3. If that norm is smaller than before, the client drops those ranks for good (self-pruning). It sends the rest.
    4. The server pads the LoRAs with zeros and averages them, each weighted by the Frobenius norm of its product BA.
The model of every client is the global LoRA at its rank, scored after the aggregation.
Deviations: ranks start as half, once and twice `rank`, in turn (the paper: between 5 and 50, by device). A client has
one weight over all modules. Ranks that no replying client has become 0 until a client that has them replies.
"""

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, ClientInfo, Server, TrainingRequest, TrainingResult
from fedamole.federation.penalties import TailNorm
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.methods.flexlora import RankedLora, cut
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.methods.shared.ranks import RankedLoraMethod, rank_of
from fedamole.model.params import Adapter, new_shared, shared_keys


@dataclass(frozen=True)
class HetLora(RankedLoraMethod[RankedLora]):
    """One global LoRA at ranks that clients prune themselves."""

    ranks: tuple[int, ...] = ()
    """Ranks that clients start with, in turn, by name; empty: half, once and twice `rank`."""
    tail_weight: float = 0.001
    """Weight lambda of the norm of the last ranks."""
    pruned_to: float = 0.99
    """Share gamma of its ranks that a client keeps when it prunes; at least one is dropped, and one kept."""

    paper = "Cho et al., Heterogeneous LoRA for Federated Fine-tuning (HetLoRA), EMNLP 2024, arXiv 2401.06432"
    communicates = "a LoRA of the client's rank down, the same or a smaller one up"
    stays_local = "the data"
    evaluates = "post_aggregation"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tail_weight < 0 or not 0 < self.pruned_to < 1:
            raise ConfigError(
                f"method.tail_weight = {self.tail_weight} must not be negative, method.pruned_to = {self.pruned_to} "
                "must be above 0 and below 1"
            )

    # server
    @override
    def init(self, server: Server) -> RankedLora:
        ranks = self.in_turn(server.clients, self.ranks or self.half_once_twice())
        lora = new_shared(server.shapes, max(ranks.values()), torch_generator(server.seed, "lora"))
        return RankedLora(lora, ranks)

    @override
    def message(self, state: RankedLora, client: ClientInfo) -> SharedTensors:
        return SharedTensors(cut(state.tensors, state.ranks[client.name]))

    @override
    def aggregate(self, server: Server, state: RankedLora, replies: Mapping[str, SharedTensors]) -> RankedLora:
        """Average with zeros for the ranks that a client lacks, weighted by the norms of the products."""
        names = sorted(replies)
        norms = {name: _product_norm(replies[name].tensors, server.shapes) for name in names}
        total, tensors = sum(norms.values()), dict[str, Tensor]()
        for key, tensor in state.tensors.items():
            mean = torch.zeros_like(tensor, dtype=torch.float64)
            for name in names:
                part = replies[name].tensors[key]
                weight = norms[name] / total if total else 1 / len(names)
                mean[tuple(slice(size) for size in part.shape)] += weight * part
            tensors[key] = mean.to(tensor.dtype)
        return RankedLora(tensors, {**state.ranks, **{name: rank_of(replies[name].tensors) for name in names}})

    @override
    def expected_reply(self, template: SharedTensors, reply: SharedTensors) -> SharedTensors:
        """Allow for ranks that the client has dropped."""
        return SharedTensors(cut(template.tensors, max(1, rank_of(reply.tensors))))

    # client
    @override
    def update(
        self, client: Client, client_state: Nothing, message: SharedTensors
    ) -> Generator[TrainingRequest, TrainingResult, tuple[Nothing, SharedTensors, TrainingResult]]:
        rank = rank_of(message.tensors)
        tail = max(1, math.floor(self.pruned_to * rank))
        penalty = TailNorm(tail, self.tail_weight) if tail < rank and self.tail_weight else None
        trained = yield TrainingRequest(self.adapter(client, client_state, message), penalty=penalty)
        tensors = trained.adapter.tensors
        if tail < rank and tail_norm(tensors, client.shapes, tail) < tail_norm(message.tensors, client.shapes, tail):
            tensors = cut(tensors, tail)
        pruned = replace(trained, adapter=Adapter(self.spec_of(rank_of(tensors)), tensors))
        return (*self.reply(client, client_state, message, pruned), pruned)


def tail_norm(tensors: Mapping[str, Tensor], modules: Mapping[str, object], first: int) -> float:
    """Return the sum over the modules of |A[first:]| |B[:, first:]|, Frobenius norms."""
    pairs = [[tensors[key] for key in shared_keys(module)] for module in modules]
    return float(sum(a[first:].norm() * b[:, first:].norm() for a, b in pairs))


def _product_norm(tensors: Mapping[str, Tensor], modules: Mapping[str, object]) -> float:
    """Return the Frobenius norm of all modules' products BA together, from the r x r Gram matrices."""
    squares = 0.0
    for module in sorted(modules):
        a, b = (tensors[key].double() for key in shared_keys(module))
        squares += float(((a @ a.T) * (b.T @ b)).sum())
    return math.sqrt(max(squares, 0.0))
