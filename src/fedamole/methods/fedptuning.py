"""FedPTuning: federated p-tuning, the baseline of FedAMoLE's authors. P-tuning: Liu, Zheng, Du, Ding, Qian, Yang,
Tang, "GPT Understands, Too", https://arxiv.org/abs/2103.10385.

One round is that of FedPrompt, but the virtual tokens are the output of a network (an embedding and a three-layer MLP).
The network is trained, sent and averaged. A personal model is saved as the network's output, the virtual tokens.
Deviations: the network is the MLP of PEFT's prompt encoder instead of the paper's LSTM; its hidden layers are 1024
wide, as in FedAMoLE's comparison.
"""

from dataclasses import dataclass

from typing_extensions import override

from fedamole.methods.fedprompt import FedPrompt
from fedamole.model.prompt import PromptSpec


@dataclass(frozen=True)
class FedPTuning(FedPrompt):
    """One prompt encoder for all clients, averaged every round."""

    encoder_hidden_size: int = 1024
    """Width of the MLP's hidden layers."""

    paper = "Liu et al., GPT Understands, Too (p-tuning), 2021, arXiv 2103.10385; federated as in FedAMoLE's comparison"
    communicates = "embedding and MLP of one prompt encoder down, the same up"

    @override
    def spec(self) -> PromptSpec:
        return PromptSpec(self.virtual_tokens, mlp=True, hidden=self.encoder_hidden_size)
