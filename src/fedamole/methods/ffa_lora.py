"""FFA-LoRA: Sun, Li, Li, Ding, "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024,
https://arxiv.org/abs/2403.12313.

One round:
    A is drawn once, the same for all, and never trains: it need not travel;
    the server sends the global B to the cohort;
    every client trains B and sends it back;
    the server averages the B's: with one A this is the average of the products BA, exactly.
Deviations: the paper's noise for differential privacy is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedamole.federation.method import Client, Server, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.methods.fedit import FedIT, GlobalLora
from fedamole.model.params import Adapter, Shapes, new_shared


@dataclass(frozen=True)
class FfaLora(FedIT):
    """One LoRA for all clients of which only B is trained."""

    paper = "Sun et al., Improving LoRA in Privacy-preserving FL (FFA-LoRA), ICLR 2024, arXiv 2403.12313"
    communicates = "B of one LoRA down, B up; A is drawn from the run's seed on both sides"
    stays_local = "the data"

    # server
    def init(self, server: Server) -> GlobalLora:
        """Begin with B = 0."""
        return GlobalLora(_only(self._draw(server.shapes, server.seed), "B"))

    # client
    def adapter(self, client: Client, client_state: Nothing, message: GlobalLora) -> Adapter:
        """Put the global B beside the frozen A."""
        frozen = _only(self._draw(client.shapes, client.seed), "A")
        return Adapter(self.spec(), {**frozen, **message.tensors}, frozen=tuple(sorted(frozen)))

    def reply(
        self, client: Client, client_state: Nothing, message: GlobalLora, trained: TrainingResult
    ) -> tuple[Nothing, GlobalLora]:
        """Send back the trained B."""
        return client_state, GlobalLora(_only(trained.adapter.tensors, "B"))

    def _draw(self, shapes: Shapes, seed: int) -> dict[str, Tensor]:
        return new_shared(shapes, self.rank, torch_generator(seed, "lora"))


def _only(tensors: Mapping[str, Tensor], factor: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.endswith(f"/{factor}")}
