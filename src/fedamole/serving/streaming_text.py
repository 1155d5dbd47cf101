"""The text of an answer while it grows: what may be shown of it already, and where a stop string ends it.

All work is linear in the length of the answer, whatever the stop strings are: a token is decoded with the few tokens
before it, and every character is looked at once per stop string.
"""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""What a character decodes to of which some bytes are still to come."""
UNDECIDED = 32
"""Most tokens that wait together for the missing bytes of a character; after that they count as broken text."""


class Stop:
    """One stop string, looked for in a text that comes character by character (Knuth, Morris and Pratt)."""

    def __init__(self, text: str) -> None:
        """Prepare for a text of n >= 1 characters, in O(n)."""
        self.text = text
        self.begun = 0
        """How many characters at the end of the text so far are the beginning of the stop string."""
        self._shorter = [0] * len(text)
        """For each prefix of the stop string, the length of its longest proper prefix that is also its suffix."""
        length = 0
        for place in range(1, len(text)):
            while length and text[place] != text[length]:
                length = self._shorter[length - 1]
            length += text[place] == text[length]
            self._shorter[place] = length

    def read(self, letter: str) -> bool:
        """Take the next character; whether the stop string ends with it. Not to be called after that."""
        while self.begun and letter != self.text[self.begun]:
            self.begun = self._shorter[self.begun - 1]
        self.begun += letter == self.text[self.begun]
        return self.begun == len(self.text)


class Growing:
    """One answer. The pieces that `grow` returns, put together, are the whole answer, stripped as in evaluation.

    The answer ends where the first stop string that is completed begins; of several that are completed by the same
    character, the longest counts. This does not depend on how the text is divided into tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        """Begin with no text. `decode` makes text of token ids; no stop string is empty."""
        self._decode = decode
        self._stops = [Stop(text) for text in stop]
        self._first = self._next = 0
        """Tokens that the next one is decoded with, and tokens whose text is known."""
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self._space: list[str] = []
        """Space after what was shown: shown before the next text, and left out at the end."""
        self._shown: list[str] = []

    @property
    def shown(self) -> str:
        """The pieces so far."""
        return "".join(self._shown)

    def grow(self, tokens: Sequence[int], last: bool) -> tuple[str, bool]:
        """Return what is new of the text of all `tokens` so far, and whether a stop string has ended it.

        What a later token may still change is held back: half a character, space at the end, the beginning of a stop
        string. With `last` nothing is.
        """
        text = self._held + self._decoded(tokens, last)
        for place in range(len(self._held), len(text)):
            ended = [len(stop.text) for stop in self._stops if stop.read(text[place])]
            if ended:
                return self._show(text[: place + 1 - max(ended)]), True
        begun = 0 if last else max((stop.begun for stop in self._stops), default=0)
        self._held = text[len(text) - begun :]
        return self._show(text[: len(text) - begun]), False

    def _decoded(self, tokens: Sequence[int], last: bool) -> str:
        """The text that new tokens add, once it is certain.

        The tokens before them are decoded as well and their text taken away, because a tokenizer may treat the first
        token of a text in another way.
        """
        known = self._decode(tokens[self._first : self._next])
        text = self._decode(tokens[self._first :])
        waits = text.endswith(UNFINISHED) or len(text) <= len(known)
        if waits and not last and len(tokens) - self._next < UNDECIDED:
            return ""
        self._first, self._next = self._next, len(tokens)
        return text[len(known) :]

    def _show(self, text: str) -> str:
        """Make a piece of certain text, without the space around the answer."""
        if not self._shown:
            text = text.lstrip()
        body = text.rstrip()
        if not body:
            self._space.append(text)
            return ""
        piece, self._space = "".join(self._space) + body, [text[len(body) :]]
        self._shown.append(piece)
        return piece
