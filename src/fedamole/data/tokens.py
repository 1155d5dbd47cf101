"""Tokenise examples: prompt and answer separately, so that the loss can be restricted to the answer.

The tokens of prompt and answer are concatenated. Templates end their prompts with a newline, so that no token would
span both. With the "plain" template the data must contain a space between prompt and completion where one belongs.

With a chat template, the prompt is everything that it writes before the answer, and the answer ends with its own end
marker; what it writes after this marker is left out.

Special tokens are recognised in template text only. In data, the text of a special token stays text.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedamole.data.chat import Frame, chat_template
from fedamole.data.examples import Example, Span
from fedamole.data.images import image_reader, picture_of
from fedamole.data.layouts import shortened
from fedamole.data.text_encoder import Ids, TextEncoder, text_encoder
from fedamole.errors import BaseModelError, DataError

if TYPE_CHECKING:  # takes seconds to import, and the tokenizer comes from the caller
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenRow:
    """Token ids of one example. The prompt with the answer, or with any option, has at most `max_length` tokens."""

    prompt: Ids
    """Begins with the tokenizer's leading special tokens, if it has any, or as the chat template begins."""
    answer: Ids
    """Ends with the end-of-sequence token, or the end marker of the chat template. Only the answer contributes to the
    loss."""
    options: tuple[Ids, ...]
    """In the order of the example's options; each ends as the answer does."""
    rejected: Ids = ()
    """The answer that is not preferred, which ends as the answer does; empty without one."""


@dataclass(frozen=True)
class Tokenised:
    """Tokenised examples, and how many were truncated, dropped or changed."""

    rows: tuple[TokenRow, ...]
    cut: int
    """Number of examples with a truncated prompt."""
    dropped: int
    """Number of examples without a row, because the answer leaves no room for a prompt."""
    indices: tuple[int, ...]
    """Index of each row's example in the input."""
    special: int
    """Number of examples whose data contain the text of a special token, which is encoded as text."""
    changed: int
    """Number of examples whose prompt or answer cannot be decoded exactly, apart from a leading space; with a chat
    template, apart from white space."""


def tokenise(examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Tokenised:
    """Tokenise examples; prompt and longest answer together have at most `max_length` tokens.

    If a prompt is too long, the end of its context is removed first, then the beginning of the prompt, but never the
    leading special tokens. An example is dropped if its answer (or longest option) leaves no room for these and for at
    least one token before the answer. BOS and EOS tokens in a template are not duplicated.

    The tokens of an image replace the base's placeholder in the prompt, and the row carries the preprocessed image. An
    example is also dropped if the placeholder would be cut.

    Raises BaseModelError if the tokenizer has no end-of-sequence token or no character offsets, which truncation needs,
    or if an example needs a chat template that is missing or fails. Raises DataError if two options have the same
    tokens, if the two answers of a pair have, if a text is not valid Unicode, or if an image cannot be decoded.
    """
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, which every answer needs; "
            f"set its eos_token"
        )
    encoder = text_encoder(tokenizer)
    answers = _Answers(encoder, tokenizer)
    rows: list[TokenRow] = []
    indices: list[int] = []
    cut = special = changed = 0
    read = [_marked_prompt(example, example.context, encoder, tokenizer) for example in examples]
    prompts = [marked for marked, _ in read]
    bodies = encoder.encode(prompts)
    decoded = tokenizer.batch_decode(bodies, clean_up_tokenization_spaces=False) if bodies else []
    for index, (example, body) in enumerate(zip(examples, bodies, strict=True)):
        frame = read[index][1]
        picture = picture_of(example, body, tokenizer)
        lead = encoder.leading_specials if frame is None else ()
        answer, answer_special, answer_changed = answers.read(example.answer, example.literals.answer, frame)
        rejected: Ids = ()
        if example.rejected is not None:
            rejected, *marks = answers.rejected(example, frame, answer)
            answer_special, answer_changed = answer_special or marks[0], answer_changed or marks[1]
        special += answer_special or encoder.holds_special_text(prompts[index])
        if frame is None:
            text = example.prompt if picture is None else encoder.unmarked(prompts[index])  # with the placeholder
            changed += answer_changed or not _same_text(decoded[index], text)
        else:
            changed += answer_changed or not _same_words(decoded[index], encoder.unmarked(frame.prompt))
        options = answers.options(example, frame)
        longest = max(len(ids) for ids in (answer, rejected, *options))
        room = max_length - longest - len(lead)
        if picture is not None:
            room -= len(picture.ids) - 1  # they replace the placeholder
        if room < (0 if lead else 1):
            continue
        body = _without_lead(body, lead)
        if len(body) > room:
            body = _shortened(example, body, encoder, tokenizer, room)
            cut += 1
        prompt = (*lead, *body)
        if picture is not None:
            if image_reader(tokenizer).token_id not in body:
                continue  # only text was left in the room beside the image
            prompt = image_reader(tokenizer).expand(prompt, picture)
        rows.append(TokenRow(prompt, answer, options, rejected))
        indices.append(index)
    return Tokenised(tuple(rows), cut, len(examples) - len(rows), tuple(indices), special, changed)


def prompt_ids(example: Example, tokenizer: "PreTrainedTokenizerBase") -> Ids:
    """Return the token ids of a complete prompt as in training, including leading special tokens."""
    encoder = text_encoder(tokenizer)
    lead = encoder.leading_specials if example.turns is None else ()
    return (*lead, *_body(example, example.context, encoder, tokenizer))


def warn_of_text(owner: str, splits: Sequence[Tokenised]) -> None:
    """Log a warning if data contain the text of special tokens, or if the tokenizer changes text.

    `owner` names the data at the beginning of the warning.
    """
    count = sum(len(split.rows) + split.dropped for split in splits)
    if special := sum(split.special for split in splits):
        log.warning(
            "%s: %d of %d examples hold the text of a special token of the base's tokenizer. It is read as text, "
            "not as the token. To use the token, write it in the text of a template, [data.templates.<name>]",
            owner,
            special,
            count,
        )
    if changed := sum(split.changed for split in splits):
        log.warning(
            "%s: the base's tokenizer changes the text of %d of %d examples (unknown characters, letter case or "
            "spaces), so the model can neither read nor write it exactly; use another base if this matters",
            owner,
            changed,
            count,
        )


class _Answers:
    """Encode answers and options; each text is encoded once."""

    def __init__(self, encoder: TextEncoder, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._encoder, self._tokenizer = encoder, tokenizer
        self._end = int(tokenizer.eos_token_id)
        self._encoded: dict[tuple[str, tuple[Span, ...], _Ends], tuple[Ids, bool, bool]] = {}
        self._options: dict[tuple[tuple[str, ...], bool, _Ends], tuple[Ids, ...]] = {}

    def read(self, text: str, literals: tuple[Span, ...], frame: Frame | None) -> tuple[Ids, bool, bool]:
        """Return ids with the end marker, whether special tokens stayed text, and whether text changed."""
        key = text, literals, _ends(frame)
        if key not in self._encoded:
            marked = self._encoder.marked(text, literals)
            special = self._encoder.holds_special_text(marked)
            if frame is not None:
                marked = marked.strip() if chat_template(self._tokenizer).strips else marked
                marked = frame.before + marked + frame.after
            (ids,) = self._encoder.encode([marked])
            decoded = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            if frame is None:
                changed = not _same_text(decoded, text)
            else:
                changed = not _same_words(decoded, self._encoder.unmarked(marked))
            ended = (frame is not None and frame.after) or ids[-1:] == (self._end,)
            self._encoded[key] = ids if ended else (*ids, self._end), special, changed
        return self._encoded[key]

    def rejected(self, example: Example, frame: Frame | None, answer: Ids) -> tuple[Ids, bool, bool]:
        """Return the same for the rejected answer of a pair; DataError if its ids are those of the preferred answer."""
        assert example.rejected is not None
        read = self.read(example.rejected, example.literals.rejected, frame)
        if read[0] == answer:
            raise DataError(
                f"the two answers of a pair, {shortened(example.answer)} and {shortened(example.rejected)}, become the "
                "same tokens, so the model cannot distinguish them; remove the row or use another base"
            )
        return read

    def options(self, example: Example, frame: Frame | None) -> tuple[Ids, ...]:
        """Return the ids of an example's options; DataError if two options have the same ids."""
        key = example.options, example.literals.options, _ends(frame)
        if key not in self._options:
            texts: dict[Ids, str] = {}
            for option in example.options:
                ids, _, _ = self.read(option, ((0, len(option)),) if example.literals.options else (), frame)
                if ids in texts:
                    raise DataError(
                        f"the options {texts[ids]!r} and {option!r} become the same tokens "
                        f"{self._tokenizer.convert_ids_to_tokens(list(ids))} with tokenizer "
                        f"{self._tokenizer.name_or_path!r}, so the model cannot distinguish them; write them "
                        f"differently (for example with labels of a template) or use another base"
                    )
                texts[ids] = option
            self._options[key] = tuple(texts)
        return self._options[key]


_Ends = tuple[str, str] | None
"""What a chat template writes around an answer; None without one."""


def _ends(frame: Frame | None) -> _Ends:
    return None if frame is None else (frame.before, frame.after)


def _same_words(decoded: str, text: str) -> bool:
    """Whether texts are equal apart from white space, which some tokenizers change beside special tokens."""
    return "".join(decoded.split()) == "".join(text.split())


def _same_text(decoded: str, text: str) -> bool:
    """Whether decoded tokens equal a text. Some tokenizers add or remove a space before the first word."""
    return decoded == text or decoded.lstrip(" ") == text.lstrip(" ")


def _prompt_literals(example: Example, context: str) -> tuple[Span, ...]:
    """Return the spans of template text in the prompt with this context."""
    shift = len(example.before) + len(context)
    after = ((start + shift, end + shift) for start, end in example.literals.after)
    return (*example.literals.before, *after)


def _marked_prompt(
    example: Example, context: str, encoder: TextEncoder, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, Frame | None]:
    """Return the marked prompt with this context, and the chat template's text around the answer, if there is one."""
    text = example.before + context + example.after
    marked = encoder.marked(text, _prompt_literals(example, context))
    placeholder = ""
    if example.image is not None:
        token = image_reader(tokenizer).token
        placeholder = encoder.marked(token, ((0, len(token)),))
        placeholder = "" if placeholder in marked else placeholder
    if example.turns is None:
        return placeholder + marked, None
    frame = chat_template(tokenizer).frame([*example.turns, ("user", marked)], image=bool(placeholder))
    return frame.prompt, frame


def _body(example: Example, context: str, encoder: TextEncoder, tokenizer: "PreTrainedTokenizerBase") -> Ids:
    """Return the ids of the prompt with this context, without the tokenizer's leading special tokens."""
    marked, frame = _marked_prompt(example, context, encoder, tokenizer)
    (ids,) = encoder.encode([marked])
    return _without_lead(ids, encoder.leading_specials if frame is None else ())


def _without_lead(body: Ids, lead: Ids) -> Ids:
    """Remove leading special tokens that the template contains from a prompt's ids."""
    written = next((count for count in range(len(lead), 0, -1) if body[:count] == lead[-count:]), 0)
    return body[written:]


def _shortened(
    example: Example, body: Ids, encoder: TextEncoder, tokenizer: "PreTrainedTokenizerBase", room: int
) -> Ids:
    """Truncate a prompt with the ids `body` to at most `room` tokens; both without leading special tokens.

    The context is truncated at the end of one of its tokens and the prompt tokenised again, because the tokens there
    may differ. This is repeated with fewer tokens until the prompt fits.
    """
    ends = encoder.token_ends(example.context)
    count = len(ends)
    while len(body) > room and count > 0:
        count = max(count - (len(body) - room), 0)
        body = _body(example, example.context[: ends[count - 1]] if count else "", encoder, tokenizer)
    return body[max(len(body) - room, 0) :]
