"""Text as token ids, where special tokens come from a template's own text and never from data.

`split_special_tokens=True` of transformers is not enough. It stops the search for special tokens in a text, but
Unigram, WordLevel and WordPiece models still find them in their vocabulary. It is also a state of the tokenizer,
which threads share. So text is read by a copy of the tokenizer in which every special token has a secret name.
"""

import json
import re
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fedamole.data.examples import Span
from fedamole.errors import BaseModelError, DataError

if TYPE_CHECKING:  # takes seconds to import, and the tokenizer comes from the caller
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


class TextEncoder:
    """Token ids of texts by a fast tokenizer. Ids are the tokenizer's own; threads may share an encoder.

    Special tokens are the tokenizer's added tokens that are marked as special, and those with a role (BOS, EOS,
    padding, ...). A special token that is nothing but white space is treated as text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Copy the tokenizer; BaseModelError for one that is not fast or whose special tokens cannot be renamed."""
        if not tokenizer.is_fast:
            raise BaseModelError(
                f"tokenizer {tokenizer.name_or_path!r} gives no character offsets; use its fast version"
            )
        backend = tokenizer.backend_tokenizer
        description: dict[str, Any] = json.loads(backend.to_str())
        roles = set(tokenizer.all_special_tokens)
        names = sorted(
            token["content"]
            for token in description["added_tokens"]
            if (token["special"] or token["content"] in roles) and token["content"].strip()
        )
        # Nobody who writes data can know the secret, so no data can hold a secret name.
        secret = secrets.token_hex(16)
        self._secret_names = {name: f"{secret}{index:08x}" for index, name in enumerate(names)}
        _rename(description, self._secret_names)
        self._tokenizer = type(backend).from_str(json.dumps(description, ensure_ascii=False))
        # Of two names that begin alike the longer one counts, as in the tokenizer itself.
        longest_first = sorted(map(re.escape, names), key=len, reverse=True)
        self._names = re.compile("|".join(longest_first) or r"(?!)")
        for name, secret_name in self._secret_names.items():
            if self.encode([secret_name])[0] != (backend.token_to_id(name),):
                raise BaseModelError(
                    f"tokenizer {tokenizer.name_or_path!r}: its special token {name!r} cannot be kept apart from "
                    f"text, because its normalizer changes the names of special tokens; use another base"
                )
        self.leading_specials = self._leading_specials(tokenizer)
        """The special tokens that the tokenizer itself sets before a text: its BOS, or nothing."""

    def marked(self, text: str, literals: Sequence[Span] = ()) -> str:
        """Return the text with the special tokens inside `literals` written so that `encode` reads them as tokens.

        `literals` are (start, end) character positions in ascending order.
        """
        parts, read = list[str](), 0
        for start, end in literals:
            own = self._names.sub(lambda found: self._secret_names[found[0]], text[start:end])
            parts += [text[read:start], own]
            read = end
        return "".join(parts) + text[read:]

    def holds_special_text(self, marked: str) -> bool:
        """Whether a text that went through `marked` still holds the name of a special token, which is then text."""
        return self._names.search(marked) is not None

    def encode(self, marked: Sequence[str]) -> list[Ids]:
        """Token ids of texts that went through `marked`, nothing added before or after them.

        Raises DataError for a text that is no valid Unicode.
        """
        try:
            return [tuple(found.ids) for found in self._tokenizer.encode_batch_fast(marked, add_special_tokens=False)]
        except TypeError as error:
            for number, text in enumerate(marked, start=1):
                _check_unicode(text, number, len(marked))
            raise BaseModelError(f"the tokenizer cannot read these texts: {error}") from error

    def token_ends(self, text: str) -> list[int]:
        """The character position after each token of a text without special tokens."""
        return [end for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]

    def _leading_specials(self, tokenizer: "PreTrainedTokenizerBase") -> Ids:
        probe = "a"
        (body,) = self.encode([probe])
        whole = tuple(tokenizer(probe)["input_ids"])
        for start in range(len(whole) - len(body) + 1):
            if whole[start : start + len(body)] == body:
                return whole[:start]
        return ()


@lru_cache(maxsize=4)
def text_encoder(tokenizer: "PreTrainedTokenizerBase") -> TextEncoder:
    """The encoder of a tokenizer, made once: for a vocabulary of 256,000 that takes 2 seconds."""
    return TextEncoder(tokenizer)


def _rename(description: dict[str, Any], names: dict[str, str]) -> None:
    """Give tokens other names in a tokenizer's JSON description; ids stay, and no merge makes such a token."""
    for token in description["added_tokens"]:
        if token["content"] in names:
            # The template's author decides where a token stands, so it needs no space around it.
            token.update(content=names[token["content"]], single_word=False)
    model = description["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    # Lengths are the caller's concern.
    description["truncation"] = description["padding"] = None


def _check_unicode(text: str, number: int, count: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text {number} of {count} holds half a character (U+{ord(text[error.start]):04X}) at position "
            f"{error.start + 1}; correct it"
        ) from error
