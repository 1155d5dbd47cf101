"""Splits the clients of an optimiser step into forward and backward passes that the device can hold."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from fedamole.model.bank import Bank
from fedamole.model.memory import fits_in_memory

TOKENS_AT_ONCE = 2048
"""Tokens of a forward pass on a CPU beyond which more clients at once are no faster (docs/performance.md)."""


def in_passes(
    bank: Bank,
    tokens: Sequence[int],
    run: Callable[[int, int], None],
    undo: Callable[[int, int], None],
    together: int = 1,
) -> None:
    """Call `run(first, last)` for consecutive ranges of the clients 0 .. n - 1, `last` excluded.

    `tokens` is the size of each client's batch. Of `together` clients in a row, all are in one range. Where a range
    runs out of memory, `undo` is called for it, the size of a range is halved for this and all later steps
    (`bank.at_once`, in units of `together` clients), and the clients are run again. Raises the error of a single unit
    that does not fit.
    """
    sizes = [sum(tokens[first : first + together]) for first in range(0, len(tokens), together)]
    waiting = list(_ranges(bank, sizes, 0, len(sizes)))
    while waiting:
        first, last = waiting.pop(0)
        if not fits_in_memory(partial(run, first * together, last * together), last - first, bank.base.device):
            bank.at_once = (last - first + 1) // 2
            undo(first * together, last * together)
            waiting[:0] = _ranges(bank, sizes, first, last)


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
