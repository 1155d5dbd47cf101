"""Text of an answer that is generated token by token: which part is final, and where a stop string ends it.

The total work is linear in the length of the answer, for any stop strings: a token is decoded together with the few
tokens before it, and each character is compared once per stop string.
"""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What an incomplete UTF-8 sequence decodes to."""
MAX_PENDING_TOKENS = 32
"""Maximum number of tokens that wait for the rest of an incomplete character. Then they count as invalid text."""


class StopMatcher:
    """Searches a text for one stop string, one character at a time (Knuth-Morris-Pratt)."""

    def __init__(self, text: str) -> None:
        """Prepare for a stop string of n >= 1 characters, in O(n)."""
        self.text = text
        self.matched = 0
        """Length of the longest prefix of the stop string that the text so far ends with."""
        self._fallback = [0] * len(text)
        """For each prefix of the stop string, the length of its longest proper prefix that is also its suffix."""
        length = 0
        for index in range(1, len(text)):
            while length and text[index] != text[length]:
                length = self._fallback[length - 1]
            length += text[index] == text[length]
            self._fallback[index] = length

    def feed(self, char: str) -> bool:
        """Read the next character; return whether it completes the stop string. Do not call it after that."""
        while self.matched and char != self.text[self.matched]:
            self.matched = self._fallback[self.matched - 1]
        self.matched += char == self.text[self.matched]
        return self.matched == len(self.text)


class StreamingText:
    """The text of one answer. The chunks from `update` add up to the complete answer, stripped as in evaluation.

    The answer ends where the first completed stop string begins. If one character completes several stop strings, the
    longest counts. The result does not depend on how the text is split into tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = (), strip: bool = True) -> None:
        """Start with no text. `decode` turns token ids into text; stop strings must not be empty.

        Without `strip`, white space at both ends of the answer stays.
        """
        self._strip = strip
        self._decode = decode
        self._matchers = [StopMatcher(text) for text in stop]
        self._context_start = self._decoded_end = 0
        """The next tokens are decoded from the first index on; text of tokens before the second is known."""
        self._possible_stop = ""
        """Text that may be the beginning of a stop string."""
        self._space: list[str] = []
        """Whitespace after the emitted text: emitted before further text, dropped at the end of the answer."""
        self._emitted: list[str] = []

    @property
    def emitted(self) -> str:
        """All chunks so far."""
        return "".join(self._emitted)

    def update(self, tokens: Sequence[int], last: bool) -> tuple[str, bool]:
        """Return the new chunk, given all `tokens` so far, and whether a stop string has ended the answer.

        Text that later tokens may still change is held back: incomplete characters, trailing whitespace, and the
        beginning of a stop string. With `last`, nothing is held back.
        """
        text = self._possible_stop + self._new_text(tokens, last)
        for index in range(len(self._possible_stop), len(text)):
            completed = [len(matcher.text) for matcher in self._matchers if matcher.feed(text[index])]
            if completed:
                return self._emit(text[: index + 1 - max(completed)]), True
        matched = 0 if last else max((matcher.matched for matcher in self._matchers), default=0)
        self._possible_stop = text[len(text) - matched :]
        return self._emit(text[: len(text) - matched]), False

    def _new_text(self, tokens: Sequence[int], last: bool) -> str:
        """The final text that new tokens add.

        The preceding tokens are decoded too and their text is removed, because some tokenizers decode the first token
        of a text differently.
        """
        known = self._decode(tokens[self._context_start : self._decoded_end])
        text = self._decode(tokens[self._context_start :])
        incomplete = text.endswith(REPLACEMENT) or len(text) <= len(known)
        if incomplete and not last and len(tokens) - self._decoded_end < MAX_PENDING_TOKENS:
            return ""
        self._context_start, self._decoded_end = self._decoded_end, len(tokens)
        return text[len(known) :]

    def _emit(self, text: str) -> str:
        """Return a chunk of final text, without whitespace at the start and the end of the answer."""
        if not self._strip:
            self._emitted.append(text)
            return text
        if not self._emitted:
            text = text.lstrip()
        body = text.rstrip()
        if not body:
            self._space.append(text)
            return ""
        chunk, self._space = "".join(self._space) + body, [text[len(body) :]]
        self._emitted.append(chunk)
        return chunk
