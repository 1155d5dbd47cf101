"""Scores and saves the models of clients: personal models, the untuned base, and a constant answer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedamole.evaluation.likelihood import mean_losses
from fedamole.evaluation.personal import EvaluationSettings, majority_scores, scores_of
from fedamole.federation.client_data import ClientData, Split
from fedamole.federation.client_factory import ClientFactory
from fedamole.federation.client_state import ClientStates
from fedamole.federation.method import Evaluates, Method
from fedamole.federation.probe import ProbeCounts
from fedamole.federation.record import unpack
from fedamole.model.adapter_files import check_fits
from fedamole.model.bank import Bank
from fedamole.model.params import Adapter, indices_by_kind
from fedamole.model.pretrained import load_adapter, save_adapter
from fedamole.runs.run_folder import RunFolder

Scores = dict[str, float]
ScoreModels = Callable[
    [Bank, EvaluationSettings, Sequence[ClientData], Sequence[Adapter | None], str, bool], dict[str, Scores]
]
"""`score_models`, or a function with the same arguments and another loss."""


def score_models(
    bank: Bank,
    evaluation: EvaluationSettings,
    group: Sequence[ClientData],
    adapters: Sequence[Adapter | None],
    split: str,
    with_scores: bool,
) -> dict[str, Scores]:
    """Score one model of each client on a split of its own, None being the untuned base; return scores by client.

    A client's scores are its loss in nats per answer token and, `with_scores`, those of its answers. Models of one kind
    share forward passes.
    """
    scores: dict[str, Scores] = {}
    for indices in indices_by_kind(dict(enumerate(adapters))):
        bank.load([adapter for i in indices if (adapter := adapters[i]) is not None])
        splits: list[Split] = [getattr(group[i], split) for i in indices]
        losses = mean_losses(bank, [part.pairs() for part in splits], evaluation.batch_tokens)
        scores |= {group[i].info.name: {"loss": loss} for i, loss in zip(indices, losses, strict=True)}
        if with_scores:
            others = scores_of(bank, [part.rows for part in splits], [part.examples for part in splits], evaluation)
            for i, other in zip(indices, others, strict=True):
                scores[group[i].info.name] |= other
    return scores


class Evaluator:
    """Scores groups of clients on one resident base; all scores are returned by client name."""

    def __init__(
        self,
        bank: Bank,
        method: Method[Any, Any, Any, Any],
        variants: Mapping[str, Evaluates],
        evaluation: EvaluationSettings,
        folder: RunFolder,
        states: ClientStates,
        factory: ClientFactory,
        score_models: ScoreModels = score_models,
    ) -> None:
        """Score the `variants` of a run, given with the moment of a round in which each of them is scored."""
        self.score_models = score_models
        self.bank, self.method, self.variants, self.evaluation = bank, method, variants, evaluation
        self.folder, self.states, self.factory = folder, states, factory

    def evaluate(
        self, group: Sequence[ClientData], round_: int, variant: str, payloads: Mapping[str, bytes | None]
    ) -> dict[str, Scores]:
        """Score the clients' current models on validation: loss, and scores if they choose the best round.

        `payloads` are the packed messages that the models of a post-aggregation variant are made from. The result has
        `probed` and `forward_tokens` for clients that read examples to assemble their model.
        """
        adapters, probe_counts = [], {data.info.name: ProbeCounts() for data in group}
        for data in group:
            name = data.info.name
            adapters.append(self._current_model(data, round_, variant, payloads[name], probe_counts[name]))
            if self.variants[variant] == "post_aggregation":
                self.states.save_candidate(name, variant, adapters[-1])
        with_scores = self.evaluation.select == "score"
        scores = self.score_models(self.bank, self.evaluation, group, adapters, "validation", with_scores)
        for name, counts in probe_counts.items():
            if counts.examples:
                scores[name] |= {"probed": counts.examples, "forward_tokens": counts.tokens}
        return scores

    def save_best(self, data: ClientData, variant: str) -> None:
        """Save the client's current model as its personal model of the best round so far."""
        adapter, target = self._last_model(data, variant), self.folder.adapter(data.info.name, variant)
        fresh = target.with_name(f".{target.name}.writing")
        self.folder.remove_adapter(fresh)
        if adapter is not None:
            save_adapter(adapter, fresh, self.bank.base.name, self.bank.base.identity)
        self.folder.remove_adapter(target)
        if adapter is not None:
            fresh.rename(target)

    def test_best(self, group: Sequence[ClientData], variant: str) -> dict[str, Scores]:
        """Score the saved personal models on test; a client without one is scored with the untuned base."""
        folders = [self.folder.adapter(data.info.name, variant) for data in group]
        base = self.bank.base
        adapters = [load_adapter(folder, base.identity) if folder.exists() else None for folder in folders]
        for adapter, folder in zip(adapters, folders, strict=True):
            if adapter is not None:
                check_fits(adapter, base, folder)
        return self.score_models(self.bank, self.evaluation, group, adapters, "test", True)

    def test_last(self, group: Sequence[ClientData], variant: str) -> dict[str, Scores]:
        """Score the models after the last round on test."""
        return self.score_models(
            self.bank, self.evaluation, group, [self._last_model(data, variant) for data in group], "test", True
        )

    def score_base(self, group: Sequence[ClientData], split: str) -> dict[str, Scores]:
        """Score the untuned base: the loss on validation, everything on test."""
        with_scores = split == "test" or self.evaluation.select == "score"
        return self.score_models(self.bank, self.evaluation, group, [None] * len(group), split, with_scores)

    def majority(self, data: ClientData) -> Scores:
        """Score the most frequent training answer, given to every test prompt."""
        return majority_scores(data.train.examples, data.test.examples, self.evaluation)

    def _current_model(
        self, data: ClientData, round_: int, variant: str, payload: bytes | None, counts: ProbeCounts
    ) -> Adapter | None:
        client = self.factory.client(data, round_, counts)
        state = self.states.load(client)
        if self.variants[variant] != self.method.evaluates:
            return state.trained
        message = None if payload is None else unpack(self.method.records.message, payload)
        return self.method.personal(client, state.client_state, message, state.trained)

    def _last_model(self, data: ClientData, variant: str) -> Adapter | None:
        if self.variants[variant] == "post_aggregation":
            return self.states.load_candidate(data.info.name, variant)
        return self._current_model(data, 0, variant, None, ProbeCounts())
