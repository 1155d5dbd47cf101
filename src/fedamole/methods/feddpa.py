"""FedDPA: Yang, Long, Shen, Jiang, Blumenstein, "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS
2024, https://arxiv.org/abs/2403.19211; its iterative form, FedDPA-T.

One round:
    1. The server sends the global LoRA to the selected clients.
    2. Each client trains it and sends it back.
    3. It also trains a LoRA of its own beside the frozen global one, both with fixed weights, and keeps it.
    4. The server averages the global LoRAs (FedAvg).
The model of a client, scored after the aggregation, weights the two LoRAs for each prompt: the own LoRA has
`local_weight` times the mean cosine similarity between the prompt's last hidden state, under the own LoRA, and those of
a few of the client's prompts (the references). The global LoRA has the rest.
Deviations: the references are drawn from the embedding split, not from the training data; only their hidden states are
kept. A negative weight counts as 0. A client that has never trained has no references: its model is the global LoRA
with the fixed weight 1 - `local_weight`. The global LoRA is trained first, from round 0 on (the authors' code starts
the local one in round 1). With `training.budget = "steps"` each of the two trainings takes half of the round's steps;
with "paper" each takes all of them.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import OWN_EXPERT, Client, TrainingRequest, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import AveragedLora, SharedTensors
from fedamole.model.mixer import InstanceWeights
from fedamole.model.params import REFERENCES, Adapter, as_expert, new_shared

LOCAL, GLOBAL = 0, 1


@dataclass(frozen=True)
class LocalLora:
    """Client state: the client's own LoRA, and once it has trained, hidden states (S, d) of S of its prompts."""

    tensors: Mapping[str, Tensor]
    references: Mapping[str, Tensor]


@dataclass(frozen=True)
class FedDpa(AveragedLora[LocalLora]):
    """A global and a local LoRA, weighted for each prompt."""

    local_weight: float = InstanceWeights.max_weight
    """Weight of the local LoRA in training, and its largest weight for a prompt."""
    instances: int = 5
    """Number of reference prompts S."""

    paper = "Yang et al., Dual-Personalizing Adapter for Federated Foundation Models (FedDPA), NeurIPS 2024, 2403.19211"
    communicates = "one LoRA down, one LoRA up"
    stays_local = "the data, the client's own LoRA and hidden states of a few prompts"
    evaluates = "post_aggregation"
    expert_roles = (OWN_EXPERT, "shared by all clients")
    paper_steps = 2.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.local_weight <= 1 or self.instances < 1:
            raise ConfigError(
                f"method.local_weight = {self.local_weight} must be above 0 and at most 1, "
                f"method.instances = {self.instances} at least 1"
            )

    @override
    def init_client_state(self, client: Client) -> LocalLora:
        lora = new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora"))
        return LocalLora(as_expert(lora, LOCAL), {})

    @override
    def adapter(self, client: Client, client_state: LocalLora, message: SharedTensors) -> Adapter:
        """Return the client's own LoRA beside the frozen global one."""
        shared = as_expert(message.tensors, GLOBAL)
        spec = replace(self.spec(), router=InstanceWeights(self.local_weight))
        return Adapter(spec, {**client_state.tensors, **shared}, client_state.references, tuple(sorted(shared)))

    @override
    def update(
        self, client: Client, client_state: LocalLora, message: SharedTensors
    ) -> Generator[TrainingRequest, TrainingResult, tuple[LocalLora, SharedTensors, TrainingResult]]:
        shared = yield TrainingRequest(
            Adapter(self.spec(), message.tensors), step_fraction=0.5, paper_step_fraction=1.0
        )
        both = self.adapter(client, LocalLora(client_state.tensors, {}), message)
        own = yield TrainingRequest(both, step_fraction=0.5, paper_step_fraction=1.0)
        local = {name: own.adapter.tensors[name] for name in client_state.tensors}
        references = client.probe.hidden_states(own.adapter, self.instances)
        _, reply = self.reply(client, client_state, message, shared)
        return LocalLora(local, {REFERENCES: references}), reply, own

    @override
    def reply(
        self, client: Client, client_state: LocalLora, message: SharedTensors, trained: TrainingResult
    ) -> tuple[LocalLora, SharedTensors]:
        """Return the trained global LoRA as the reply."""
        return client_state, SharedTensors(trained.adapter.tensors)
