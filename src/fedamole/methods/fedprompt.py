"""FedPrompt: Zhao, Du, Li, Li, Liu, "FedPrompt: Communication-Efficient and Privacy-Preserving Prompt Tuning in
Federated Learning", ICASSP 2023, https://arxiv.org/abs/2208.12268.

One round:
    1. The server sends the global soft prompt, virtual tokens before every text, to the selected clients.
    2. Each client trains it on its own data, with the base frozen, and sends it back.
    3. The server averages the prompts.
The model of every client is the global prompt, scored after the aggregation; `fedprompt_ft` is scored before it.
Deviations: the prompt is initialised from a normal distribution with the standard deviation of the base's token
embeddings. All clients have the same weight unless `weighting` is "examples" (the paper weights by examples). The
paper's study of backdoors is left out.
"""

from dataclasses import dataclass

from typing_extensions import override

from fedamole.federation.method import Client, Server, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.methods.shared.averaging import AveragedMethod, SharedTensors
from fedamole.model.params import Adapter, Tensors
from fedamole.model.prompt import PromptSpec, new_prompt


@dataclass(frozen=True)
class FedPrompt(AveragedMethod[Nothing]):
    """One soft prompt for all clients, averaged every round."""

    virtual_tokens: int = PromptSpec.virtual_tokens
    """Number of virtual tokens v before each text."""

    paper = "Zhao et al., FedPrompt: Communication-Efficient Prompt Tuning in FL, ICASSP 2023, arXiv 2208.12268"
    communicates = "one soft prompt down, one up"
    stays_local = "the data"
    evaluates = "post_aggregation"

    @override
    def spec(self) -> PromptSpec:
        return PromptSpec(self.virtual_tokens)

    @override
    def initial(self, server: Server) -> Tensors:
        generator = torch_generator(server.seed, "prompt")
        return new_prompt(self.spec(), server.base.width, server.base.embedding_std, generator)

    @override
    def adapter(self, client: Client, client_state: Nothing, message: SharedTensors) -> Adapter:
        return Adapter(self.spec(), message.tensors)

    @override
    def reply(
        self, client: Client, client_state: Nothing, message: SharedTensors, trained: TrainingResult
    ) -> tuple[Nothing, SharedTensors]:
        return client_state, SharedTensors(trained.adapter.tensors)
