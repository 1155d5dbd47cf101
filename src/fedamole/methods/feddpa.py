"""FedDPA: Yang, Long, Shen, Jiang, Blumenstein, "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS
2024, https://arxiv.org/abs/2403.19211; its iterative form, FedDPA-T.

One round:
    the server sends the one global LoRA to the cohort;
    every client trains it and sends it back (FedAvg),
    and trains a LoRA of its own beside the frozen global one, both at fixed weights, which it keeps;
    the server averages what came back.
A client's model, scored after the aggregation, weighs the two anew for every prompt: the own LoRA has `local_weight`
times the mean cosine between the prompt's last hidden state, under the own LoRA, and those of a few of the client's
prompts; the global one has the rest.
Deviations: those prompts are drawn from the examples set aside, not from the training data; of a client only their
hidden states are kept. A negative weight counts as 0. A client that has never trained has no such prompts: its model is
the global LoRA at the fixed weight 1 - `local_weight`. The global LoRA trains first, from round 0 on (the authors' code
begins the local one in round 1). With `training.budget = "steps"` the two trainings share the round's steps, half each;
with "paper" each has all of them.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

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
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.model.mixer import InstanceWeights
from fedamole.model.params import REFERENCES, Adapter, as_expert, new_shared

LOCAL, GLOBAL = 0, 1


@dataclass(frozen=True)
class LocalLora:
    """What a client keeps: a LoRA of its own, and what a few of its prompts look like, (S, d), once it has trained."""

    tensors: Mapping[str, Tensor]
    references: Mapping[str, Tensor]


@dataclass(frozen=True)
class FedDpa(LoraMethod[GlobalLora, GlobalLora, LocalLora, GlobalLora]):
    """A global and a local LoRA, weighted instance by instance."""

    weighting: Weighting = "uniform"
    """Weight of a client in the average: uniform, or by its training examples."""
    local_weight: float = InstanceWeights.max_weight
    """Weight of the local LoRA in training, and the most it can have for a prompt."""
    instances: int = 5
    """Prompts S that a new one is compared with."""

    paper = "Yang et al., Dual-Personalizing Adapter for Federated Foundation Models (FedDPA), NeurIPS 2024, 2403.19211"
    communicates = "one LoRA down, one LoRA up"
    stays_local = "the data, the client's own LoRA and hidden states of a few prompts"
    records = Records(GlobalLora, GlobalLora, LocalLora, GlobalLora)
    evaluates = "post_aggregation"
    averaged = ("tensors",)
    paper_steps = 2.0

    def __post_init__(self) -> None:
        """Refuse weights outside 0 .. 1, and no instances."""
        super().__post_init__()
        if not 0 < self.local_weight <= 1 or self.instances < 1:
            raise ConfigError(
                f"method.local_weight = {self.local_weight} must be above 0 and at most 1, "
                f"method.instances = {self.instances} at least 1"
            )

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
    def init_client_state(self, client: Client) -> LocalLora:
        """Begin where the global LoRA begins."""
        drawn = new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora"))
        return LocalLora(as_expert(drawn, LOCAL), {})

    def adapter(self, client: Client, client_state: LocalLora, message: GlobalLora) -> Adapter:
        """Put the client's own LoRA beside the frozen global one."""
        shared = as_expert(message.tensors, GLOBAL)
        spec = replace(self.spec(), router=InstanceWeights(self.local_weight))
        return Adapter(spec, {**client_state.tensors, **shared}, client_state.references, tuple(sorted(shared)))

    def update(
        self, client: Client, client_state: LocalLora, message: GlobalLora
    ) -> Generator[TrainingRequest, TrainingResult, tuple[LocalLora, GlobalLora, TrainingResult]]:
        """Train the global LoRA, then the client's own, and look at a few prompts."""
        shared = yield TrainingRequest(Adapter(self.spec(), message.tensors), share=0.5, paper_share=1.0)
        both = self.adapter(client, LocalLora(client_state.tensors, {}), message)
        own = yield TrainingRequest(both, share=0.5, paper_share=1.0)
        local = {name: own.adapter.tensors[name] for name in client_state.tensors}
        references = client.last_hidden(own.adapter, self.instances)
        _, reply = self.reply(client, client_state, message, shared)
        return LocalLora(local, {REFERENCES: references}), reply, own

    def reply(
        self, client: Client, client_state: LocalLora, message: GlobalLora, trained: TrainingResult
    ) -> tuple[LocalLora, GlobalLora]:
        """Send back the trained global LoRA."""
        return client_state, GlobalLora(trained.adapter.tensors)
