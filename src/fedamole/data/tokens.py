"""Examples as token ids: the prompt and the answer apart, so that only the answer can carry loss.

Prompt and answer are turned into tokens on their own and set one behind the other, nothing between: templates
end their prompts with a newline, so that no token would have spanned the seam. Data of the "plain" template
are taken as they are; where a space belongs between prompt and completion, it must be in the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedamole.data.examples import Example
from fedamole.errors import BaseModelError

if TYPE_CHECKING:  # takes seconds to import, and the tokenizer comes from the caller
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


@dataclass(frozen=True)
class TokenRow:
    """One example as token ids; the prompt with the answer, or any option, is at most `max_length` long."""

    # Begins with the tokenizer's own leading special tokens, if it has any.
    prompt: Ids
    # Ends with the end-of-sequence token; the only part with loss.
    answer: Ids
    # In the order of the example's options, each ending like an answer.
    options: tuple[Ids, ...]


@dataclass(frozen=True)
class Tokenised:
    """The rows of a list of examples, and what the length limit did to them."""

    rows: tuple[TokenRow, ...]
    # Examples whose prompt was shortened.
    cut: int
    # Examples without a row, because their answer leaves no room for a prompt.
    dropped: int
    # For each row the place of its example in the list that was given.
    places: tuple[int, ...]


def tokenise(examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Tokenised:
    """Token ids of examples, none longer than `max_length` tokens with its longest answer.

    A prompt that is too long loses the end of its context; where that is not enough, its own beginning, but
    never the leading special tokens. An example whose answer (or longest option) leaves no room for those and
    for at least one token before the answer is dropped. Raises BaseModelError for a tokenizer without an
    end-of-sequence token, or without the character offsets that cutting needs; a padding token is not needed.
    """
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so no answer could end; "
            f"set its eos_token"
        )
    if not tokenizer.is_fast:
        raise BaseModelError(f"tokenizer {tokenizer.name_or_path!r} gives no character offsets; use its fast version")
    lead = leading_specials(tokenizer)
    known: dict[str, Ids] = {}

    def answer_ids(text: str) -> Ids:
        if text not in known:
            known[text] = (*_plain(tokenizer, text), int(tokenizer.eos_token_id))
        return known[text]

    rows: list[TokenRow] = []
    places: list[int] = []
    cut = 0
    prompts = [example.prompt for example in examples]
    # A tokenizer refuses an empty list.
    bodies = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"] if prompts else []
    for place, (example, body) in enumerate(zip(examples, bodies, strict=True)):
        answer = answer_ids(example.answer)
        options = tuple(answer_ids(option) for option in example.options)
        longest = max(len(ids) for ids in (answer, *options))
        room = max_length - longest - len(lead)
        if room < (0 if lead else 1):
            continue
        if len(body) > room:
            body = _shortened(example, tokenizer, room)
            cut += 1
        rows.append(TokenRow((*lead, *body), answer, options))
        places.append(place)
    return Tokenised(tuple(rows), cut, len(examples) - len(rows), tuple(places))


def leading_specials(tokenizer: "PreTrainedTokenizerBase") -> Ids:
    """The special tokens that the tokenizer itself sets before a text: its BOS, or nothing."""
    probe = "a"
    body = _plain(tokenizer, probe)
    whole = tuple(tokenizer(probe)["input_ids"])
    for start in range(len(whole) - len(body) + 1):
        if whole[start : start + len(body)] == body:
            return whole[:start]
    return ()


def _plain(tokenizer: "PreTrainedTokenizerBase", text: str) -> Ids:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _shortened(example: Example, tokenizer: "PreTrainedTokenizerBase", room: int) -> Ids:
    """The prompt, without special tokens, in at most `room` tokens.

    The context is cut at the end of one of its own tokens and the prompt rendered and tokenised again,
    because tokens at the seam may differ; this is repeated, with fewer tokens each time, until the prompt
    fits.
    """
    context_tokens = tokenizer(example.context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [end for _, end in context_tokens["offset_mapping"]]
    body = _plain(tokenizer, example.prompt)
    keep = len(ends)
    while len(body) > room and keep > 0:
        keep = max(keep - (len(body) - room), 0)
        context = example.context[: ends[keep - 1]] if keep else ""
        body = _plain(tokenizer, example.before + context + example.after)
    return body[max(len(body) - room, 0) :]
