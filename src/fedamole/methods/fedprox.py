"""FedProx on a LoRA: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks",
MLSys 2020, https://arxiv.org/abs/1812.06127.

One round:
    the server sends the one global LoRA w to the cohort;
    every client trains it with mu / 2 |w_k - w|^2 added to its loss, and sends it back;
    the server averages what came back.
Deviations: the distance is that of the factors A and B. The paper lets stragglers do less work and draws clients by
their amounts of data; here everybody takes its steps and the cohort is drawn evenly.
"""

from collections.abc import Generator
from dataclasses import dataclass

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, TrainingRequest, TrainingResult
from fedamole.federation.record import Nothing
from fedamole.methods.fedit import FedIT, GlobalLora


@dataclass(frozen=True)
class FedProx(FedIT):
    """FedIT whose clients are held near the global LoRA while they train."""

    proximal: float = 0.01
    """Weight mu of the proximal term (the paper tries 0.001 to 1)."""

    paper = "Li et al., Federated Optimization in Heterogeneous Networks (FedProx), MLSys 2020, arXiv 1812.06127"

    def __post_init__(self) -> None:
        """Refuse a negative weight."""
        super().__post_init__()
        if self.proximal < 0:
            raise ConfigError(f"method.proximal = {self.proximal}: must not be negative")

    def update(
        self, client: Client, client_state: Nothing, message: GlobalLora
    ) -> Generator[TrainingRequest, TrainingResult, tuple[Nothing, GlobalLora, TrainingResult]]:
        """Train near the global LoRA."""
        adapter = self.adapter(client, client_state, message)
        trained = yield TrainingRequest(adapter, anchor=message.tensors, anchor_weight=self.proximal)
        return (*self.reply(client, client_state, message, trained), trained)
