"""FedDAT: Chen, Zhang, Krompass, Gu, Tresp, "FedDAT: An Approach for Foundation Model Finetuning in Multi-Modal
Heterogeneous Federated Learning", AAAI 2024, https://arxiv.org/abs/2308.12305.

One round:
    1. The server sends the shared LoRA to the selected clients.
    2. Each client builds its dual teacher: its own LoRA beside a frozen copy of the shared one, each with weight 1/2.
    3. It trains the teacher's own LoRA and, alone, the shared LoRA on the same batches. The loss of each is
       (1 - `kl_weight`) times cross-entropy plus `kl_weight` T^2 times the KL divergence from the other's
       distribution of each answer token at temperature T (mutual knowledge distillation).
    4. The client keeps its own LoRA and sends the shared one back.
    5. The server averages the shared LoRAs (FedAvg).
The model of a client is its dual teacher with the next shared LoRA, scored after the aggregation. It is written as one
LoRA of twice the rank, which computes the same.
Deviations: LoRAs in place of bottleneck adapters. Both are updated from the distributions before the step; the authors'
code updates the shared adapter first. KL is the mean per answer token, as the cross-entropy is; in the authors' code it
is the sum over an example. With `training.budget = "steps"` each of the two trainings takes half of the round's steps,
because a step computes two models; with "paper" each takes all of them.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace

from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.distillation import Distillation
from fedamole.federation.method import Client, TrainingRequest, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.methods.local_only import OwnLora
from fedamole.methods.shared.averaging import AveragedLora, SharedTensors
from fedamole.methods.shared.stacks import stacked
from fedamole.model.mixer import InstanceWeights
from fedamole.model.params import Adapter, Shapes, as_expert, expert_as_lora, new_shared, shared_keys

OWN, SHARED = 0, 1


@dataclass(frozen=True)
class FedDat(AveragedLora[OwnLora]):
    """A shared LoRA and a dual teacher per client that learn from each other."""

    kl_weight: float = 0.5
    """Weight of the divergence in both losses, from 0 to 1; cross-entropy has the rest (the authors' code: 0.5)."""
    temperature: float = 3.0
    """Temperature T by which the logits are divided for the divergence."""

    paper = "Chen et al., FedDAT: Foundation Model Finetuning in Heterogeneous FL, AAAI 2024, arXiv 2308.12305"
    communicates = "one LoRA down, one LoRA up"
    stays_local = "the data and the client's own LoRA"
    evaluates = "post_aggregation"
    paper_steps = 2.0
    trains_together = 2
    only_answers = "its two adapters learn from each other's distributions over one answer to a prompt"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.kl_weight <= 1:
            raise ConfigError(f"method.kl_weight = {self.kl_weight}: must be at least 0 and at most 1")
        if not 0.1 <= self.temperature <= 100:
            raise ConfigError(f"method.temperature = {self.temperature}: must be at least 0.1 and at most 100")

    @override
    def init_client_state(self, client: Client) -> OwnLora:
        return OwnLora(new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora")))

    @override
    def adapter(self, client: Client, client_state: OwnLora, message: SharedTensors) -> Adapter:
        """Return the dual teacher: the client's own LoRA beside the frozen shared one."""
        own, shared = as_expert(client_state.tensors, OWN), as_expert(message.tensors, SHARED)
        spec = replace(self.spec(), router=InstanceWeights(0.5))
        return Adapter(spec, {**own, **shared}, frozen=tuple(sorted(shared)))

    @override
    def update(
        self, client: Client, client_state: OwnLora, message: SharedTensors
    ) -> Generator[TrainingRequest, TrainingResult, tuple[OwnLora, SharedTensors, TrainingResult]]:
        teacher, follows = self.adapter(client, client_state, message), Distillation(self.kl_weight, self.temperature)
        # The student has the teacher's form, so that both fit into one bank; its own LoRA has no weight.
        frozen = tuple(name for name in teacher.tensors if name not in teacher.frozen)
        student = TrainingRequest(
            replace(teacher, frozen=frozen),
            step_fraction=0.5,
            paper_step_fraction=1.0,
            distillation=follows,
            expert_weights=(0.0, 1.0),
        )
        pair = yield TrainingRequest(
            teacher, step_fraction=0.5, paper_step_fraction=1.0, partner=student, distillation=follows
        )
        trained = replace(pair, adapter=self._model(pair.adapter, client.shapes))
        return (*self.reply(client, client_state, message, trained), trained)

    @override
    def reply(
        self, client: Client, client_state: OwnLora, message: SharedTensors, trained: TrainingResult
    ) -> tuple[OwnLora, SharedTensors]:
        """Keep the own LoRA, the first half of the client's model; return the student, the trained shared LoRA."""
        assert trained.partner is not None
        own: dict[str, Tensor] = {}
        for a, b in map(shared_keys, client.shapes):
            own[a] = trained.adapter.tensors[a][: self.rank].clone()
            own[b] = 2 * trained.adapter.tensors[b][:, : self.rank]  # its weight 1/2 is in B
        return OwnLora(own), SharedTensors(expert_as_lora(trained.partner.adapter.tensors, SHARED))

    @override
    def personal(
        self, client: Client, client_state: OwnLora, message: SharedTensors | None, trained: Adapter | None
    ) -> Adapter | None:
        teacher = super().personal(client, client_state, message, trained)
        return teacher if teacher is None or teacher is trained else self._model(teacher, client.shapes)

    def _model(self, teacher: Adapter, shapes: Shapes) -> Adapter:
        """Return a dual teacher as one LoRA of twice the rank, the own LoRA first."""
        both = {str(expert): expert_as_lora(teacher.tensors, expert) for expert in (OWN, SHARED)}
        tensors: dict[str, Tensor] = {}
        for keys in map(shared_keys, shapes):
            tensors.update(zip(keys, stacked(both, {str(OWN): 1.0, str(SHARED): 1.0}, keys), strict=True))
        return Adapter(replace(self.spec(), rank=2 * self.rank, alpha=2 * self.alpha), tensors)
