"""Splits the clients of an optimiser step into forward and backward passes that the device can hold."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from fedamole.model.bank import Bank
from fedamole.model.memory import fits_in_memory

TOKENS_AT_ONCE = 2048
"""Tokens of a forward pass on a CPU beyond which more clients at once are no faster (docs/performance.md)."""


def in_passes(
    bank: Bank, tokens: Sequence[int], run: Callable[[int, int], None], undo: Callable[[int, int], None]
) -> None:
    """Call `run(first, last)` for consecutive ranges of the clients 0 .. n - 1, `last` excluded.

    `tokens` is the size of each client's batch. Where a range runs out of memory, `undo` is called for it, the size of
    a range is halved for this and all later steps (`bank.at_once`), and the clients are run again. Raises the error
    of a single client that does not fit.
    """
    waiting = list(_ranges(bank, tokens, 0, len(tokens)))
    while waiting:
        first, last = waiting.pop(0)
        if not fits_in_memory(partial(run, first, last), last - first, bank.base.device):
            bank.at_once = (last - first + 1) // 2
            undo(first, last)
            waiting[:0] = _ranges(bank, tokens, first, last)


def _ranges(bank: Bank, tokens: Sequence[int], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Cut the clients `first` .. `last` - 1 into ranges that are worth one pass."""
    limit = TOKENS_AT_ONCE if bank.base.device.type == "cpu" else None
    begin, size = first, 0
    for client in range(first, last):
        full = limit is not None and size + tokens[client] > limit
        if client > begin and (full or client - begin >= bank.at_once):
            yield begin, client
            begin, size = client, 0
        size += tokens[client]
    yield begin, last
