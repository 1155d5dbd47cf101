"""FedIT: Zhang, Vahidian, Kuo, Li, Zhang, Yu, Zhou, Chen, "Towards Building the Federated GPT: Federated
Instruction Tuning", ICASSP 2024, https://arxiv.org/abs/2305.05644.

One round:
    the server sends the one global LoRA to the cohort;
    every client trains it on its own data and sends it back;
    the server averages what came back (FedAvg): the global LoRA of the next round.
Every client's model is the global one, scored after the aggregation. `fedit_ft` is the same training, scored
before it: each client's model is then what it trained itself in the last round.
Deviations: clients count alike unless `weighting` says otherwise (the paper: by their examples).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedamole.federation.method import Client, ClientInfo, LoraMethod, Records, Server, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.model.params import Adapter, new_shared


@dataclass(frozen=True)
class GlobalLora:
    """The one LoRA of all: the server's state, and what travels both ways."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class FedIT(LoraMethod[GlobalLora, GlobalLora, Nothing, GlobalLora]):
    """One LoRA for all clients, averaged every round."""

    weighting: Weighting = "uniform"
    """Weight of a client in the average: uniform, or by its training examples."""

    paper = "Zhang et al., Towards Building the Federated GPT (FedIT), ICASSP 2024, arXiv 2305.05644"
    communicates = "one LoRA down, one LoRA up"
    stays_local = "the data"
    records = Records(GlobalLora, GlobalLora, Nothing, GlobalLora)
    evaluates = "post_aggregation"
    averaged = ("tensors",)

    # server
    def init(self, server: Server) -> GlobalLora:
        """Draw the first global LoRA."""
        return GlobalLora(new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora")))

    def message(self, state: GlobalLora, client: ClientInfo) -> GlobalLora:
        """Send the global LoRA."""
        return state

    def aggregate(self, server: Server, state: GlobalLora, replies: Mapping[str, GlobalLora]) -> GlobalLora:
        """Average the LoRAs that came back."""
        returned = {name: reply.tensors for name, reply in replies.items()}
        return GlobalLora(mean_by_key(returned, server.weights(self.weighting), state.tensors))

    # client
    def init_client_state(self, client: Client) -> Nothing:
        """Keep nothing."""
        return Nothing()

    def adapter(self, client: Client, client_state: Nothing, message: GlobalLora) -> Adapter:
        """Start from the global LoRA."""
        return Adapter(self.spec(), message.tensors)

    def reply(
        self, client: Client, client_state: Nothing, message: GlobalLora, trained: TrainingResult
    ) -> tuple[Nothing, GlobalLora]:
        """Send back the trained LoRA."""
        return client_state, GlobalLora(trained.adapter.tensors)
