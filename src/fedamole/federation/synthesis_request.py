"""What a method asks for to have synthetic examples optimised, and what it gets back."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedamole.federation.autoencoder_request import AutoencoderRequest
from fedamole.federation.request import TrainingRequest, WithPartner
from fedamole.federation.settings import Budget
from fedamole.model.batch import Ids
from fedamole.model.layers import MeanEmbeddings
from fedamole.model.params import Adapter
from fedamole.synthesis.examples import SyntheticExamples
from fedamole.synthesis.matching import Objective


@dataclass(frozen=True)
class SynthesisRequest(WithPartner):
    """An optimisation of the vectors of synthetic examples; `Method.update` yields it like a `TrainingRequest`.

    In each step the forward passes are made under one adapter: `adapter`, or a random point between it and `toward`,
    plus random noise. The adapters themselves do not change. Real examples are drawn from the client's training split.
    """

    examples: SyntheticExamples
    """Where the optimisation starts."""
    adapter: Adapter
    """All its tensors are frozen."""
    objective: Objective
    step_fraction: float = 1.0
    """Fraction of the round's steps S. The fractions of a round, with those of trainings, add up to 1."""
    toward: Adapter | None = None
    """Adapter of the same names and shapes; None: all passes are made under `adapter`, apart from the noise."""
    against: Adapter | None = None
    """Second adapter of the same kind, under which the logits of the synthetic examples are also computed
    (`Features.other`); None: there is none."""
    noise: float = 0.0
    """Largest norm of the noise that is added to the adapter in each step; the norm is drawn evenly from 0 on."""
    real_examples: int = 32
    """Real examples of each class that a step reads, at most; with `Objective.real_once`, that all steps read."""
    class_answers: tuple[Ids, ...] = ()
    """Answer of each class, by which the client's training examples are divided; empty: all are of class 0."""
    learning_rate: float = 0.02
    """Adam's learning rate for the vectors."""
    answered_by: Adapter | None = None
    """Model whose greedy answers to the optimised examples become their answers; None: the answers stay."""
    max_answer_tokens: int = 16
    """Tokens of such an answer, at most."""
    paper_step_fraction: float | None = None
    """As in a `TrainingRequest`."""

    partner = None

    def __post_init__(self) -> None:
        """Freeze the adapter; raise ValueError if features that are computed once would change from step to step."""
        if self.objective.real_once and (self.toward is not None or self.noise):
            raise ValueError("real examples can only be read once if all passes are made under one adapter")
        object.__setattr__(self, "adapter", replace(self.adapter, frozen=tuple(self.adapter.tensors)))

    def kind(self) -> tuple[object, ...]:
        """Return a key that differs from that of every training; optimisations run one client at a time."""
        return ("synthesis",)

    def fraction_for(self, budget: Budget) -> float:
        """Return the steps under a budget, as a multiple of S."""
        return self.step_fraction if budget == "steps" or self.paper_step_fraction is None else self.paper_step_fraction

    def unchanged(self, embeddings: Mapping[str, MeanEmbeddings] | None = None) -> "SynthesisResult":
        """Return the result of an optimisation that changes nothing, for dry runs."""
        return SynthesisResult(self.examples, 1, 0.0)


@dataclass(frozen=True)
class SynthesisResult(WithPartner):
    """What an optimisation of synthetic examples returns."""

    examples: SyntheticExamples
    steps: int
    loss: float
    """Mean of the objective over the steps."""
    tokens: int = 0
    """Tokens of the synthetic examples in forward and backward passes."""
    teacher_examples: int = 0
    """Real examples, and synthetic ones in generating answers, that were read without a backward pass."""
    teacher_tokens: int = 0
    """Tokens of these."""

    partner = None


Request = TrainingRequest | SynthesisRequest | AutoencoderRequest
"""What `Method.update` may yield."""
