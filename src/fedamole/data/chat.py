"""Render conversations through the chat template of a base's tokenizer.

A chat template is a Jinja program that comes with the base. transformers runs it in a sandbox. Only the special tokens
that the template itself writes are control tokens: before it runs, the names of special tokens in data are replaced by
random strings, and restored in its output.
"""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fedamole.data.layouts import Turn
from fedamole.data.text_encoder import TextEncoder, text_encoder
from fedamole.errors import BaseModelError

if TYPE_CHECKING:  # takes seconds to import, and the tokenizer comes from the caller
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DATE = "26 Jul 2024"
"""Value of `date_string`, which templates of the Llama family print. With today's date, no run could be reproduced."""


@dataclass(frozen=True)
class Frame:
    """The text of a template around an answer. All texts are marked for `TextEncoder.encode`."""

    prompt: str
    """Everything before the answer. A model is asked with exactly this text."""
    before: str
    """A space between prompt and answer, which is encoded with the answer, or nothing."""
    after: str
    """From the end of the answer to its end marker, the first special token; empty if the template writes none."""


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", encoder: TextEncoder) -> None:
        """Try the template on a short conversation; BaseModelError if there is none or it fails."""
        self._tokenizer, self._encoder = tokenizer, encoder
        self._label = f"base {tokenizer.name_or_path!r}"
        if not tokenizer.chat_template:
            raise BaseModelError(
                f"{self._label}: its tokenizer has no chat template; use a base with one, often named Instruct or "
                "Chat, or a template without chat"
            )
        # Random, so that data cannot contain it.
        self._answer = secrets.token_hex(16)
        question: Turn = ("user", "a")
        self._parts = False
        # Some templates of bases with images read lists of parts alone, and leave out other texts.
        self._parts = self._answer not in self._render([question, ("assistant", self._answer)], False)
        answered, padded = (
            self._render([question, ("assistant", text)], False) for text in (self._answer, f"\n {self._answer} \n")
        )
        self.strips = answered == padded
        """Whether the template removes white space around an answer."""
        frame = self.frame([question])
        self.end_id = encoder.encode([frame.after])[0][-1] if frame.after else None
        """Id of the special token that ends an answer; None if the template writes none."""
        source = str(tokenizer.chat_template)
        if "strftime_now" in source and "date_string" not in source:
            log.warning("%s: its chat template writes today's date, so prompts differ from day to day", self._label)

    def frame(self, turns: Sequence[Turn], image: bool = False) -> Frame:
        """Return the text around the assistant's answer to a conversation; `turns` are (role, marked text).

        With `image` the template writes the base's placeholder for an image before the text of the last turn.

        Raises BaseModelError if the template fails, or if its text for the prompt alone is not how its text for prompt
        and answer begins.
        """
        hidden = [(role, self._encoder.hidden(text)) for role, text in turns]
        images = len(turns) - 1 if image else None
        prompt = self._render(hidden, True, images)
        whole = self._render([*hidden, ("assistant", self._answer)], False, images)
        between, answer, rest = whole[len(prompt) :].partition(self._answer)
        if not whole.startswith(prompt) or not answer or self._answer in rest:
            raise BaseModelError(
                f"{self._label}: its chat template writes a prompt differently when the answer follows, so the answer "
                "cannot be told apart from it; use another base, or a template without chat"
            )
        # A space before a word belongs to the word's token.
        space = " " if between.endswith(" ") else ""
        prompt += between.removesuffix(space)
        return Frame(*map(self._encoder.revealed, (prompt, space, self._encoder.until_special(rest))))

    def _render(self, turns: Sequence[Turn], prompts_answer: bool, image: int | None = None) -> str:
        """Render turns; `image` is the index of the turn with an image."""
        try:
            return self._apply(turns, prompts_answer, image)
        except Exception as error:
            raise self._error(turns, prompts_answer, image) from error

    def _apply(self, turns: Sequence[Turn], prompts_answer: bool, image: int | None = None) -> str:
        messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
        if self._parts or image is not None:
            for index, message in enumerate(messages):
                parts = [{"type": "image"}] if index == image else []
                message["content"] = [*parts, {"type": "text", "text": message["content"]}]
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompts_answer, date_string=DATE
            )
        )

    def _error(self, turns: Sequence[Turn], prompts_answer: bool, image: int | None) -> BaseModelError:
        """Find out without the data why the template failed, because its error may quote them."""
        without_data = [(role, "a") for role, _ in turns]
        try:
            self._apply(without_data, prompts_answer, image)
        except Exception as error:
            if image is not None and self._accepts(without_data, prompts_answer):
                return BaseModelError(
                    f"{self._label}: its chat template cannot write an image; write the base's placeholder in the "
                    "prompt of the template under [data.templates]"
                )
            if any(role == "system" for role, _ in turns) and self._accepts(
                [turn for turn in without_data if turn[0] != "system"], prompts_answer
            ):
                return BaseModelError(
                    f"{self._label}: its chat template refuses a system message; remove `system` from the template "
                    "under [data.templates], or the system turns from the messages"
                )
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            roles = ", ".join(dict.fromkeys(role for role, _ in turns))
            return BaseModelError(
                f"{self._label}: its chat template cannot be rendered for turns of {roles} ({reason}); correct the "
                "order of the turns, use another base, or a template without chat"
            )
        return BaseModelError(
            f"{self._label}: its chat template cannot be rendered for some texts of the data; use another base, or a "
            "template without chat"
        )

    def _accepts(self, turns: Sequence[Turn], prompts_answer: bool) -> bool:
        try:
            self._apply(turns, prompts_answer)
        except Exception:  # a program of the base's authors
            return False
        return True


@lru_cache(maxsize=4)
def chat_template(tokenizer: "PreTrainedTokenizerBase") -> ChatTemplate:
    """Return the cached chat template of a tokenizer. Raises BaseModelError."""
    return ChatTemplate(tokenizer, text_encoder(tokenizer))


def stop_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Return the tokens that end an answer: end-of-sequence, and the end marker of the chat template if it differs."""
    end = None
    if tokenizer.chat_template:
        try:
            end = chat_template(tokenizer).end_id
        except BaseModelError:  # matters only to runs with chat, which raise it themselves
            log.debug("the chat template of %r has no known end marker", tokenizer.name_or_path)
    eos = int(tokenizer.eos_token_id)
    return (eos,) if end is None or end == eos else (eos, end)
