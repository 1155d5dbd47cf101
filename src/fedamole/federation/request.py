"""What a method asks of local training, and what it gets back."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from fedamole.federation.distillation import Distillation
from fedamole.federation.penalties import Penalty
from fedamole.federation.settings import Budget
from fedamole.model.layers import MeanEmbeddings
from fedamole.model.params import REFERENCES, Adapter
from fedamole.model.prompt import PromptSpec
from fedamole.synthesis.examples import SyntheticExamples
from fedamole.synthesis.rows import ExtraRows


class WithPartner:
    """A training that may have a partner, or its result."""

    partner: Self | None

    @property
    def trainings(self) -> tuple[Self, ...]:
        """This one, and its partner if it has one."""
        return (self,) if self.partner is None else (self, self.partner)


@dataclass(frozen=True)
class TrainingRequest(WithPartner):
    """A local training that a method asks for."""

    adapter: Adapter
    """Where training starts, and which tensors stay frozen."""
    step_fraction: float = 1.0
    """Fraction of the round's steps S under `training.budget = "steps"`. The fractions of a round, with those of
    partners, add up to 1, so that all methods have the same budget."""
    penalty: Penalty | None = None
    """Term that is added to the loss."""
    weight_decay: float = 0.0
    """Decoupled weight decay as in AdamW: each step first multiplies trained values by 1 - learning rate * this."""
    paper_step_fraction: float | None = None
    """Steps of this training in the method's paper, as a multiple of S, for `training.budget = "paper"`; None: as
    `step_fraction`. Their sum over a round is the method's `paper_steps`."""
    teacher: Adapter | None = None
    """Frozen model that the training follows at the answer tokens. It reads every batch without dropout, which counts
    as forward passes. It may be of another kind than `adapter`, but has the same virtual tokens, if any."""
    partner: "TrainingRequest | None" = None
    """Training of another adapter of the same kind and fraction, step by step on the same batches and with the same
    dropout. Each of the two follows the other's distributions before the step. If the steps of both together are an
    odd number, they take one less."""
    distillation: Distillation | None = None
    """How much this training follows its teacher, its partner, or the soft labels of its extra rows; set for each that
    has one."""
    expert_weights: tuple[float, float] | None = None
    """Weights of the two experts of an adapter with `InstanceWeights` in this training; None: those of its router."""
    extra: ExtraRows | None = None
    """Rows that are read beside the client's own training examples, in one random order with them."""
    own_rows: bool = True
    """Whether the client's own training examples are read; False only with extra rows."""
    stays_local: bool = False
    """Whether the result, and everything computed from it, never leaves the client; then `[privacy]` adds no noise."""

    group_classes: ClassVar[Mapping[Any, Any]] = {}
    """Subclasses of `TrainingGroup` that train such requests, by the class that trains others (None: the default)."""

    def __post_init__(self) -> None:
        """Raise ValueError for a teacher, a partner or extra rows that this training cannot have."""
        if not (self.teacher is None and self.partner is None and self.extra is None and self.own_rows):
            self._check()

    def _check(self) -> None:
        self._check_rows()
        self._check_followed()

    def _check_rows(self) -> None:
        if self.extra is None and not self.own_rows:
            raise ValueError("a training without the client's own rows needs extra rows")
        if self.extra is None:
            return
        if self.partner is not None:
            raise ValueError("partners read the client's own rows alone")
        if self.extra.soft is not None and self.distillation is None:
            raise ValueError("a training on soft labels must say by `distillation` how much it follows them")
        if self.extra.soft is not None and self.teacher is not None:
            raise ValueError("a training follows soft labels or a teacher, not both")
        if self.extra.vectors is not None and isinstance(self.adapter.spec, PromptSpec):
            raise ValueError("an adapter that is a soft prompt cannot read rows with virtual tokens")

    def _check_followed(self) -> None:
        partner, teacher = self.partner, self.teacher
        if teacher is not None and _prefix(teacher) != _prefix(self.adapter):
            raise ValueError("a teacher must have the virtual tokens of the adapter that follows it")
        if teacher is not None and REFERENCES in teacher.fixed:  # these passes over the prompts would not be counted
            raise ValueError("the experts of a teacher cannot be weighted by prompt")
        follows = teacher is not None or partner is not None
        if follows and any(training.distillation is None for training in self.trainings):
            raise ValueError("a training with a teacher or a partner must say by `distillation` how much it follows it")
        if partner is None:
            return
        if teacher is not None or partner.teacher is not None or partner.partner is not None:
            raise ValueError("a training has a teacher or a partner, and a partner has neither")
        if partner.adapter.kind() != self.adapter.kind():
            raise ValueError("adapters that are trained as partners must be of one kind")
        if any(self.fraction_for(budget) != partner.fraction_for(budget) for budget in ("steps", "paper")):
            raise ValueError("partners take the same steps: their step fractions must be equal")

    def kind(self) -> tuple[object, ...]:
        """Return a key that is equal for requests that can be trained in one group."""
        return (
            self.adapter.kind(),
            self.partner is None,
            None if self.teacher is None else self.teacher.kind(),
            None if self.extra is None else self.extra.kind(),
            self.stays_local,
        )

    def fraction_for(self, budget: Budget) -> float:
        """Return the steps of this training, without its partner's, under a budget, as a multiple of S."""
        return self.step_fraction if budget == "steps" or self.paper_step_fraction is None else self.paper_step_fraction

    def unchanged(self, embeddings: Mapping[str, MeanEmbeddings] | None = None) -> "TrainingResult":
        """Return the result of a training that changes nothing, for dry runs."""
        result = TrainingResult(self.adapter, 1, 0.0, embeddings or {})
        return result if self.partner is None else replace(result, partner=self.partner.unchanged())


@dataclass(frozen=True)
class TrainingResult(WithPartner):
    """What a local training returns."""

    adapter: Adapter
    steps: int
    loss: float
    """Mean training loss over the steps, in nats per answer token, or of DPO per pair; without balance loss, penalty
    and divergence."""
    embeddings: Mapping[str, MeanEmbeddings] = field(default_factory=dict)
    """Mean router embeddings over the embedding split by module, for methods with `needs_embeddings`."""
    tokens: int = 0
    """Tokens, without padding, of the forward and backward passes."""
    partner: "TrainingResult | None" = None
    """Result of the partner, which is not included in the other fields."""
    synthetic: SyntheticExamples | None = None
    """Synthetic examples that a method has made beside this training and sends."""
    teacher_examples: int = 0
    """Examples that the teacher read, or the reference model of DPO."""
    teacher_tokens: int = 0
    """Tokens, without padding, of the forward passes of teacher or reference model."""


def _prefix(adapter: Adapter) -> tuple[int, ...]:
    return adapter.spec.prefix if isinstance(adapter.spec, PromptSpec) else ()
