"""Local only: every client trains a LoRA of its own on its own data, without federation.

One round: each selected client continues to train its LoRA. All clients start from the same random LoRA, that of
FedIT. This is the baseline that a federated method has to beat.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from fedamole.federation.method import Client, ClientInfo, Server, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.params import Adapter, new_shared


@dataclass(frozen=True)
class OwnLora:
    """Client state: the client's own LoRA."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class LocalOnly(LoraMethod[Nothing, Nothing, OwnLora, Nothing]):
    """A LoRA per client, trained without federation."""

    paper = "baseline: no federation"
    communicates = "nothing"
    stays_local = "the data and the client's LoRA"
    evaluates = "pre_aggregation"

    # server
    @override
    def init(self, server: Server) -> Nothing:
        return Nothing()

    @override
    def message(self, state: Nothing, client: ClientInfo) -> Nothing:
        return Nothing()

    @override
    def aggregate(self, server: Server, state: Nothing, replies: Mapping[str, Nothing]) -> Nothing:
        return state

    # client
    @override
    def init_client_state(self, client: Client) -> OwnLora:
        return OwnLora(new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora")))

    @override
    def adapter(self, client: Client, client_state: OwnLora, message: Nothing) -> Adapter:
        return Adapter(self.spec(), client_state.tensors)

    @override
    def reply(
        self, client: Client, client_state: OwnLora, message: Nothing, trained: TrainingResult
    ) -> tuple[OwnLora, Nothing]:
        return OwnLora(trained.adapter.tensors), Nothing()
