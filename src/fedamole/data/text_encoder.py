"""Encode text as token ids. Special tokens are recognised in template text only, never in data.

`split_special_tokens=True` of transformers is not sufficient. It disables the search for special tokens in a text, but
Unigram, WordLevel and WordPiece models still find them in their vocabulary. It is also state of the tokenizer, which
threads share. Therefore a copy of the tokenizer encodes the text, in which every special token has a secret name.
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
    """Encode texts with a copy of a fast tokenizer. The ids are the tokenizer's own; the encoder is thread-safe.

    Special tokens are the tokenizer's added tokens that are marked as special, and those with a role (BOS, EOS,
    padding, ...). Special tokens that consist of white space are treated as text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Copy the tokenizer; BaseModelError if it is not fast or its special tokens cannot be renamed."""
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
        # The secret is random, so that data cannot contain a secret name.
        secret, other = secrets.token_hex(16), secrets.token_hex(16)
        self._secret_names = {name: f"{secret}{index:08x}" for index, name in enumerate(names)}
        self._hidden_names = {name: f"{other}{index:08x}" for index, name in enumerate(names)}
        _rename(description, self._secret_names)
        self._tokenizer = type(backend).from_str(json.dumps(description, ensure_ascii=False))
        # Match the longest name first, as the tokenizer does.
        longest_first = sorted(map(re.escape, names), key=len, reverse=True)
        self._names = re.compile("|".join(longest_first) or r"(?!)")
        self._shown_names = {hidden: name for name, hidden in self._hidden_names.items()}
        self._hidden = re.compile(f"{other}[0-9a-f]{{8}}")
        for name, secret_name in self._secret_names.items():
            if self.encode([secret_name])[0] != (backend.token_to_id(name),):
                raise BaseModelError(
                    f"tokenizer {tokenizer.name_or_path!r}: its special token {name!r} cannot be distinguished "
                    f"from text, because its normalizer changes the names of special tokens; use another base"
                )
        self.leading_specials = self._leading_specials(tokenizer)
        """Special tokens that the tokenizer prepends to a text: its BOS token, or none."""

    def marked(self, text: str, literals: Sequence[Span] = ()) -> str:
        """Replace special tokens within the spans `literals` by their secret names, which `encode` reads as tokens.

        `literals` are (start, end) character positions in ascending order.
        """
        parts: list[str] = []
        position = 0
        for start, end in literals:
            literal = self._names.sub(lambda match: self._secret_names[match[0]], text[start:end])
            parts += [text[position:start], literal]
            position = end
        return "".join(parts) + text[position:]

    def hidden(self, marked: str) -> str:
        """Replace the names of special tokens that are text in a marked text; `revealed` restores them."""
        return self._names.sub(lambda match: self._hidden_names[match[0]], marked)

    def revealed(self, text: str) -> str:
        """Mark all special tokens in a text as tokens, then restore the names that `hidden` replaced as text."""
        marked = self._names.sub(lambda match: self._secret_names[match[0]], text)
        return self._hidden.sub(lambda match: self._shown_names[match[0]], marked)

    def until_special(self, text: str) -> str:
        """Return a text up to and including its first special token; empty if it contains none."""
        found = self._names.search(text)
        return text[: found.end()] if found else ""

    def unmarked(self, marked: str) -> str:
        """Return the readable form of a marked text, with the names of all special tokens."""
        for name, secret_name in self._secret_names.items():
            marked = marked.replace(secret_name, name)
        return marked

    def holds_special_text(self, marked: str) -> bool:
        """Whether a text returned by `marked` still contains the name of a special token, which is then text."""
        return self._names.search(marked) is not None

    def encode(self, marked: Sequence[str]) -> list[Ids]:
        """Return the token ids of texts returned by `marked`, without additional special tokens.

        Raises DataError if a text is not valid Unicode.
        """
        try:
            encodings = self._tokenizer.encode_batch_fast(marked, add_special_tokens=False)
            return [tuple(encoding.ids) for encoding in encodings]
        except TypeError as error:
            for number, text in enumerate(marked, start=1):
                _check_unicode(text, number, len(marked))
            raise BaseModelError(f"the tokenizer cannot read these texts: {error}") from error

    def token_ends(self, text: str) -> list[int]:
        """Return the end position, in characters, of each token of a text without special tokens."""
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
    """Return the cached encoder of a tokenizer. Creating one takes 2 seconds for a vocabulary of 256,000."""
    return TextEncoder(tokenizer)


def _rename(description: dict[str, Any], names: dict[str, str]) -> None:
    """Rename tokens in a tokenizer's JSON description, in place; remove merges that produce them. Ids stay."""
    for token in description["added_tokens"]:
        if token["content"] in names:
            # A template may contain the token anywhere, also without spaces around it.
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
    # The caller truncates and pads.
    description["truncation"] = description["padding"] = None


def _check_unicode(text: str, number: int, count: int) -> None:
    """Raise DataError for a text that is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text {number} of {count} holds half a character (U+{ord(text[error.start]):04X}) at position "
            f"{error.start + 1}; correct it"
        ) from error
