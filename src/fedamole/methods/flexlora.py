"""FlexLoRA: Bai, Chen, Qian, Yao, Li, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
Client Resources", NeurIPS 2024, https://arxiv.org/abs/2402.11505.

One round:
    the server sends each client of the cohort the global LoRA cut to the client's own rank;
    every client trains it and sends it back;
    the server averages the products BA, and the singular value decomposition of the average gives the next LoRAs.
Every client's model is the global LoRA at its rank, scored after the aggregation.
Deviations: B = U S and A = V^T; the paper's ranks follow the clients' resources, here they are given in turn, and its
clients count by their examples, here alike unless `weighting` says otherwise. The decomposition is computed from the
factors, without forming the average.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedamole.federation.method import Client, ClientInfo, Records, Server, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.methods.fedit import GlobalLora
from fedamole.methods.shared.ranks import RankedMethod
from fedamole.methods.shared.stacks import stacked, truncated
from fedamole.model.params import Adapter, new_shared, shared_keys


@dataclass(frozen=True)
class RankedLora:
    """The server's state: the global LoRA at the highest rank, and the rank of each client."""

    tensors: Mapping[str, Tensor]
    ranks: dict[str, int]


@dataclass(frozen=True)
class FlexLora(RankedMethod[RankedLora, GlobalLora, Nothing, GlobalLora]):
    """One global change of the base, sent to each client at its own rank."""

    ranks: tuple[int, ...] = ()
    """Ranks given to the clients in turn, by name; empty: half, once and twice `rank`."""
    weighting: Weighting = "uniform"
    """Weight of a client in the mean of the products: uniform, or by its training examples."""

    paper = "Bai et al., Fine-tuning under Heterogeneous Tasks and Resources (FlexLoRA), NeurIPS 2024, arXiv 2402.11505"
    communicates = "a LoRA of the client's rank down, the same up"
    stays_local = "the data"
    records = Records(RankedLora, GlobalLora, Nothing, GlobalLora)
    evaluates = "post_aggregation"

    # server
    def init(self, server: Server) -> RankedLora:
        """Draw the first LoRA at the highest rank."""
        ranks = self.in_turn(server.clients, self.ranks or self.half_once_twice())
        drawn = new_shared(server.shapes, max(ranks.values()), torch_generator(server.seed, "lora"))
        return RankedLora(drawn, ranks)

    def message(self, state: RankedLora, client: ClientInfo) -> GlobalLora:
        """Send the global LoRA, cut to the client's rank."""
        return GlobalLora(cut(state.tensors, state.ranks[client.name]))

    def aggregate(self, server: Server, state: RankedLora, replies: Mapping[str, GlobalLora]) -> RankedLora:
        """Average the products and decompose the average."""
        weights, tensors = server.weights(self.weighting), dict[str, Tensor]()
        trained = {name: reply.tensors for name, reply in replies.items()}
        for module in sorted(server.shapes):
            keys = shared_keys(module)
            a, b = stacked(trained, weights, keys)
            tensors[keys[0]], tensors[keys[1]] = truncated(a, b, max(state.ranks.values()))
        return RankedLora(tensors, state.ranks)

    # client
    def init_client_state(self, client: Client) -> Nothing:
        """Keep nothing."""
        return Nothing()

    def adapter(self, client: Client, client_state: Nothing, message: GlobalLora) -> Adapter:
        """Start from the global LoRA at the client's rank."""
        return Adapter(self.spec_of(rank_of(message.tensors)), message.tensors)

    def reply(
        self, client: Client, client_state: Nothing, message: GlobalLora, trained: TrainingResult
    ) -> tuple[Nothing, GlobalLora]:
        """Send back the trained LoRA."""
        return client_state, GlobalLora(trained.adapter.tensors)


def cut(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The first ranks of a LoRA: rows of A, columns of B."""
    return {
        name: (tensor[:rank] if name.endswith("/A") else tensor[:, :rank]).contiguous()
        for name, tensor in tensors.items()
    }


def rank_of(tensors: Mapping[str, Tensor]) -> int:
    """Rank of a LoRA."""
    return next(len(tensor) for name, tensor in tensors.items() if name.endswith("/A"))
