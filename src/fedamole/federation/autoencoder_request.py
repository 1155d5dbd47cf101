"""What a method asks for to have an autoencoder of hidden states trained, and what it gets back."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fedamole.federation.request import WithPartner
from fedamole.federation.settings import Budget
from fedamole.model.batch import Ids
from fedamole.model.layers import MeanEmbeddings
from fedamole.model.params import Adapter, Tensors


@dataclass(frozen=True)
class AutoencoderRequest(WithPartner):
    """A training of an autoencoder (`synthesis/latents.py`); `Method.update` yields it like a `TrainingRequest`.

    Each step draws hidden states, encodes them, decodes latent vectors to virtual tokens, and reads these in the prompt
    under the adapter. The adapter does not change.
    """

    tensors: Tensors
    """The autoencoder, where training starts."""
    adapter: Adapter
    """All its tensors are frozen."""
    hidden: Tensor
    """(N, d): last hidden states at the ends of real prompts under the same adapter."""
    classes: Tensor
    """(N): class of each prompt, an index of `tokens`."""
    tokens: tuple[int, ...]
    """First tokens of the classes' answers, which differ."""
    prompt: Ids
    """The template's own text, and -1 to -L in place of the columns."""
    step_fraction: float = 1.0
    """Fraction of the round's steps S. The fractions of a round, with those of trainings, add up to 1."""
    kl_weight: float = 0.05
    """Weight of the divergence of latent vectors from the standard normal distribution."""
    class_weight: float = 1.0
    """Weight of the cross-entropy of the class, in nats, given what was decoded."""
    batch_size: int = 16
    """Hidden states of a step, at most."""
    learning_rate: float = 0.003
    """Adam's learning rate."""

    partner = None

    def __post_init__(self) -> None:
        """Freeze the adapter; raise ValueError without hidden states."""
        if not len(self.hidden):
            raise ValueError("an autoencoder needs at least one hidden state to train on")
        object.__setattr__(self, "adapter", replace(self.adapter, frozen=tuple(self.adapter.tensors)))

    def kind(self) -> tuple[object, ...]:
        """Return a key that differs from that of all other requests; autoencoders are trained one at a time."""
        return ("autoencoder",)

    def fraction_for(self, budget: Budget) -> float:
        """Return the steps as a multiple of S, which are the same under every budget."""
        return self.step_fraction

    def unchanged(self, embeddings: Mapping[str, MeanEmbeddings] | None = None) -> "AutoencoderResult":
        """Return the result of a training that changes nothing, for dry runs."""
        return AutoencoderResult(self.tensors, 1, 0.0)


@dataclass(frozen=True)
class AutoencoderResult(WithPartner):
    """What a training of an autoencoder returns."""

    tensors: Tensors
    steps: int
    loss: float
    """Mean of the loss over the steps."""
    tokens: int = 0
    """Tokens in forward and backward passes."""

    partner = None
    teacher_examples = teacher_tokens = 0
