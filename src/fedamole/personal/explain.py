"""Explain a mixture of experts: which experts the tokens of a text use, and what each expert is for.

This reads only the model and the client's own data, and sends nothing anywhere. `explanation_table` formats the result
for the terminal, explain_page.py as HTML, and `as_json` as JSON.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress
from torch import Tensor

from fedamole.model.bank import Bank
from fedamole.model.batch import Ids, TokenPair
from fedamole.model.params import Adapter
from fedamole.personal.routing import (
    ALL,
    RoutingStats,
    Split,
    TopToken,
    Weights,
    check_length,
    client_rows,
    expert_holders,
    expert_roles,
    experts_of,
    find_module,
    has_experts,
    mean_weights_table,
    most_informative_module,
    roles_of_run,
    routing_stats,
    token_texts,
    token_weights,
    top_tokens,
)
from fedamole.personal.saved_models import SavedModel

CONTEXT_TOKENS = 7
"""Tokens shown before and after a token that serves as an example of an expert."""


@dataclass(frozen=True)
class Token:
    """A token of a text."""

    text: str
    of_answer: bool


@dataclass(frozen=True)
class ExampleInContext:
    """A token with a large weight for an expert, and the text around it."""

    before: str
    text: str
    after: str
    weight: float


@dataclass(frozen=True)
class Expert:
    """One expert of a module."""

    id: int
    mean_weight: float
    """Mean weight over the tokens."""
    top_fraction: float
    """Fraction of the tokens for which it has the largest weight."""
    role: str
    """Its role if the method gives experts fixed ones (see `expert_roles`), else empty."""
    clients: tuple[str, ...]
    """Clients that hold it or, if each has an expert of its own, that own it. Empty if unknown."""
    examples: tuple[ExampleInContext, ...] = ()

    @property
    def description(self) -> str:
        """Role and clients as text."""
        return ": ".join(part for part in (self.role, ", ".join(self.clients)) if part) or "not known here"


@dataclass(frozen=True)
class Module:
    """A module and how tokens are routed in it."""

    name: str
    stats: RoutingStats
    experts: tuple[Expert, ...]
    weights: tuple[tuple[float, ...], ...] = ()
    """For each token of a text, the weights of the experts in their order."""


@dataclass(frozen=True)
class Explanation:
    """Routing in one client's model."""

    client: str
    about: str
    """What was read: a text, or a split of the client's data."""
    modules: tuple[Module, ...]
    """The selected modules."""
    num_modules: int
    """Number of modules with experts in the model."""
    shared: bool
    """Whether the modules also have a shared expert, which every token uses with weight 1."""
    tokens: tuple[Token, ...] = ()


class RoutingExplainer:
    """Explains the routing of one client's mixture of experts."""

    def __init__(self, bank: Bank, adapter: Adapter, model: SavedModel) -> None:
        """Load the adapter into the bank. Raises ConfigError for a model without experts."""
        self.bank, self.client, self.expert_ids = bank, model.client, experts_of(adapter, model.client)
        roles = roles_of_run(model)
        self._roles, self._holders = expert_roles(adapter, roles), expert_holders(model, roles)
        self._shared = any("/shared/" in name for name in adapter.tensors)
        bank.load([adapter])

    def explain_text(self, prompt: Ids, answer: Ids, layer: str | None) -> Explanation:
        """Explain the tokens of a prompt and its answer. Raises ConfigError if they are too long for the base."""
        check_length(self.bank, len(prompt) + len(answer))
        ((_, weights),) = token_weights(self.bank, [(prompt, answer)])
        stats = routing_stats([weights])
        modules = tuple(self._module(name, stats[name], weights) for name in self.select_modules(layer, stats))
        texts = token_texts(self.bank, (*prompt, *answer))
        tokens = tuple(Token(text, index >= len(prompt)) for index, text in enumerate(texts))
        return Explanation(self.client, "prompt and answer", modules, len(stats), self._shared, tokens)

    def stats(self, rows: Sequence[TokenPair], batch_tokens: int, progress: Progress) -> dict[str, RoutingStats]:
        """Return routing statistics over the tokens of all rows, by module."""
        weights = token_weights(self.bank, rows, batch_tokens)
        tracked = progress.track(weights, len(rows), description=f"reading {self.client}")
        return routing_stats(by_module for _, by_module in tracked)

    def explain_experts(
        self, rows: Sequence[TokenPair], about: str, layer: str | None, top: int, batch_tokens: int, progress: Progress
    ) -> Explanation:
        """Describe each expert by the `top` tokens of the rows for which its weight is largest."""
        stats = self.stats(rows, batch_tokens, progress)
        names = self.select_modules(layer, stats)
        weights: dict[str, dict[int, Tensor]] = {name: {} for name in names}
        reading = token_weights(self.bank, rows, batch_tokens)
        for index, by_module in progress.track(reading, len(rows), description="finding tokens"):
            for name in names:
                weights[name][index] = by_module[name]
        texts: dict[int, list[str]] = {}

        def example(token: TopToken) -> ExampleInContext:
            if token.row not in texts:
                texts[token.row] = token_texts(self.bank, (*rows[token.row][0], *rows[token.row][1]))
            text, i = texts[token.row], token.index
            before, after = text[max(0, i - CONTEXT_TOKENS) : i], text[i + 1 : i + 1 + CONTEXT_TOKENS]
            return ExampleInContext("".join(before), text[i], "".join(after), token.weight)

        modules = []
        for name in names:
            examples = [tuple(map(example, tokens)) for tokens in top_tokens(weights.pop(name), rows, top)]
            modules.append(self._module(name, stats[name], {}, examples))
        return Explanation(self.client, about, tuple(modules), len(stats), self._shared)

    def mean_weights(
        self, rows: Sequence[TokenPair], batch_tokens: int, progress: Progress
    ) -> dict[str, dict[str, float]]:
        """Return the mean weights by module and expert id, as in routing.json."""
        return mean_weights_table(self.expert_ids, self.stats(rows, batch_tokens, progress))

    def select_modules(self, layer: str | None, stats: Mapping[str, RoutingStats]) -> list[str]:
        """Return the modules that `layer` names, or the one with the largest mutual information if it is None."""
        if layer == ALL:
            return sorted(stats)
        return [most_informative_module(stats) if layer is None else find_module(layer, stats)]

    def _module(
        self,
        name: str,
        stats: RoutingStats,
        weights: Weights,
        examples: Sequence[tuple[ExampleInContext, ...]] | None = None,
    ) -> Module:
        holders = self._holders.get(name, {})
        experts = tuple(
            Expert(
                expert,
                stats.mean_weights[index],
                stats.top_fractions[index],
                self._roles.get(expert, ""),
                tuple(holders.get(expert, ())),
                examples[index] if examples else (),
            )
            for index, expert in enumerate(self.expert_ids[name])
        )
        return Module(name, stats, experts, tuple(map(tuple, weights[name].tolist())) if name in weights else ())


def mean_weights_of_clients(
    models: Sequence[SavedModel],
    bank: Bank,
    adapters: Sequence[Adapter],
    split: Split,
    batch_tokens: int,
    progress: Progress,
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the mean weights over each client's own split, by client, module and expert id.

    Clients whose models have no experts are left out. Raises ConfigError if no model has any.
    """
    pairs = [*zip(models, adapters, strict=True)]
    mixtures = [(model, adapter) for model, adapter in pairs if has_experts(adapter)]
    return {
        model.client: RoutingExplainer(bank, adapter, model).mean_weights(
            client_rows(model, bank, split), batch_tokens, progress
        )
        for model, adapter in mixtures or pairs
    }


def as_json(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation as JSON; the tokens' weights by module and expert id are those above 0."""
    modules = {
        module.name: {
            "tokens": module.stats.tokens,
            "telling": module.stats.mutual_information,
            "experts": [
                {
                    "expert": expert.id,
                    "share": expert.mean_weight,
                    "largest": expert.top_fraction,
                    "role": expert.role,
                    "clients": list(expert.clients),
                    "examples": [vars(example) for example in expert.examples],
                }
                for expert in module.experts
            ],
        }
        for module in explanation.modules
    }
    tokens = [
        {
            "text": token.text,
            "answer": token.of_answer,
            "weights": {
                module.name: {str(expert.id): weight for expert, weight in by_weight(module, index) if weight > 0}
                for module in explanation.modules
            },
        }
        for index, token in enumerate(explanation.tokens)
    ]
    return {"client": explanation.client, "about": explanation.about, "modules": modules, "tokens": tokens}


def by_weight(module: Module, token: int) -> list[tuple[Expert, float]]:
    """Return the experts of a module with their weights for a token, in descending order of weight."""
    pairs = zip(module.experts, module.weights[token], strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])
