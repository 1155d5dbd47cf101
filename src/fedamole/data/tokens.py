"""Examples as token ids: the prompt and the answer apart, so that only the answer can carry loss.

Prompt and answer are turned into tokens on their own and set one behind the other, nothing between: templates
end their prompts with a newline, so that no token would have spanned the seam. Data of the "plain" template
are taken as they are; where a space belongs between prompt and completion, it must be in the data.

Special tokens are parsed in a template's own text alone. Where data hold the text of one, it stays text.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedamole.data.examples import Example, Span
from fedamole.data.text_encoder import Ids, TextEncoder, text_encoder
from fedamole.errors import BaseModelError, DataError

if TYPE_CHECKING:  # takes seconds to import, and the tokenizer comes from the caller
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


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
    """The rows of a list of examples, and what the tokenizer and the length limit did to them."""

    rows: tuple[TokenRow, ...]
    # Examples whose prompt was shortened.
    cut: int
    # Examples without a row, because their answer leaves no room for a prompt.
    dropped: int
    # For each row the place of its example in the list that was given.
    places: tuple[int, ...]
    # Examples whose data hold the text of a special token, which is read as text.
    special: int
    # Examples with a prompt or answer that their tokens do not give back, a space at its beginning aside.
    changed: int


def tokenise(examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Tokenised:
    """Token ids of examples, none longer than `max_length` tokens with its longest answer.

    A prompt that is too long loses the end of its context; where that is not enough, its own beginning, but
    never the leading special tokens. An example whose answer (or longest option) leaves no room for those and
    for at least one token before the answer is dropped. BOS and EOS that a template writes itself are not
    doubled. Raises BaseModelError for a tokenizer without an end-of-sequence token, or without the character
    offsets that cutting needs (a padding token is not needed), and DataError for options that become the same
    tokens and for text that is no valid Unicode.
    """
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so no answer could end; "
            f"set its eos_token"
        )
    encoder = text_encoder(tokenizer)
    lead = encoder.leading_specials
    answers = _Answers(encoder, tokenizer)
    rows: list[TokenRow] = []
    places: list[int] = []
    cut = special = changed = 0
    prompts = [encoder.marked(example.prompt, _prompt_literals(example, example.context)) for example in examples]
    bodies = encoder.encode(prompts)
    decoded = tokenizer.batch_decode(bodies, clean_up_tokenization_spaces=False) if bodies else []
    for place, (example, body) in enumerate(zip(examples, bodies, strict=True)):
        answer, answer_special, answer_changed = answers.read(example.answer, example.literals.answer)
        special += answer_special or encoder.holds_special_text(prompts[place])
        changed += answer_changed or not _same_text(decoded[place], example.prompt)
        options = answers.options(example)
        longest = max(len(ids) for ids in (answer, *options))
        room = max_length - longest - len(lead)
        if room < (0 if lead else 1):
            continue
        body = _without_lead(body, lead)
        if len(body) > room:
            body = _shortened(example, body, encoder, room)
            cut += 1
        rows.append(TokenRow((*lead, *body), answer, options))
        places.append(place)
    return Tokenised(tuple(rows), cut, len(examples) - len(rows), tuple(places), special, changed)


def prompt_ids(example: Example, tokenizer: "PreTrainedTokenizerBase") -> Ids:
    """Token ids of a prompt as in training, uncut: the tokenizer's leading special tokens, then the text's own."""
    encoder = text_encoder(tokenizer)
    return (*encoder.leading_specials, *_body(example, example.context, encoder))


def warn_of_text(who: str, found: Sequence[Tokenised]) -> None:
    """Log a warning where data hold text of special tokens, and where the tokenizer does not keep all text."""
    count = sum(len(part.rows) + part.dropped for part in found)
    if special := sum(part.special for part in found):
        log.warning(
            "%s: %d of %d examples hold the text of a special token of the base's tokenizer. It is read as text, not "
            "as the token. Where the token is meant, write it into the text of a template, [data.templates.<name>]",
            who,
            special,
            count,
        )
    if changed := sum(part.changed for part in found):
        log.warning(
            "%s: the base's tokenizer does not keep all text of %d of %d examples (unknown characters, letter case or "
            "spaces), so the model can neither read nor write it as it stands; use another base if this matters",
            who,
            changed,
            count,
        )


class _Answers:
    """Token ids of answers and options, each text encoded once."""

    def __init__(self, encoder: TextEncoder, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._encoder, self._tokenizer = encoder, tokenizer
        self._end = int(tokenizer.eos_token_id)
        self._known: dict[tuple[str, tuple[Span, ...]], tuple[Ids, bool, bool]] = {}
        self._options: dict[tuple[tuple[str, ...], bool], tuple[Ids, ...]] = {}

    def read(self, text: str, literals: tuple[Span, ...]) -> tuple[Ids, bool, bool]:
        """Ids with one end-of-sequence token; whether special tokens stayed text; whether text was changed."""
        if (text, literals) not in self._known:
            marked = self._encoder.marked(text, literals)
            (ids,) = self._encoder.encode([marked])
            changed = not _same_text(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False), text)
            ended = ids if ids[-1:] == (self._end,) else (*ids, self._end)
            self._known[text, literals] = ended, self._encoder.holds_special_text(marked), changed
        return self._known[text, literals]

    def options(self, example: Example) -> tuple[Ids, ...]:
        """Ids of an example's options; DataError where two options have the same."""
        key = example.options, example.literals.options
        if key not in self._options:
            texts: dict[Ids, str] = {}
            for option in example.options:
                ids, _, _ = self.read(option, ((0, len(option)),) if example.literals.options else ())
                if ids in texts:
                    raise DataError(
                        f"the options {texts[ids]!r} and {option!r} become the same tokens "
                        f"{self._tokenizer.convert_ids_to_tokens(list(ids))} with tokenizer "
                        f"{self._tokenizer.name_or_path!r}, so the model cannot choose between them; write them "
                        f"differently (labels of a template can do that) or use another base"
                    )
                texts[ids] = option
            self._options[key] = tuple(texts)
        return self._options[key]


def _same_text(decoded: str, text: str) -> bool:
    """Whether decoded tokens give a text back. Some tokenizers set a space before the first word or take it away."""
    return decoded == text or decoded.lstrip(" ") == text.lstrip(" ")


def _prompt_literals(example: Example, context: str) -> tuple[Span, ...]:
    """Where the template's own text stands in the prompt, with this context."""
    shift = len(example.before) + len(context)
    after = ((start + shift, end + shift) for start, end in example.literals.after)
    return (*example.literals.before, *after)


def _body(example: Example, context: str, encoder: TextEncoder) -> Ids:
    """Ids of the prompt with this context, without leading special tokens."""
    text = example.before + context + example.after
    (ids,) = encoder.encode([encoder.marked(text, _prompt_literals(example, context))])
    return _without_lead(ids, encoder.leading_specials)


def _without_lead(body: Ids, lead: Ids) -> Ids:
    """A prompt's ids without the leading special tokens that its template writes itself."""
    written = next((count for count in range(len(lead), 0, -1) if body[:count] == lead[-count:]), 0)
    return body[written:]


def _shortened(example: Example, body: Ids, encoder: TextEncoder, room: int) -> Ids:
    """The prompt, whose ids are `body`, in at most `room` tokens; both without leading special tokens.

    The context is cut at the end of one of its own tokens and the prompt rendered and tokenised again,
    because tokens at the seam may differ; this is repeated, with fewer tokens each time, until the prompt
    fits.
    """
    ends = encoder.token_ends(example.context)
    keep = len(ends)
    while len(body) > room and keep > 0:
        keep = max(keep - (len(body) - room), 0)
        body = _body(example, example.context[: ends[keep - 1]] if keep else "", encoder)
    return body[max(len(body) - room, 0) :]
