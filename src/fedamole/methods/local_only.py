"""Local only: every client trains a LoRA of its own on its own data; nobody learns from anybody.

The floor that a federation has to beat. One round: each client of the cohort goes on training its LoRA where it
stopped. All clients start from the same draw, the one FedIT starts from.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedamole.federation.method import Client, ClientInfo, LoraMethod, Records, Server, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.model.params import Adapter, new_shared


@dataclass(frozen=True)
class OwnLora:
    """A client's own LoRA."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class LocalOnly(LoraMethod[Nothing, Nothing, OwnLora, Nothing]):
    """A LoRA per client, trained alone."""

    paper = "baseline: no federation"
    communicates = "nothing"
    stays_local = "the data and the client's LoRA"
    records = Records(Nothing, Nothing, OwnLora, Nothing)
    evaluates = "pre_aggregation"

    # server
    def init(self, server: Server) -> Nothing:
        """Know nothing."""
        return Nothing()

    def message(self, state: Nothing, client: ClientInfo) -> Nothing:
        """Say only that a round has begun."""
        return Nothing()

    def aggregate(self, server: Server, state: Nothing, replies: Mapping[str, Nothing]) -> Nothing:
        """Learn nothing."""
        return state

    # client
    def init_client_state(self, client: Client) -> OwnLora:
        """Draw the LoRA."""
        return OwnLora(new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora")))

    def adapter(self, client: Client, client_state: OwnLora, message: Nothing) -> Adapter:
        """Go on from the client's own LoRA."""
        return Adapter(self.spec(), client_state.tensors)

    def reply(
        self, client: Client, client_state: OwnLora, message: Nothing, trained: TrainingResult
    ) -> tuple[OwnLora, Nothing]:
        """Keep the trained LoRA, send nothing."""
        return OwnLora(trained.adapter.tensors), Nothing()
