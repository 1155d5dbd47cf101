"""FlexLoRA: Bai, Chen, Qian, Yao, Li, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
Client Resources", NeurIPS 2024, https://arxiv.org/abs/2402.11505.

One round:
    1. The server sends each selected client the global LoRA truncated to the client's own rank.
    2. Each client trains it and sends it back.
    3. The server averages the products BA; the singular value decomposition of the average gives the next LoRAs.
The model of every client is the global LoRA at its rank, scored after the aggregation.
Deviations: B = U S and A = V^T. The paper's ranks follow the clients' resources; here they are assigned in turn. All
clients have the same weight unless `weighting` is "examples" (the paper weights by examples). The decomposition is
computed from the factors, without forming the average.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from fedamole.federation.method import ClientInfo, Server, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.methods.shared.ranks import RankedLoraMethod
from fedamole.methods.shared.stacks import stacked, truncated
from fedamole.model.params import new_shared, shared_keys


@dataclass(frozen=True)
class RankedLora:
    """Server state: the global LoRA at the highest rank, and the rank of each client."""

    tensors: Mapping[str, Tensor]
    ranks: dict[str, int]


@dataclass(frozen=True)
class FlexLora(RankedLoraMethod[RankedLora]):
    """One global change of the base, sent to each client at its own rank."""

    ranks: tuple[int, ...] = ()
    """Ranks assigned to the clients in turn, by name; empty: half, once and twice `rank`."""
    weighting: Weighting = "uniform"
    """Weight of a client in the mean of the products: uniform, or by its training examples."""

    paper = "Bai et al., Fine-tuning under Heterogeneous Tasks and Resources (FlexLoRA), NeurIPS 2024, arXiv 2402.11505"
    communicates = "a LoRA of the client's rank down, the same up"
    stays_local = "the data"
    evaluates = "post_aggregation"

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
        weights, tensors = server.weights(self.weighting), dict[str, Tensor]()
        trained = {name: reply.tensors for name, reply in replies.items()}
        for module in sorted(server.shapes):
            keys = shared_keys(module)
            a, b = stacked(trained, weights, keys)
            tensors[keys[0]], tensors[keys[1]] = truncated(a, b, max(state.ranks.values()))
        return RankedLora(tensors, state.ranks)


def cut(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return the first ranks of a LoRA: rows of A, columns of B."""
    return {
        name: (tensor[:rank] if name.endswith("/A") else tensor[:, :rank]).contiguous()
        for name, tensor in tensors.items()
    }
