"""FedPrompt: Zhao, Du, Li, Li, Liu, "FedPrompt: Communication-Efficient and Privacy-Preserving Prompt Tuning in
Federated Learning", ICASSP 2023, https://arxiv.org/abs/2208.12268.

One round:
    the server sends the one global soft prompt, virtual tokens before every text, to the cohort;
    every client trains it on its own data, the base frozen, and sends it back;
    the server averages what came back.
Every client's model is the global prompt, scored after the aggregation; `fedprompt_ft` is scored before it.
Deviations: prompts are drawn from a Gaussian with the deviation of the base's own token embeddings; clients count alike
unless `weighting` says otherwise (the paper: by their examples). The paper's backdoor study is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedamole.federation.method import Client, ClientInfo, Method, Records, Server, TrainingResult, Weighting
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import Nothing
from fedamole.methods.shared.averaging import mean_by_key
from fedamole.model.params import Adapter
from fedamole.model.prompt import PromptSpec, new_prompt


@dataclass(frozen=True)
class GlobalPrompt:
    """The one prompt of all: the server's state, and what travels both ways."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class FedPrompt(Method[GlobalPrompt, GlobalPrompt, Nothing, GlobalPrompt]):
    """One soft prompt for all clients, averaged every round."""

    virtual_tokens: int = PromptSpec.virtual_tokens
    """Virtual tokens v before each text."""
    weighting: Weighting = "uniform"
    """Weight of a client in the average: uniform, or by its training examples."""

    paper = "Zhao et al., FedPrompt: Communication-Efficient Prompt Tuning in FL, ICASSP 2023, arXiv 2208.12268"
    communicates = "one soft prompt down, one up"
    stays_local = "the data"
    records = Records(GlobalPrompt, GlobalPrompt, Nothing, GlobalPrompt)
    evaluates = "post_aggregation"
    averaged = ("tensors",)

    def spec(self) -> PromptSpec:
        """What all prompts share."""
        return PromptSpec(self.virtual_tokens)

    # server
    def init(self, server: Server) -> GlobalPrompt:
        """Draw the first prompt."""
        generator = torch_generator(server.seed, "prompt")
        return GlobalPrompt(new_prompt(self.spec(), server.width, server.embedding_std, generator))

    def message(self, state: GlobalPrompt, client: ClientInfo) -> GlobalPrompt:
        """Send the global prompt."""
        return state

    def aggregate(self, server: Server, state: GlobalPrompt, replies: Mapping[str, GlobalPrompt]) -> GlobalPrompt:
        """Average the prompts that came back."""
        returned = {name: reply.tensors for name, reply in replies.items()}
        return GlobalPrompt(mean_by_key(returned, server.weights(self.weighting), state.tensors))

    # client
    def init_client_state(self, client: Client) -> Nothing:
        """Keep nothing."""
        return Nothing()

    def adapter(self, client: Client, client_state: Nothing, message: GlobalPrompt) -> Adapter:
        """Start from the global prompt."""
        return Adapter(self.spec(), message.tensors)

    def reply(
        self, client: Client, client_state: Nothing, message: GlobalPrompt, trained: TrainingResult
    ) -> tuple[Nothing, GlobalPrompt]:
        """Send back the trained prompt."""
        return client_state, GlobalPrompt(trained.adapter.tensors)
