"""The text of an answer while it grows: what may be shown of it already, and where a stop string ends it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

UNFINISHED = "\ufffd"
"""What a character decodes to of which some bytes are still to come."""


@dataclass
class Growing:
    """One answer. The pieces that `grow` returns, put together, are the whole answer, stripped as in evaluation."""

    decode: Callable[[Sequence[int]], str]
    stop: tuple[str, ...] = ()
    shown: str = ""

    def grow(self, tokens: Sequence[int], last: bool) -> tuple[str, bool]:
        """Return what is new of the text of all `tokens` so far, and whether a stop string has ended it.

        What a later token may still change is held back: half a character, space at the end, the beginning of a stop
        string. With `last` nothing is.
        """
        text = self.decode(tokens)
        ends = [place for place in map(text.find, self.stop) if place >= 0]
        if ends:
            text = text[: min(ends)]
        elif not last:
            text = text.rstrip(UNFINISHED)
            text = text[: len(text) - max((_begun(text, stop) for stop in self.stop), default=0)]
        text = text.strip()
        if not text.startswith(self.shown):  # a tokenizer that tidies up what it said before
            return "", bool(ends)
        piece, self.shown = text[len(self.shown) :], text
        return piece, bool(ends)


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    return max((size for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
