"""Rows under way on one bank, of whatever clients: one cache of keys and values, all advanced together.

Rows are padded on the left, so that all end at the same place. Whoever joins is read on its own and then put beside the
others, the shorter padded to the longer; whoever leaves takes its row, and what no row needs any more, with it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedamole.errors import BaseModelError
from fedamole.evaluation.likelihood import by_client
from fedamole.model.bank import Bank
from fedamole.model.batch import Ids, pad_left
from fedamole.model.causality import near
from fedamole.model.forward_context import ForwardContext
from fedamole.model.segments import Segments


class Row(Protocol):
    """What is read of a row that joins."""

    @property
    def client(self) -> int:
        """Place of its client in the bank."""

    @property
    def prompt(self) -> Ids:
        """Its prompt, with the virtual tokens of its client's model before it."""

    @property
    def made(self) -> Sequence[int]:
        """Tokens of its answer so far; where it joins again after it was set aside, they are read as well."""


R = TypeVar("R", bound=Row)


class Running(Generic[R]):
    """Rows under way, in the order of their clients, and what the base remembers of them."""

    def __init__(self, bank: Bank) -> None:
        """Begin with no rows on a bank in which the clients' adapters are loaded."""
        self.bank = bank
        self.rows: list[R] = []
        self._cache = _empty_cache()
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=bank.base.device)
        self._gates: Tensor | None = None

    @property
    def width(self) -> int:
        """Tokens in the longest row."""
        return int(self._mask.shape[1])

    def join(self, rows: Sequence[R]) -> Tensor:
        """Read more rows, each its prompt and what it has of its answer; logits (n, V) of the next token of each.

        The logits are in the order given.

        The rows that are under way stay untouched where this raises.
        """
        order = sorted(range(len(rows)), key=lambda place: rows[place].client)
        joining = [rows[place] for place in order]
        clients, prompts = [row.client for row in joining], [row.prompt for row in joining]
        whole = [(*row.prompt, *row.made) for row in joining]
        ids, mask = pad_left(whole, self.bank.base.pad_id, self.bank.base.device)
        cache = _empty_cache()
        self.bank.select_clients(0, self.bank.clients)
        gates = self.bank.instance_weights(by_client(prompts, _amounts(clients, 0, self.bank.clients)))
        logits = self._forward(clients, ids, mask, cache, gates)
        self._merge(joining, cache, mask, gates)
        return logits[torch.tensor(order, device=logits.device).argsort()]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to every row; logits (B, V) of the next ones."""
        device = self.bank.base.device
        ids = torch.tensor(tokens, device=device).unsqueeze(1)
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        return self._forward([row.client for row in self.rows], ids, self._mask, self._cache, self._gates)

    def keep(self, stays: Sequence[bool]) -> None:
        """Let go of the rows that do not stay."""
        if all(stays):
            return
        chosen = [place for place, stay in enumerate(stays) if stay]
        self.rows = [self.rows[place] for place in chosen]
        if not chosen:
            self._cache, self._mask, self._gates = _empty_cache(), self._mask[:0, :0], None
            return
        index = torch.tensor(chosen, device=self._mask.device)
        self._mask = self._mask.index_select(0, index)
        spare = self.width - int(self._mask.sum(1).max())
        self._mask = self._mask[:, spare:]
        for layer in self._cache.layers:
            layer.keys = layer.keys.index_select(0, index)[:, :, spare:]
            layer.values = layer.values.index_select(0, index)[:, :, spare:]
        self._gates = None if self._gates is None else self._gates.index_select(0, index)

    def _forward(self, clients: list[int], ids: Tensor, mask: Tensor, cache: Any, gates: Tensor | None) -> Tensor:
        """Logits (B, V) after the last of the tokens `ids` (B, n), whose clients are given in ascending order.

        `mask` (B, L) covers what the cache holds and the new tokens. A client that is alone needs no segments.
        """
        alone = clients[0] == clients[-1]
        first, last = (clients[0], clients[0] + 1) if alone else (0, self.bank.clients)
        segments = Segments(_amounts(clients, first, last), self.bank.base.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        self.bank.select_clients(first, last)
        with torch.no_grad(), self.bank.enter(ForwardContext(segments, expert_weights=gates)):
            logits: Tensor = self.bank.base.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        return logits[:, -1]

    def _merge(self, joining: list[R], cache: Any, mask: Tensor, gates: Tensor | None) -> None:
        """Put rows that were read on their own beside the others."""
        rows = [*self.rows, *joining]
        if not self.rows:
            self.rows, self._cache, self._mask, self._gates = rows, cache, mask, gates
            return
        order = sorted(range(len(rows)), key=lambda place: rows[place].client)
        index, width = torch.tensor(order, device=mask.device), max(self.width, mask.shape[1])

        def beside(mine: Tensor, theirs: Tensor) -> Tensor:
            """(B, H, L, D) and (n, H, M, D) -> (B + n, H, longer, D), rows in order."""
            both = [F.pad(part, (0, 0, width - part.shape[2], 0)) for part in (mine, theirs)]
            return torch.cat(both).index_select(0, index)

        for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
            theirs.keys, theirs.values = beside(mine.keys, theirs.keys), beside(mine.values, theirs.values)
        self._cache = cache
        self._mask = torch.cat([F.pad(part, (width - part.shape[1], 0)) for part in (self._mask, mask)])[index]
        if self._gates is not None and gates is not None:
            self._gates = torch.cat([self._gates, gates])[index]
        self.rows = [rows[place] for place in order]


def _empty_cache() -> Any:
    """A cache that keeps all keys and values of every layer; sliding windows are then a matter of the mask alone."""
    from transformers import DynamicCache

    return DynamicCache()


def _amounts(clients: Sequence[int], first: int, last: int) -> tuple[int, ...]:
    """Rows of each of the clients `first` .. `last` - 1."""
    counts = Counter(clients)
    return tuple(counts[client] for client in range(first, last))


@dataclass(frozen=True)
class _Probe:
    client: int
    prompt: Ids
    made: Ids = ()


def check(bank: Bank) -> None:
    """Make sure that rows of this base can join others; BaseModelError where it remembers more than keys and values.

    Two rows that met on the way, each read at once and then token by token, must be answered as forward passes over
    their whole texts, which use no cache.
    """
    texts = [bank.prefix((1, 2, 3, 4)), bank.prefix((5, 6))]
    rows = [_Probe(0, texts[0]), _Probe(bank.clients - 1, texts[1])]
    running, steps = Running[_Probe](bank), ([7], [8, 8], [9, 9])
    try:
        running.join(rows[:1])
        running.step(steps[0])
        running.join(rows[1:])
        running.step(steps[1])
        apart = [running.step(steps[2])]
        running.keep([False, True])
        apart.append(running.step([10]))
        found = torch.cat(apart).float()
        read = [(rows[0], (7, 8, 9)), (rows[1], (8, 9)), (rows[1], (8, 9, 10))]
        whole = torch.cat([_whole(bank, row, made) for row, made in read])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code of any of some two hundred architectures
        raise _unfit(bank) from error
    if not near(found, whole, bank.base.model.dtype):
        raise _unfit(bank)


def _whole(bank: Bank, row: _Probe, made: Ids) -> Tensor:
    """Logits (1, V) after a row's prompt and answer, from one pass over both without a cache."""
    ids = torch.tensor([[*row.prompt, *made]], device=bank.base.device)
    bank.select_clients(0, bank.clients)
    gates = bank.instance_weights(by_client([row.prompt], _amounts([row.client], 0, bank.clients)))
    bank.select_clients(row.client, row.client + 1)
    with torch.no_grad(), bank.enter(ForwardContext(expert_weights=gates)):
        logits: Tensor = bank.base.model(input_ids=ids, use_cache=False).logits
    return logits[:, -1].float()


def _unfit(bank: Bank) -> BaseModelError:
    return BaseModelError(
        f"base {bank.base.name!r} remembers more of a text than keys and values, so requests cannot be batched on it; "
        "load each model by itself, with fedamole.load_personal_model"
    )
