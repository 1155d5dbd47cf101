"""FedSA-LoRA: Guo, Zeng, Wang, Fan, Wang, Qu, "Selective Aggregation for Low-Rank Adaptation in Federated Learning",
ICLR 2025, https://arxiv.org/abs/2410.01463.

One round:
    the server sends the global A to the cohort;
    every client puts its own B beside it, trains both, keeps B and sends A back;
    the server averages the A's.
A client's model is the global A with its own B, scored after the aggregation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedamole.federation.method import Client, ClientInfo, LoraMethod, Records, Server, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.model.params import Adapter, new_shared


@dataclass(frozen=True)
class SharedA:
    """The A of all: the server's state, and what travels both ways."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class OwnB:
    """A client's own B."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class FedSaLora(LoraMethod[SharedA, SharedA, OwnB, SharedA]):
    """A is shared, B is the client's own."""

    weighting: Weighting = "uniform"
    """Weight of a client in the average: uniform, or by its training examples."""

    paper = "Guo et al., Selective Aggregation for LoRA in Federated Learning (FedSA-LoRA), ICLR 2025, arXiv 2410.01463"
    communicates = "A of one LoRA down, A up"
    stays_local = "the data and the client's B"
    records = Records(SharedA, SharedA, OwnB, SharedA)
    evaluates = "post_aggregation"
    averaged = ("tensors",)

    # server
    def init(self, server: Server) -> SharedA:
        """Draw the first A."""
        drawn = new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora"))
        return SharedA(_split(drawn)[0])

    def message(self, state: SharedA, client: ClientInfo) -> SharedA:
        """Send the global A."""
        return state

    def aggregate(self, server: Server, state: SharedA, replies: Mapping[str, SharedA]) -> SharedA:
        """Average the A's that came back."""
        returned = {name: reply.tensors for name, reply in replies.items()}
        return SharedA(mean_by_key(returned, server.weights(self.weighting), state.tensors))

    # client
    def init_client_state(self, client: Client) -> OwnB:
        """Begin with B = 0."""
        drawn = new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora"))
        return OwnB(_split(drawn)[1])

    def adapter(self, client: Client, client_state: OwnB, message: SharedA) -> Adapter:
        """Put the client's B beside the global A."""
        return Adapter(self.spec(), {**message.tensors, **client_state.tensors})

    def reply(
        self, client: Client, client_state: OwnB, message: SharedA, trained: TrainingResult
    ) -> tuple[OwnB, SharedA]:
        """Keep B, send A."""
        a, b = _split(trained.adapter.tensors)
        return OwnB(b), SharedA(a)


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The A's and the B's of a LoRA."""
    a = {name: tensor for name, tensor in tensors.items() if name.endswith("/A")}
    return a, {name: tensor for name, tensor in tensors.items() if name not in a}
