"""Which experts the tokens of a text use: the weights that every layer of a mixture gives them in its forward pass.

The layers record the weights (`ForwardContext.routing_weights`). A token's weights sum to 1 over the client's domain
experts, at most `top_k` of them above 0 in AMoLE; its shared expert, weight 1 for every token, is not among them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedamole.data.text_encoder import text_encoder
from fedamole.data.tokens import tokenise
from fedamole.errors import ConfigError, DataError
from fedamole.evaluation.likelihood import by_length
from fedamole.files import write_atomic
from fedamole.model.adapter_files import read_config
from fedamole.model.amole import EmbeddingRouter
from fedamole.model.bank import Bank
from fedamole.model.batch import Ids, TokenPair, collate
from fedamole.model.forward_context import ForwardContext
from fedamole.model.mixer import InstanceWeights
from fedamole.model.params import OWN, Adapter, expert_ids
from fedamole.model.prompt import PromptSpec
from fedamole.personal.saved_models import Place, own_shard
from fedamole.runs.adapter_folder import CONFIG
from fedamole.runs.run_folder import ROUTING

ALL = "all"
UNFINISHED = "\ufffd"
"""What a character decodes to of which some bytes are still to come."""
LONGEST_CHARACTER = 4
"""Bytes, and so tokens, that one character may have."""

Weights = Mapping[str, Tensor]
"""(T, n) by module: the weights of T tokens for the n experts held, in the order of their ids."""
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Use:
    """How some tokens went through one module; per expert in the order of their ids."""

    tokens: int
    share: tuple[float, ...]
    """Mean weight; sums to 1."""
    first: tuple[float, ...]
    """Share of the tokens that give it their largest weight; sums to 1."""
    telling: float
    """Nats that a token tells of its expert: entropy of the mean weights less the mean entropy of a token's. 0 where
    all tokens are weighted alike."""


@dataclass(frozen=True)
class Peak:
    """A token that gives an expert a large weight: its row, its place in it, and the weight."""

    row: int
    place: int
    weight: float


def has_experts(adapter: Adapter) -> bool:
    """Whether there is anything to route."""
    return not isinstance(adapter.spec, PromptSpec) and any(expert_ids(adapter.tensors).values())


def experts_of(adapter: Adapter, client: str) -> dict[str, list[int]]:
    """Ids of the experts held, by module; ConfigError for a model that has nothing to route."""
    if not has_experts(adapter):
        kind = "virtual tokens" if isinstance(adapter.spec, PromptSpec) else "one plain LoRA"
        raise ConfigError(
            f"{client}'s model is {kind}, without experts: there is nothing to route. `fedamole explain` is for "
            "mixtures of experts, such as those of fedamole, fedlease, fedalt and feddpa"
        )
    return expert_ids(adapter.tensors)


def roles(adapter: Adapter) -> dict[int, str]:
    """What the experts stand for where a client has one of its own; nothing where all are of one pool."""
    spec = adapter.spec
    if isinstance(spec, PromptSpec) or isinstance(spec.router, EmbeddingRouter):
        return {}
    if OWN in adapter.fixed:
        ids = next(iter(expert_ids(adapter.tensors).values()))
        return {ids[int(adapter.fixed[OWN].argmax())]: "its own cluster's"}
    return {0: "its own", 1: "everybody's" if isinstance(spec.router, InstanceWeights) else "the rest of the world's"}


def holders(place: Place) -> dict[str, dict[int, list[str]]]:
    """Clients whose saved models hold an expert, by module and id, as far as those models lie here.

    Where each client has one expert of its own: whose own it is. Of an adapter folder without its run nothing is known.
    """
    found: dict[str, dict[int, list[str]]] = {}
    if place.run is None:
        return found
    for path in sorted(place.run.path.glob(f"clients/*/{place.adapter.name}/{CONFIG}")):
        config, client = read_config(path.parent), path.parents[1].name
        for module, ids in config.get("expert_pattern", {}).items():
            for expert in _own(config, ids, client == place.client):
                found.setdefault(module, {}).setdefault(expert, []).append(client)
    return found


def _own(config: Mapping[str, Any], ids: list[int], himself: bool) -> list[int]:
    """Those of a client's experts that are not everybody's."""
    if config.get("router", "embedding") == "embedding":
        return ids
    if config.get("own_expert") is not None:
        return [int(config["own_expert"])]
    return [0] if himself else []


def module_named(layer: str, modules: Iterable[str]) -> str:
    """The module with this name, or the only one with this ending; ConfigError for none or several."""
    known = sorted(modules)
    found = [name for name in known if name == layer or name.endswith(f".{layer}")]
    if len(found) == 1:
        return found[0]
    if layer in found:
        return layer
    if found:
        raise ConfigError(
            f"--layer {layer}: {len(found)} modules end so, {', '.join(found[:3])} among them: name one, or {ALL!r}"
        )
    raise ConfigError(f"--layer {layer}: the model routes in no such module; it does in {known[0]} .. {known[-1]}")


def token_weights(bank: Bank, rows: Sequence[TokenPair], batch_tokens: int = 8192) -> Iterator[tuple[int, Weights]]:
    """The weights of all tokens of (prompt, answer) rows under the one adapter loaded: a row's index, its weights.

    Rows come in the order of their lengths, several in one pass of at most `batch_tokens` tokens.
    """
    for group in by_length([len(prompt) + len(answer) for prompt, answer in rows], batch_tokens):
        batch = collate([[rows[place] for place in group]], bank.base.pad_id, bank.packs).to(bank.base.device)
        found: dict[str, Tensor] = {}
        with torch.no_grad(), bank.forward(batch, routing_weights=found):
            pass
        lengths = [sum(map(len, rows[place])) for place in group]
        width = [batch.ids.shape[1]] * len(group) if batch.sequences is None else lengths
        parts = {module: weights.float().cpu().split(width) for module, weights in found.items()}
        for at, place in enumerate(group):
            yield place, {module: part[at][: lengths[at]] for module, part in parts.items()}


def uses(parts: Iterable[Weights]) -> dict[str, Use]:
    """Sum up how the tokens of some texts were routed, by module."""
    sums: dict[str, tuple[int, Tensor, Tensor, Tensor]] = {}
    for part in parts:
        for module, weights in part.items():
            precise = weights.double()
            best = torch.bincount(weights.argmax(1), minlength=weights.shape[1])
            new = len(weights), precise.sum(0), best, torch.special.entr(precise).sum()
            old = sums.get(module)
            sums[module] = new if old is None else (old[0] + new[0], old[1] + new[1], old[2] + new[2], old[3] + new[3])
    found = {}
    for module, (tokens, weight, best, entropy) in sorted(sums.items()):
        mean = weight / tokens
        telling = float(torch.special.entr(mean).sum() - entropy / tokens)
        found[module] = Use(tokens, tuple(mean.tolist()), tuple((best.double() / tokens).tolist()), max(0.0, telling))
    return found


def most_telling(found: Mapping[str, Use]) -> str:
    """The module whose routing tells tokens apart best, the last of equals."""
    return max(found, key=lambda module: (round(found[module].telling, 6), module))


def peaks(weights: Mapping[int, Tensor], rows: Sequence[TokenPair], top: int) -> list[list[Peak]]:
    """For each expert of a module the `top` tokens, each another one, that give it the largest weights above 0.

    `weights` (T, n) by row, as `token_weights` has them.
    """
    order = sorted(weights)
    places = [(row, place) for row in order for place in range(len(weights[row]))]
    whole = torch.cat([weights[row] for row in order])
    found: list[list[Peak]] = []
    for column in whole.T:
        best: dict[int, Peak] = {}
        for at in column.argsort(descending=True, stable=True).tolist():
            if len(best) == top or column[at] <= 0:
                break
            row, place = places[at]
            best.setdefault([*rows[row][0], *rows[row][1]][place], Peak(row, place, float(column[at])))
        found.append([*best.values()])
    return found


def check_room(bank: Bank, tokens: int) -> None:
    """Raise ConfigError for a text that the base has no positions for, or that is none."""
    if not 0 < tokens <= bank.base.max_positions:
        raise ConfigError(f"prompt and answer have {tokens} tokens, this base reads 1 to {bank.base.max_positions}")


def plain_ids(bank: Bank, text: str) -> Ids:
    """Token ids of a text that stands behind a prompt; names of special tokens in it are text."""
    return text_encoder(bank.base.tokenizer).encode([text])[0]


def greedy_answer(bank: Bank, prompt: Ids, max_new_tokens: int) -> Ids:
    """Token ids of the loaded model's own answer, always the most probable one, without the end-of-text token."""
    from transformers import GenerationConfig

    check_room(bank, len(prompt) + 1)
    base, stop = bank.base, bank.base.tokenizer.eos_token_id
    room = min(max_new_tokens, base.max_positions - len(prompt))
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=room,
        pad_token_id=base.pad_id,
        eos_token_id=stop,
        use_cache=bank.continuation.caches,
    )
    ids = torch.tensor([prompt], device=base.device)
    with torch.no_grad(), bank.enter(ForwardContext(expert_weights=bank.instance_weights([[prompt]]))):
        out = base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
    made = out[0, len(prompt) :].tolist()
    return tuple(made[: made.index(stop)] if stop in made else made)


def pieces(bank: Bank, ids: Ids) -> list[str]:
    """The text that each token adds; empty for all but the last of tokens that are one character together."""
    found, context, read = list[str](), 0, 0

    def decode(last: int) -> str:
        part = ids[context:last]
        text = bank.base.tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    for end in range(1, len(ids) + 1):
        before, after = decode(read), decode(end)
        if after.endswith(UNFINISHED) and end < len(ids) and end - read < LONGEST_CHARACTER:
            found.append("")
            continue
        found.append(after[len(before) :])
        context, read = read, end
    return found


def own_rows(place: Place, bank: Bank, split: Split) -> list[TokenPair]:
    """(prompt, answer) of one split of the client's own data, read again as the run's config and manifest say.

    Answers are without the end-of-text token, of which nothing is predicted. Raises DataError where the data are gone
    or changed, RunError for an adapter folder without its run.
    """
    config, shard = own_shard(place)
    rows = tokenise(getattr(shard, split), bank.base.tokenizer, config.training.max_length).rows
    if not rows:
        raise DataError(f"client {place.client}: no {split} example fits into training.max_length")
    return [(row.prompt, row.answer[:-1]) for row in rows]


def as_table(held: Mapping[str, Sequence[int]], found: Mapping[str, Use]) -> dict[str, dict[str, float]]:
    """Shares by module and expert id, as routing.json holds them."""
    return {
        module: {str(expert): round(share, 6) for expert, share in zip(held[module], use.share, strict=True)}
        for module, use in found.items()
    }


def write_routing(run: Path, tables: Mapping[str, Mapping[str, Mapping[str, float]]], split: Split) -> None:
    """Write the clients' tables into routing.json of a run's folder."""
    write_atomic(run / ROUTING, json.dumps({"split": split, "clients": tables}, indent=1) + "\n")
