"""Ditto on LoRAs: Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML
2021, https://arxiv.org/abs/2012.04221.

One round:
    the server sends the one global LoRA w to the cohort;
    every client trains it and sends it back (FedAvg),
    and trains a LoRA v of its own with lambda / 2 |v - w|^2 added to its loss, which it keeps;
    the server averages what came back.
A client's model is its own v.
Deviations: the distance is that of the factors A and B; lambda is one for all, where the paper lets clients choose on
validation data. With `training.budget = "steps"` the two trainings share the round's steps, half each, so that a round
costs as much as that of any other method; with "paper" each has all of them.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass

from fedamole.errors import ConfigError
from fedamole.federation.method import (
    Client,
    ClientInfo,
    LoraMethod,
    Records,
    Server,
    TrainingRequest,
    TrainingResult,
    Weighting,
)
from fedamole.federation.randomness import torch_generator
from fedamole.methods.fedit import GlobalLora
from fedamole.methods.local_only import OwnLora
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.model.params import Adapter, new_shared


@dataclass(frozen=True)
class Ditto(LoraMethod[GlobalLora, GlobalLora, OwnLora, GlobalLora]):
    """A global LoRA, and one per client that is held near it."""

    weighting: Weighting = "uniform"
    """Weight of a client in the average: uniform, or by its training examples."""
    proximal: float = 0.1
    """Weight lambda that holds the client's own LoRA near the global one (the paper tries 0.05 to 2)."""

    paper = "Li et al., Ditto: Fair and Robust Federated Learning Through Personalization, ICML 2021, arXiv 2012.04221"
    communicates = "one LoRA down, one LoRA up"
    stays_local = "the data and the client's own LoRA"
    records = Records(GlobalLora, GlobalLora, OwnLora, GlobalLora)
    evaluates = "pre_aggregation"
    averaged = ("tensors",)
    paper_steps = 2.0

    def __post_init__(self) -> None:
        """Refuse a negative weight."""
        super().__post_init__()
        if self.proximal < 0:
            raise ConfigError(f"method.proximal = {self.proximal}: must not be negative")

    # server
    def init(self, server: Server) -> GlobalLora:
        """Draw the first global LoRA."""
        return GlobalLora(new_shared(server.shapes, self.rank, torch_generator(server.seed, "lora")))

    def message(self, state: GlobalLora, client: ClientInfo) -> GlobalLora:
        """Send the global LoRA."""
        return state

    def aggregate(self, server: Server, state: GlobalLora, replies: Mapping[str, GlobalLora]) -> GlobalLora:
        """Average the global LoRAs that came back."""
        returned = {name: reply.tensors for name, reply in replies.items()}
        return GlobalLora(mean_by_key(returned, server.weights(self.weighting), state.tensors))

    # client
    def init_client_state(self, client: Client) -> OwnLora:
        """Begin where the global LoRA begins."""
        return OwnLora(new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora")))

    def adapter(self, client: Client, client_state: OwnLora, message: GlobalLora) -> Adapter:
        """Go on from the client's own LoRA."""
        return Adapter(self.spec(), client_state.tensors)

    def update(
        self, client: Client, client_state: OwnLora, message: GlobalLora
    ) -> Generator[TrainingRequest, TrainingResult, tuple[OwnLora, GlobalLora, TrainingResult]]:
        """Train the global LoRA, then the client's own near the one that was sent."""
        shared = yield TrainingRequest(Adapter(self.spec(), message.tensors), share=0.5, paper_share=1.0)
        start = self.adapter(client, client_state, message)
        own = yield TrainingRequest(
            start, share=0.5, paper_share=1.0, anchor=message.tensors, anchor_weight=self.proximal
        )
        _, reply = self.reply(client, client_state, message, shared)
        return OwnLora(own.adapter.tensors), reply, own

    def reply(
        self, client: Client, client_state: OwnLora, message: GlobalLora, trained: TrainingResult
    ) -> tuple[OwnLora, GlobalLora]:
        """Send back the trained global LoRA."""
        return client_state, GlobalLora(trained.adapter.tensors)
