"""Scores of one client's model on one of its splits, identically for every method."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fedamole.errors import ConfigError
from fedamole.evaluation.generation import generate_answers
from fedamole.evaluation.likelihood import mean_losses, option_losses
from fedamole.evaluation.scores import GenerationScore, accuracy, generation_scores
from fedamole.model.bank import Bank
from fedamole.model.batch import Ids


@dataclass(frozen=True)
class EvaluationSettings:
    """`[evaluation]`: how models are scored and the best round is chosen."""

    select: Literal["loss", "score"] = "loss"
    """What chooses the best round on validation: the loss or the score."""
    best_round: Literal["auto", "mean", "client"] = "auto"
    """Whose validation chooses the best round. mean: one best round for all, by the mean over the clients (the paper).
    client: each client's own, so that a false value harms nobody else. auto: mean in one process, client in a
    deployment."""
    generation_score: GenerationScore = "rouge_l"
    """The headline score of clients whose answers are free text; the others are reported beside it."""
    max_new_tokens: int = 128
    """Longest generated answer, in tokens."""
    batch_tokens: int = 8192
    """Tokens evaluated at once; lower it where evaluation runs out of memory."""
    pre_aggregation: bool = False
    """Score each client's model also right after local training: one run gives the rows of X and X_ft."""

    def __post_init__(self) -> None:
        """Refuse limits that leave nothing to evaluate."""
        for key in ("max_new_tokens", "batch_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"evaluation.{key} = {getattr(self, key)}: must be at least 1")


class TokenRow(Protocol):
    """What evaluation reads of a tokenised example."""

    @property
    def prompt(self) -> Ids:
        """Ids of the prompt."""

    @property
    def answer(self) -> Ids:
        """Ids of the answer."""

    @property
    def options(self) -> Sequence[Ids]:
        """Ids of each answer option; empty for free text."""


class Example(Protocol):
    """What evaluation reads of an example's text."""

    @property
    def answer(self) -> str:
        """The right answer."""

    @property
    def options(self) -> tuple[str, ...]:
        """The answers to choose from; empty for free text."""

    @property
    def rejected(self) -> str | None:
        """The answer that is not preferred, of a preference pair."""


def score_name(example: Example, settings: EvaluationSettings) -> str:
    """Name of the headline score for examples of this kind."""
    if example.rejected is not None:
        return "preference"
    return "accuracy" if example.options else settings.generation_score


def losses_of(bank: Bank, clients: Sequence[Sequence[TokenRow]], settings: EvaluationSettings) -> list[float]:
    """Mean loss per answer token of each client's rows under its loaded adapter."""
    rows = [[(row.prompt, row.answer) for row in part] for part in clients]
    return mean_losses(bank, rows, settings.batch_tokens)


def scores_of(
    bank: Bank,
    clients: Sequence[Sequence[TokenRow]],
    examples: Sequence[Sequence[Example]],
    settings: EvaluationSettings,
) -> list[dict[str, float]]:
    """Scores in 0 .. 100 of each client's model, the headline also under `score`; rows and examples go in pairs."""
    choosing = [bool(part[0].options) for part in examples]
    by_option = option_losses(
        bank,
        [
            [(row.prompt, row.options) for row in part] if chooses else []
            for part, chooses in zip(clients, choosing, strict=True)
        ],
        settings.batch_tokens,
    )
    texts = generate_answers(
        bank,
        [[] if chooses else [row.prompt for row in part] for part, chooses in zip(clients, choosing, strict=True)],
        settings.max_new_tokens,
        settings.batch_tokens,
    )
    results = []
    for part, chooses, losses, answers in zip(examples, choosing, by_option, texts, strict=True):
        references = [example.answer for example in part]
        if chooses:
            chosen = [example.options[values.index(min(values))] for example, values in zip(part, losses, strict=True)]
            scores = {"accuracy": accuracy(chosen, references)}
        else:
            scores = generation_scores(answers, references)
        results.append({**scores, "score": scores[score_name(part[0], settings)]})
    return results


def majority_scores(
    train: Sequence[Example], test: Sequence[Example], settings: EvaluationSettings
) -> dict[str, float]:
    """Scores of always giving the most frequent training answer (the first in alphabetical order among equals).

    Of preference pairs a constant answer prefers neither answer, which scores 50.
    """
    if test[0].rejected is not None:
        return {"preference": 50.0, "score": 50.0}
    counts = Counter(example.answer for example in train)
    constant = min(counts, key=lambda answer: (-counts[answer], answer))
    references, answers = [example.answer for example in test], [constant] * len(test)
    classes = bool(test[0].options)
    scores = {"accuracy": accuracy(answers, references)} if classes else generation_scores(answers, references)
    return {**scores, "score": scores[score_name(test[0], settings)]}
