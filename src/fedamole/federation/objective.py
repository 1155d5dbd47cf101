"""What local training minimises: which rows of a client it reads, how it trains on them, and how models are scored."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedamole.data.examples import Shard
from fedamole.errors import ConfigError
from fedamole.evaluation.personal import EvaluationSettings
from fedamole.evaluation.preferences import dpo_losses, margins_of, pair_log_probabilities, preference_scores
from fedamole.federation.client_data import ClientData, Split
from fedamole.federation.evaluator import ScoreModels, Scores, score_models
from fedamole.federation.local import DivergedError, fit
from fedamole.federation.method import Method, TrainingResult
from fedamole.federation.preferences import PreferenceGroup
from fedamole.federation.settings import TrainingSettings
from fedamole.model.bank import Bank
from fedamole.model.params import Adapter, indices_by_kind


@dataclass(frozen=True)
class Objective:
    """An objective of `[training]`."""

    rows: Callable[[Split], Sequence[Any]]
    """Training rows of a split, for `LocalTask`."""
    fit: Callable[..., list[TrainingResult | DivergedError]]
    """`fedamole.federation.local.fit` on these rows."""
    score_models: ScoreModels
    """`fedamole.federation.evaluator.score_models`, with this objective as the loss."""


def objective_of(training: TrainingSettings) -> Objective:
    """Return the objective of a run."""
    if training.objective == "answer":
        return Objective(Split.pairs, fit, score_models)
    return Objective(
        Split.answer_pairs, partial(fit, group_class=PreferenceGroup), partial(score_preferences, beta=training.beta)
    )


def check_supported(training: TrainingSettings, name: str, method: Method[Any, Any, Any, Any]) -> None:
    """Raise ConfigError if a method, called `name` in the config, cannot train by the objective."""
    if training.objective == "preference" and method.only_answers:
        raise ConfigError(
            f'training.objective = "preference": the method {name} cannot train on preference pairs, because '
            f'{method.only_answers}; use another method, or objective = "answer"'
        )


def check_objective(training: TrainingSettings, shards: Iterable[Shard]) -> None:
    """Raise ConfigError unless all clients have preference pairs, or none if the objective is `answer`."""
    preference = training.objective == "preference"
    for shard in shards:
        if preference and shard.task != "preference":
            raise ConfigError(
                f'training.objective = "preference": the rows of client {shard.client!r} have no rejected answers; use '
                'a template with `rejected`, or objective = "answer"'
            )
        if not preference and shard.task == "preference":
            raise ConfigError(
                f'training.objective = "answer": the rows of client {shard.client!r} are preference pairs; set '
                'objective = "preference", or use a template without `rejected`'
            )


def score_preferences(
    bank: Bank,
    evaluation: EvaluationSettings,
    group: Sequence[ClientData],
    adapters: Sequence[Adapter | None],
    split: str,
    with_scores: bool,
    *,
    beta: float,
) -> dict[str, Scores]:
    """Score models as `score_models` does, on preference pairs: `loss` is the mean DPO loss of a pair.

    The scores are those of `preference_scores`; `preference` is also the headline, `score`.
    """
    scores: dict[str, Scores] = {}
    for indices in indices_by_kind(dict(enumerate(adapters))):
        bank.load([adapter for i in indices if (adapter := adapters[i]) is not None])
        pairs = [getattr(group[i], split).answer_pairs() for i in indices]
        own = pair_log_probabilities(bank, pairs, evaluation.batch_tokens)
        untuned = pair_log_probabilities(bank, pairs, evaluation.batch_tokens, reference=True)
        for i, values, reference in zip(indices, own, untuned, strict=True):
            result = {"loss": float(dpo_losses(margins_of(values, reference), beta).mean())}
            if with_scores:
                result |= preference_scores(values, reference)
                result["score"] = result["preference"]
            scores[group[i].info.name] = result
    return scores
