"""FedSA-LoRA: Guo, Zeng, Wang, Fan, Wang, Qu, "Selective Aggregation for Low-Rank Adaptation in Federated Learning",
ICLR 2025, https://arxiv.org/abs/2410.01463.

One round:
    1. The server sends the global factors A to the selected clients.
    2. Each client trains them together with its own factors B, keeps B and sends A back.
    3. The server averages the A's.
The model of a client is the global A with its own B, scored after the aggregation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from fedamole.federation.method import Client, Server, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import AveragedLora, SharedTensors
from fedamole.model.params import Adapter, Tensors, new_shared


@dataclass(frozen=True)
class OwnB:
    """Client state: the client's own B's."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class FedSaLora(AveragedLora[OwnB]):
    """A LoRA whose factors A are shared, and B the client's own."""

    paper = "Guo et al., Selective Aggregation for LoRA in Federated Learning (FedSA-LoRA), ICLR 2025, arXiv 2410.01463"
    communicates = "A of one LoRA down, A up"
    stays_local = "the data and the client's B"
    evaluates = "post_aggregation"

    @override
    def initial(self, server: Server) -> Tensors:
        return _split(super().initial(server))[0]

    @override
    def init_client_state(self, client: Client) -> OwnB:
        return OwnB(_split(new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora")))[1])

    @override
    def adapter(self, client: Client, client_state: OwnB, message: SharedTensors) -> Adapter:
        return Adapter(self.spec(), {**message.tensors, **client_state.tensors})

    @override
    def reply(
        self, client: Client, client_state: OwnB, message: SharedTensors, trained: TrainingResult
    ) -> tuple[OwnB, SharedTensors]:
        a, b = _split(trained.adapter.tensors)
        return OwnB(b), SharedTensors(a)


def _split(tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a LoRA into its A's and its B's."""
    a = {name: tensor for name, tensor in tensors.items() if name.endswith("/A")}
    return a, {name: tensor for name, tensor in tensors.items() if name not in a}
