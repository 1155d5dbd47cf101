"""Few-shot steerable alignment: Kobalczyk, Fanconi, Sun, van der Schaar, "Few-shot Steerable Alignment: Adapting
Rewards and LLM Policies with Neural Processes", 2024, https://arxiv.org/abs/2412.13998.

One round:
    1. The server sends a LoRA and an encoder to the selected clients.
    2. In each step a client draws 0 to `context_pairs` of its preference pairs. The encoder turns their hidden states
       under the base into a vector z, which scales the ranks of the LoRA in every module (FiLM). The LoRA so steered is
       trained on other pairs of the client, by the DPO loss, together with the encoder.
    3. The client sends LoRA and encoder back.
    4. The server averages both (FedAvg).
The model of a client is the next LoRA, steered by up to `context_pairs` pairs that the client set aside (its embedding
split), scored after the aggregation. It is a plain LoRA. Neither z nor the scales leave the client.
Deviations: FiLM scales the rank-r activations of the LoRA in each module, without shift, in place of the outputs of the
decoder's layers, so that a steered model is a LoRA that other programs can load. A pair enters as the difference of its
two hidden states, which makes the vectors of opposite preferences opposite; the paper joins both states. z is computed,
not sampled, and without pairs it is 0: the model is the LoRA itself. The pairs are embedded by the same base. The
paper's reward model is left out. With `training.objective = "answer"` an example is a prompt with one answer, whose
hidden state enters, and the loss is that of the answer.
"""

from collections.abc import Generator
from dataclasses import dataclass

from typing_extensions import override

from fedamole.errors import ConfigError
from fedamole.federation.method import Client, Server, TrainingRequest, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.federation.steering import SteeredRequest
from fedamole.methods.shared.averaging import AveragedLora, SharedTensors
from fedamole.model.params import Adapter, Tensors
from fedamole.model.steering import STEERING, SteeredAdapter, new_encoder, rank_scales, steered


@dataclass(frozen=True)
class Steerable(AveragedLora[Nothing]):
    """One LoRA for all clients that a few examples of a client steer."""

    context_pairs: int = 6
    """Largest number of examples that steer a model; training draws 0 to this in each step."""
    condition_size: int = 64
    """Width of the encoder, and length of z; a multiple of `heads`."""
    heads: int = 8
    """Heads of the encoder's self-attention among the examples."""

    paper = "Kobalczyk et al., Few-shot Steerable Alignment with Neural Processes, 2024, arXiv 2412.13998"
    communicates = "one LoRA and one encoder down, the same up"
    stays_local = "the data, the vector of the client's examples and the scales computed from it"
    evaluates = "post_aggregation"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.context_pairs <= 1000:
            raise ConfigError(f"method.context_pairs = {self.context_pairs}: must be at least 1 and at most 1000")
        if self.heads < 1 or self.condition_size < 1 or self.condition_size % self.heads:
            raise ConfigError(
                f"method.condition_size = {self.condition_size}: must be a multiple of method.heads = {self.heads}, "
                "both at least 1"
            )

    # server
    @override
    def initial(self, server: Server) -> Tensors:
        generator = torch_generator(server.seed, "encoder")
        encoder = new_encoder(server.shapes, server.base.width, self.rank, self.condition_size, generator)
        return {**super().initial(server), **encoder}

    # client
    @override
    def adapter(self, client: Client, client_state: Nothing, message: SharedTensors) -> SteeredAdapter:
        """Return the LoRA with its encoder, as it is trained."""
        lora = {name: tensor for name, tensor in message.tensors.items() if not name.startswith(STEERING)}
        encoder = {name: tensor for name, tensor in message.tensors.items() if name.startswith(STEERING)}
        return SteeredAdapter(self.spec(), lora, encoder=encoder, heads=self.heads, context_examples=self.context_pairs)

    @override
    def update(
        self, client: Client, client_state: Nothing, message: SharedTensors
    ) -> Generator[TrainingRequest, TrainingResult, tuple[Nothing, SharedTensors, TrainingResult]]:
        trained = yield SteeredRequest(self.adapter(client, client_state, message))
        client_state, reply = self.reply(client, client_state, message, trained)
        own = self.steered_by_own(client, self.adapter(client, client_state, reply))
        return client_state, reply, TrainingResult(own, trained.steps, trained.loss)

    @override
    def reply(
        self, client: Client, client_state: Nothing, message: SharedTensors, trained: TrainingResult
    ) -> tuple[Nothing, SharedTensors]:
        adapter = trained.adapter
        encoder = adapter.encoder if isinstance(adapter, SteeredAdapter) else {}
        return client_state, SharedTensors({**adapter.tensors, **encoder})

    @override
    def personal(
        self, client: Client, client_state: Nothing, message: SharedTensors | None, trained: Adapter | None
    ) -> Adapter | None:
        model = super().personal(client, client_state, message, trained)
        return self.steered_by_own(client, model) if isinstance(model, SteeredAdapter) else model

    def steered_by_own(self, client: Client, adapter: SteeredAdapter) -> Adapter:
        """Return the LoRA steered by the pairs that the client set aside, as a plain LoRA."""
        states = client.probe.example_states(self.context_pairs)
        scales = rank_scales(adapter.encoder, states, self.heads, self.rank)
        return Adapter(self.spec(), steered(adapter.tensors, scales))
