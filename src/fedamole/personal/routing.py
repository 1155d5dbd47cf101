"""Which experts the tokens of a text use: the weights that each layer of a mixture assigns in its forward pass.

The weights are read from the layers themselves. A token's weights sum to 1 over the domain experts that the client
holds; in AMoLE at most `top_k` of them are above 0. The shared expert, which has weight 1 for every token, is excluded.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedamole.config import load_run_config
from fedamole.data.text_encoder import text_encoder
from fedamole.data.tokens import tokenise
from fedamole.errors import ConfigError, DataError
from fedamole.evaluation.likelihood import by_length
from fedamole.federation.method import OWN_EXPERT
from fedamole.files import write_atomic
from fedamole.model.adapter_files import read_config
from fedamole.model.bank import Bank
from fedamole.model.batch import Ids, TokenPair, collate
from fedamole.model.forward_context import ForwardContext
from fedamole.model.params import OWN, Adapter, expert_ids
from fedamole.model.prompt import PromptSpec
from fedamole.personal.generate import generate_ids
from fedamole.personal.saved_models import SavedModel, client_shard
from fedamole.runs.adapter_folder import CONFIG
from fedamole.runs.run_folder import ROUTING

ALL = "all"
REPLACEMENT = "\ufffd"
"""What an incomplete UTF-8 sequence decodes to."""
MAX_CHARACTER_TOKENS = 4
"""Maximum number of bytes of a UTF-8 character, and so of tokens."""

Weights = Mapping[str, Tensor]
"""By module, the weights (T, n) of T tokens for the n experts held, ordered by expert id."""
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class RoutingStats:
    """Statistics of the routing of some tokens in one module, per expert in the order of the ids."""

    tokens: int
    mean_weights: tuple[float, ...]
    """Mean weight over the tokens; sums to 1."""
    top_fractions: tuple[float, ...]
    """Fraction of the tokens for which the expert has the largest weight; sums to 1."""
    mutual_information: float
    """Mutual information between token and expert, in nats: the entropy of the mean weights minus the mean entropy of
    the tokens' weights. 0 if all tokens have the same weights."""


@dataclass(frozen=True)
class TopToken:
    """A token for which an expert has a large weight."""

    row: int
    """Index of its row."""
    index: int
    """Index of the token in the row."""
    weight: float


def has_experts(adapter: Adapter) -> bool:
    """Return whether an adapter has experts."""
    return not isinstance(adapter.spec, PromptSpec) and any(expert_ids(adapter.tensors).values())


def experts_of(adapter: Adapter, client: str) -> dict[str, list[int]]:
    """Return the ids of an adapter's experts by module. Raises ConfigError for a model without experts."""
    if not has_experts(adapter):
        kind = "virtual tokens" if isinstance(adapter.spec, PromptSpec) else "a single LoRA"
        raise ConfigError(
            f"{client}'s model is {kind} and has no experts, so there is nothing to route. `fedamole explain` needs a "
            "mixture of experts, such as those of fedamole, fedmoe, fedlease, adaptive_experts, model_glue, fedalt and "
            "feddpa"
        )
    return expert_ids(adapter.tensors)


def roles_of_run(model: SavedModel) -> tuple[str, ...]:
    """Return `Method.expert_roles` of the method of a model's run; empty for an adapter folder without its run."""
    return () if model.run is None else load_run_config(model.run).method.expert_roles


def expert_roles(adapter: Adapter, roles: tuple[str, ...]) -> dict[int, str]:
    """Return the roles of experts by id, if the method gives them fixed ones (`roles_of_run`); else empty."""
    ids = next(iter(expert_ids(adapter.tensors).values()), [])
    if OWN in adapter.fixed:
        return {ids[int(adapter.fixed[OWN].argmax())]: "its own cluster's"}
    return {expert: roles[min(expert, len(roles) - 1)] for expert in ids} if roles else {}


def expert_holders(model: SavedModel, roles: tuple[str, ...]) -> dict[str, dict[int, list[str]]]:
    """Return the clients whose saved models hold an expert, by module and expert id.

    If each client has an expert of its own by the method's `roles` (`roles_of_run`), only its owners count. Only models
    in this run folder are known; the result is empty for an adapter folder without its run.
    """
    holders: dict[str, dict[int, list[str]]] = {}
    if model.run is None:
        return holders
    has_own = OWN_EXPERT in roles
    for path in sorted(model.run.path.glob(f"clients/*/{model.folder.name}/{CONFIG}")):
        config, client = read_config(path.parent), path.parents[1].name
        for module, ids in config.get("expert_pattern", {}).items():
            for expert in _held_experts(config, ids, has_own and client == model.client):
                holders.setdefault(module, {}).setdefault(expert, []).append(client)
    return holders


def _held_experts(config: Mapping[str, Any], ids: list[int], own: bool) -> list[int]:
    """A client's experts without those that all clients have; `own`: whether expert 0 is that of the explained one."""
    if config.get("router", "embedding") == "embedding":
        return ids
    if config.get("own_expert") is not None:
        return [int(config["own_expert"])]
    return [0] if own else []


def find_module(layer: str, modules: Iterable[str]) -> str:
    """Return the module with a name, or the only one whose name ends with it. Raises ConfigError if there is none."""
    names = sorted(modules)
    matches = [name for name in names if name == layer or name.endswith(f".{layer}")]
    if len(matches) == 1:
        return matches[0]
    if layer in matches:
        return layer
    if matches:
        raise ConfigError(
            f"--layer {layer}: {len(matches)} modules have names with this ending, for example "
            f"{', '.join(matches[:3])}: use a longer name, or {ALL!r}"
        )
    raise ConfigError(f"--layer {layer}: no such module; the modules with experts are {names[0]} .. {names[-1]}")


def token_weights(bank: Bank, rows: Sequence[TokenPair], batch_tokens: int = 8192) -> Iterator[tuple[int, Weights]]:
    """Yield the index of each (prompt, answer) row and the weights of its tokens, under the one loaded adapter.

    Rows are yielded by length, after passes of at most `batch_tokens` tokens.
    """
    for group in by_length([len(prompt) + len(answer) for prompt, answer in rows], batch_tokens):
        batch = collate([[rows[index] for index in group]], bank.base.pad_id, bank.packs, device=bank.base.device)
        by_module: dict[str, Tensor] = {}
        with torch.no_grad(), bank.forward(batch, ForwardContext(routing_weights=by_module)):
            pass
        lengths = [sum(map(len, rows[index])) for index in group]
        width = [batch.ids.shape[1]] * len(group) if batch.sequences is None else lengths
        parts = {module: weights.float().cpu().split(width) for module, weights in by_module.items()}
        for i, index in enumerate(group):
            yield index, {module: part[i][: lengths[i]] for module, part in parts.items()}


def routing_stats(texts: Iterable[Weights]) -> dict[str, RoutingStats]:
    """Return routing statistics over all tokens of some texts, by module."""
    sums: dict[str, tuple[int, Tensor, Tensor, Tensor]] = {}
    for text in texts:
        for module, weights in text.items():
            precise = weights.double()
            top = torch.bincount(weights.argmax(1), minlength=weights.shape[1])
            new = len(weights), precise.sum(0), top, torch.special.entr(precise).sum()
            old = sums.get(module)
            sums[module] = new if old is None else (old[0] + new[0], old[1] + new[1], old[2] + new[2], old[3] + new[3])
    stats = {}
    for module, (tokens, weight, top, entropy) in sorted(sums.items()):
        mean = weight / tokens
        information = max(0.0, float(torch.special.entr(mean).sum() - entropy / tokens))
        top_fractions = tuple((top.double() / tokens).tolist())
        stats[module] = RoutingStats(tokens, tuple(mean.tolist()), top_fractions, information)
    return stats


def most_informative_module(stats: Mapping[str, RoutingStats]) -> str:
    """Return the module with the largest mutual information; of equal ones, the last by name."""
    return max(stats, key=lambda module: (round(stats[module].mutual_information, 6), module))


def top_tokens(weights: Mapping[int, Tensor], rows: Sequence[TokenPair], k: int) -> list[list[TopToken]]:
    """Return, for each expert of a module, the `k` different tokens with the largest weights above 0.

    `weights` are (T, n) by row index, as from `token_weights`.
    """
    order = sorted(weights)
    positions = [(row, index) for row in order for index in range(len(weights[row]))]
    all_weights = torch.cat([weights[row] for row in order])
    by_expert: list[list[TopToken]] = []
    for column in all_weights.T:
        top: dict[int, TopToken] = {}
        for position in column.argsort(descending=True, stable=True).tolist():
            if len(top) == k or column[position] <= 0:
                break
            row, index = positions[position]
            top.setdefault([*rows[row][0], *rows[row][1]][index], TopToken(row, index, float(column[position])))
        by_expert.append([*top.values()])
    return by_expert


def check_length(bank: Bank, tokens: int) -> None:
    """Raise ConfigError if a text is empty or longer than the base's positions."""
    if not 0 < tokens <= bank.base.max_positions:
        raise ConfigError(f"prompt and answer have {tokens} tokens; this base reads 1 to {bank.base.max_positions}")


def answer_ids(bank: Bank, text: str) -> Ids:
    """Return the token ids of an answer; names of special tokens in it are read as text."""
    return text_encoder(bank.base.tokenizer).encode([text])[0]


def greedy_answer(bank: Bank, prompt: Ids, max_new_tokens: int) -> Ids:
    """Return the token ids of the loaded model's greedy answer, without the end-of-text token.

    Raises ConfigError if the prompt leaves no position for an answer.
    """
    check_length(bank, len(prompt) + 1)
    return generate_ids(bank, prompt, min(max_new_tokens, bank.base.max_positions - len(prompt)))


def token_texts(bank: Bank, ids: Ids) -> list[str]:
    """Return the text that each token adds. Of several tokens that form one character, only the last has text."""
    texts, context, decoded = list[str](), 0, 0

    def decode(end: int) -> str:
        part = ids[context:end]
        text = bank.base.tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    for end in range(1, len(ids) + 1):
        before, after = decode(decoded), decode(end)
        if after.endswith(REPLACEMENT) and end < len(ids) and end - decoded < MAX_CHARACTER_TOKENS:
            texts.append("")
            continue
        texts.append(after[len(before) :])
        context, decoded = decoded, end
    return texts


def client_rows(model: SavedModel, bank: Bank, split: Split) -> list[TokenPair]:
    """Return the (prompt, answer) rows of one split of the client's data, read again as the run specifies.

    Answers are without the end-of-text token, after which nothing is predicted. Raises DataError if the data are
    missing or changed, and RunError for an adapter folder without its run.
    """
    config, shard = client_shard(model)
    rows = tokenise(getattr(shard, split), bank.base.tokenizer, config.training.max_length).rows
    if not rows:
        raise DataError(f"client {model.client}: no {split} example fits into training.max_length")
    return [(row.prompt, row.answer[:-1]) for row in rows]


def mean_weights_table(
    experts: Mapping[str, Sequence[int]], stats: Mapping[str, RoutingStats]
) -> dict[str, dict[str, float]]:
    """Return mean weights by module and expert id, as in routing.json."""
    return {
        module: {
            str(expert): round(weight, 6)
            for expert, weight in zip(experts[module], module_stats.mean_weights, strict=True)
        }
        for module, module_stats in stats.items()
    }


def write_routing(run: Path, tables: Mapping[str, Mapping[str, Mapping[str, float]]], split: Split) -> None:
    """Write the clients' tables of mean weights into routing.json in a run's folder."""
    write_atomic(run / ROUTING, json.dumps({"split": split, "clients": tables}, indent=1) + "\n")
