"""pFedHR on LoRAs: Wang, Yang, Cui, Gai, Li, Zhang, Yan, "Towards Personalized Federated Learning via Heterogeneous
Model Reassembly", NeurIPS 2023, https://arxiv.org/abs/2308.08643.

One round:
    1. The server sends each selected client its teacher, a LoRA; none in the client's first round.
    2. The client goes on training its own LoRA, with `kl_weight` times the KL divergence from the teacher's
       distribution of each answer token in the loss, and sends it back. It does not keep the teacher.
    3. The server reads public prompts under each client's LoRA. It computes the similarity (linear CKA) of the hidden
       states after each layer, of all clients and layers, and groups the layers by K-means.
    4. For each client it builds candidates. A candidate takes the LoRA of each layer from another client, drawn among
       those whose layer of this place is in the same group as the client's own.
    5. The client's next teacher is the candidate whose logits on the public prompts are the most similar (mean cosine)
       to those of the client's own LoRA.
The model of a client is its own trained LoRA, scored before any aggregation; there is no global model. The server needs
public prompts (`[data.public]`), whose answers are not read.
Deviations: all clients share one frozen base, so what is reassembled are the LoRAs of its layers. They keep their place
and have one shape, so that nothing is stitched or fine-tuned. The candidates are each client's own, from the layers of
others alone; the paper has one set for all. Cross-entropy has the weight 1 - `kl_weight`, in the paper 1. The number of
candidates and prompts, and `kl_weight`, are ours.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.distillation import Distillation
from fedamole.federation.method import Client, ClientInfo, Server, TrainingRequest, TrainingResult
from fedamole.federation.prompt_states import PromptStates
from fedamole.federation.randomness import numpy_generator, torch_generator
from fedamole.merging.reassembly import candidates, cka, layer_groups, nearest, reassembled
from fedamole.methods.local_only import OwnLora
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.methods.shared.checks import check_at_least
from fedamole.methods.shared.lora import LoraMethod
from fedamole.model.batch import Ids
from fedamole.model.params import Adapter, Shapes, Tensors, new_shared


@dataclass(frozen=True)
class ReassemblyState:
    """Server state."""

    loras: Mapping[str, Mapping[str, Tensor]]
    """The last LoRA of each client that has sent one."""
    donors: dict[str, list[str]]
    """For each of them, whose layers its next teacher has, the lowest first; empty while there is only one client."""


@dataclass(frozen=True)
class PFedHr(LoraMethod[ReassemblyState, SharedTensors, OwnLora, SharedTensors]):
    """A LoRA per client that learns from a teacher reassembled from the layers of similar clients."""

    kl_weight: float = 0.1
    """Weight of the divergence from the teacher, from 0 to 1; cross-entropy has the rest."""
    layer_groups: int = 2
    """Number of groups of layers."""
    candidates: int = 4
    """Candidates for the teacher of each client."""
    public_prompts: int = 64
    """Public prompts that the server reads at most; of more, a draw that is the same in all rounds."""

    paper = "Wang et al., Personalized FL via Heterogeneous Model Reassembly (pFedHR), NeurIPS 2023, arXiv 2308.08643"
    communicates = "one LoRA down, whose layers come from other clients, one LoRA up"
    stays_local = "the data"
    evaluates = "pre_aggregation"
    trains_at_server = True
    needs_public_prompts = True
    only_answers = "its teachers give distributions over one answer to a prompt"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.kl_weight <= 1:
            raise ConfigError(f"method.kl_weight = {self.kl_weight}: must be at least 0 and at most 1")
        # CKA centres its states: those of two prompts are alike whatever the model.
        check_at_least(self, layer_groups=1, candidates=1, public_prompts=3)

    @override
    def exposes(self, clients: int | None, shapes: Shapes | None) -> list[str]:
        return [
            *super().exposes(clients, shapes),
            "Each client is sent layers of single other clients' LoRAs as they were trained, without any average: "
            "whoever has them can see what these clients' data taught those layers.",
        ]

    # server
    @override
    def init(self, server: Server) -> ReassemblyState:
        return ReassemblyState({}, {})

    @override
    def message(self, state: ReassemblyState, client: ClientInfo) -> SharedTensors:
        donors = state.donors.get(client.name)
        return SharedTensors({} if donors is None else reassembled(state.loras, donors))

    @override
    def aggregate(
        self, server: Server, state: ReassemblyState, replies: Mapping[str, SharedTensors]
    ) -> ReassemblyState:
        loras = {**state.loras, **{name: reply.tensors for name, reply in replies.items()}}
        if len(loras) < 2:
            return ReassemblyState(loras, {})
        prompts = self.prompts(server)
        read = {name: self._read(server, loras[name], prompts) for name in sorted(loras)}
        similarities = cka(torch.cat([states.layers for states in read.values()]))
        labels = layer_groups(similarities, self.layer_groups, server.seed).reshape(len(read), -1)
        groups = dict(zip(read, labels.tolist(), strict=True))
        donors: dict[str, list[str]] = {}
        for name, own in read.items():
            rng = numpy_generator(server.seed, "candidates", name, server.round)
            drawn = candidates(groups, name, self.candidates, rng)
            logits = [self._read(server, reassembled(loras, each), prompts).logits for each in drawn]
            donors[name] = list(drawn[nearest(own.logits, logits)])
        return ReassemblyState(loras, donors)

    def prompts(self, server: Server) -> list[Ids]:
        """Return the public prompts that are read in each round."""
        order = numpy_generator(server.seed, "public", "server").permutation(len(server.public)).tolist()
        return [server.public[i].prompt for i in sorted(order[: self.public_prompts])]

    def _read(self, server: Server, lora: Tensors, prompts: list[Ids]) -> PromptStates:
        return server.read(Adapter(self.spec(), lora), prompts)

    # client
    @override
    def init_client_state(self, client: Client) -> OwnLora:
        return OwnLora(new_shared(client.shapes, self.rank, torch_generator(client.seed, "lora")))

    @override
    def adapter(self, client: Client, client_state: OwnLora, message: SharedTensors) -> Adapter:
        return Adapter(self.spec(), client_state.tensors)

    @override
    def update(
        self, client: Client, client_state: OwnLora, message: SharedTensors
    ) -> Generator[TrainingRequest, TrainingResult, tuple[OwnLora, SharedTensors, TrainingResult]]:
        request = TrainingRequest(self.adapter(client, client_state, message))
        if message.tensors:
            teacher = Adapter(self.spec(), message.tensors)
            request = replace(request, teacher=teacher, distillation=Distillation(self.kl_weight))
        trained = yield request
        return (*self.reply(client, client_state, message, trained), trained)

    @override
    def reply(
        self, client: Client, client_state: OwnLora, message: SharedTensors, trained: TrainingResult
    ) -> tuple[OwnLora, SharedTensors]:
        return OwnLora(trained.adapter.tensors), SharedTensors(trained.adapter.tensors)
