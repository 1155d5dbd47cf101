"""A batch of sequences of several clients that are decoded together, with one key-value cache.

Rows are padded on the left, so that all end at the same position. Rows that join are read in a pass of their own; then
their cache is padded to the length of the batch's and appended. When rows leave, padding that no row needs is removed.
"""

from collections import Counter
from collections.abc import Callable, Sequence
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


class BatchRow(Protocol):
    """What the batch reads of a sequence."""

    @property
    def client(self) -> int:
        """Index of its client in the bank."""

    @property
    def prompt(self) -> Ids:
        """Its prompt, after the virtual tokens of its client's model."""

    @property
    def generated(self) -> Sequence[int]:
        """Tokens of its answer so far. They are read again when a preempted row joins again."""


R = TypeVar("R", bound=BatchRow)
LOGITS_AT_ONCE = 512
"""Maximum number of tokens of prompts whose logits are in memory at the same time."""


class DecodeBatch(Generic[R]):
    """The rows that are decoded together, sorted by client, and their key-value cache."""

    def __init__(self, bank: Bank) -> None:
        """Start with no rows, on a bank into which the clients' adapters are loaded."""
        self.bank = bank
        self.rows: list[R] = []
        self._cache = _empty_cache()
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=bank.base.device)
        self._gates: Tensor | None = None

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return int(self._mask.shape[1])

    def join(self, rows: Sequence[R], on_logits: Callable[[int, Tensor], object] | None = None) -> Tensor:
        """Add rows: read their prompts and answers so far. Returns logits (n, V) of each row's next token.

        The logits are in the order of `rows`. If this raises, the batch is unchanged. With `on_logits`, the texts are
        read in pieces, and it is called with the logits (n, p, V) after each of the p tokens of a piece; its other
        argument is the position of the first of them, counted from the end of the texts, whose last token is -1.
        """
        order = sorted(range(len(rows)), key=lambda index: rows[index].client)
        joining = [rows[index] for index in order]
        clients, prompts = [row.client for row in joining], [row.prompt for row in joining]
        texts = [(*row.prompt, *row.generated) for row in joining]
        ids, mask = pad_left(texts, self.bank.base.pad_id, self.bank.base.device)
        cache = _empty_cache()
        self.bank.select_clients(0, self.bank.clients)
        gates = self.bank.instance_weights(by_client(prompts, _rows_per_client(clients, 0, self.bank.clients)))
        back, width = torch.tensor(order, device=ids.device).argsort(), ids.shape[1]
        size = width if on_logits is None else max(1, LOGITS_AT_ONCE // len(rows))
        for start in range(0, width, size):
            piece, read = ids[:, start : start + size], mask[:, : start + size]
            logits = self._forward(clients, piece, read, cache, gates, all_logits=on_logits is not None)
            if on_logits is not None:
                on_logits(start - width, logits[back])
        self._merge(joining, cache, mask, gates)
        return logits[back, -1]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each of the B rows; return logits (B, V) of the next tokens."""
        device = self.bank.base.device
        ids = torch.tensor(tokens, device=device).unsqueeze(1)
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        return self._forward([row.client for row in self.rows], ids, self._mask, self._cache, self._gates)[:, -1]

    def keep(self, keep_row: Sequence[bool]) -> None:
        """Remove the rows whose entry in `keep_row` is False."""
        if all(keep_row):
            return
        indices = [index for index, keep in enumerate(keep_row) if keep]
        self.rows = [self.rows[index] for index in indices]
        if not indices:
            self._cache, self._mask, self._gates = _empty_cache(), self._mask[:0, :0], None
            return
        index = torch.tensor(indices, device=self._mask.device)
        self._mask = self._mask.index_select(0, index)
        unused = self.width - int(self._mask.sum(1).max())
        self._mask = self._mask[:, unused:]
        for layer in self._cache.layers:
            layer.keys = layer.keys.index_select(0, index)[:, :, unused:]
            layer.values = layer.values.index_select(0, index)[:, :, unused:]
        self._gates = None if self._gates is None else self._gates.index_select(0, index)

    def _forward(
        self,
        clients: list[int],
        ids: Tensor,
        mask: Tensor,
        cache: Any,
        gates: Tensor | None,
        all_logits: bool = False,
    ) -> Tensor:
        """Return logits (B, 1, V) after the last of the new tokens `ids` (B, n), or (B, n, V) after all of them.

        `clients` must be ascending.

        `mask` (B, L) covers the cached and the new tokens. If all rows belong to one client, only this client's adapter
        is used, without splitting the batch.
        """
        single = clients[0] == clients[-1]
        first, last = (clients[0], clients[0] + 1) if single else (0, self.bank.clients)
        segments = Segments(_rows_per_client(clients, first, last), self.bank.base.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        self.bank.select_clients(first, last)
        with torch.no_grad(), self.bank.enter(ForwardContext(segments, expert_weights=gates)):
            logits: Tensor = self.bank.base.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=0 if all_logits else 1,
            ).logits
        return logits

    def _merge(self, joining: list[R], cache: Any, mask: Tensor, gates: Tensor | None) -> None:
        """Add rows with their cache, mask and expert weights to the batch."""
        rows = [*self.rows, *joining]
        if not self.rows:
            self.rows, self._cache, self._mask, self._gates = rows, cache, mask, gates
            return
        order = sorted(range(len(rows)), key=lambda index: rows[index].client)
        permutation, width = torch.tensor(order, device=mask.device), max(self.width, mask.shape[1])

        def merged(old: Tensor, new: Tensor) -> Tensor:
            """(B, H, L, D) and (n, H, M, D) -> (B + n, H, max(L, M), D), rows in the new order."""
            padded = [F.pad(part, (0, 0, width - part.shape[2], 0)) for part in (old, new)]
            return torch.cat(padded).index_select(0, permutation)

        for old, new in zip(self._cache.layers, cache.layers, strict=True):
            new.keys, new.values = merged(old.keys, new.keys), merged(old.values, new.values)
        self._cache = cache
        self._mask = torch.cat([F.pad(part, (width - part.shape[1], 0)) for part in (self._mask, mask)])[permutation]
        if self._gates is not None and gates is not None:
            self._gates = torch.cat([self._gates, gates])[permutation]
        self.rows = [rows[index] for index in order]


def _empty_cache() -> Any:
    """A cache that keeps the keys and values of all tokens in every layer; only the mask limits sliding windows."""
    from transformers import DynamicCache

    return DynamicCache()


def _rows_per_client(clients: Sequence[int], first: int, last: int) -> tuple[int, ...]:
    """Number of rows of each of the clients `first` .. `last` - 1."""
    counts = Counter(clients)
    return tuple(counts[client] for client in range(first, last))


@dataclass(frozen=True)
class _CheckRow:
    client: int
    prompt: Ids
    generated: Ids = ()


def check_batching(bank: Bank) -> None:
    """Raise BaseModelError if rows cannot join a batch on this base, because it has state beyond keys and values.

    Two rows are read at different times and decoded together. Their logits must equal those of forward passes over the
    whole texts without a cache.
    """
    texts = [bank.prefix((1, 2, 3, 4)), bank.prefix((5, 6))]
    rows = [_CheckRow(0, texts[0]), _CheckRow(bank.clients - 1, texts[1])]
    batch, tokens = DecodeBatch[_CheckRow](bank), ([7], [8, 8], [9, 9])
    try:
        batch.join(rows[:1])
        batch.step(tokens[0])
        batch.join(rows[1:])
        batch.step(tokens[1])
        logits = [batch.step(tokens[2])]
        batch.keep([False, True])
        logits.append(batch.step([10]))
        decoded = torch.cat(logits).float()
        answers = [(rows[0], (7, 8, 9)), (rows[1], (8, 9)), (rows[1], (8, 9, 10))]
        expected = torch.cat([_uncached_logits(bank, row, answer) for row, answer in answers])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any of about two hundred architectures may raise anything
        raise _not_batchable(bank) from error
    if not near(decoded, expected, bank.base.model.dtype):
        raise _not_batchable(bank)


def _uncached_logits(bank: Bank, row: _CheckRow, answer: Ids) -> Tensor:
    """Logits (1, V) after a row's prompt and answer, from one forward pass without a cache."""
    ids = torch.tensor([[*row.prompt, *answer]], device=bank.base.device)
    bank.select_clients(0, bank.clients)
    gates = bank.instance_weights(by_client([row.prompt], _rows_per_client([row.client], 0, bank.clients)))
    bank.select_clients(row.client, row.client + 1)
    with torch.no_grad(), bank.enter(ForwardContext(expert_weights=gates)):
        logits: Tensor = bank.base.model(input_ids=ids, use_cache=False).logits
    return logits[:, -1].float()


def _not_batchable(bank: Bank) -> BaseModelError:
    return BaseModelError(
        f"base {bank.base.name!r} keeps state other than keys and values, so requests cannot be batched on it; "
        "load each model on its own with fedamole.load_personal_model"
    )
