"""FedPTuning: federated p-tuning, as FedAMoLE's authors compare with it. P-tuning: Liu, Zheng, Du, Ding, Qian, Yang,
Tang, "GPT Understands, Too", https://arxiv.org/abs/2103.10385.

One round: FedPrompt's, but the virtual tokens come out of a network (an embedding and a three-layer MLP), and it is the
network that is trained, travels and is averaged. The personal model is saved as the tokens that come out of it.
Deviations: the MLP re-parameterisation of PEFT's prompt encoder instead of the paper's LSTM; its hidden layers are 1024
wide, as in FedAMoLE's comparison.
"""

from dataclasses import dataclass

from fedamole.methods.fedprompt import FedPrompt
from fedamole.model.prompt import PromptSpec


@dataclass(frozen=True)
class FedPTuning(FedPrompt):
    """One prompt encoder for all clients, averaged every round."""

    encoder_hidden_size: int = 1024
    """Width of the MLP's hidden layers."""

    paper = "Liu et al., GPT Understands, Too (p-tuning), 2021, arXiv 2103.10385; federated as in FedAMoLE's comparison"
    communicates = "embedding and MLP of one prompt encoder down, the same up"

    def spec(self) -> PromptSpec:
        """What all prompts share."""
        return PromptSpec(self.virtual_tokens, mlp=True, hidden=self.encoder_hidden_size)
