"""A conversation with a personal model: it answers word by word and remembers what fits into the base's positions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from fedamole.data.layouts import conversation_prompt
from fedamole.data.text_encoder import Ids
from fedamole.data.tokens import prompt_ids
from fedamole.errors import DataError
from fedamole.model.bank import Bank
from fedamole.model.forward_context import ForwardContext
from fedamole.personal.generate import as_it_is, room_for_prompts

Say = Callable[[str], None]

QUIT, NEW = "/quit", "/new"
"""What ends a conversation, and what begins it anew."""


class _Words(TextStreamer):  # type: ignore[misc]
    """Hands an answer on as it comes, in whole words."""

    def __init__(self, tokenizer: Any, say: Say) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say, self.said = say, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        # What stands before the first word belongs to the layout, not to the answer.
        text = text if self.said else text.lstrip()
        self.said += text
        if text:
            self.say(text)


@dataclass
class Chat:
    """A conversation with the model that is loaded in a bank."""

    bank: Bank
    max_new_tokens: int
    system: str = ""
    """What the model is told before everything else, and never forgets; "" for nothing."""
    turns: list[tuple[str, str]] = field(default_factory=list)
    """What was said and is remembered, as (role, content): user and assistant in turns."""

    def answer(self, text: str, say: Say) -> int:
        """Answer the user, word by word; return how many of the oldest turns had to be forgotten for it.

        Raises DataError where the message alone is too long; it is then not remembered.
        """
        room = room_for_prompts(self.bank, self.max_new_tokens)
        kept = [*self.turns, ("user", text)]
        while len(ids := self._ids(kept)) > room:
            if len(kept) == 1:
                raise DataError(f"that is {len(ids)} tokens with its layout, and there is room for {room}: shorten it")
            kept = kept[2:]
        words = _Words(self.bank.base.tokenizer, say)
        self._generate(ids, words)
        forgotten = len(self.turns) + 1 - len(kept)
        self.turns = [*kept, ("assistant", words.said.strip())]
        return forgotten

    def _ids(self, turns: list[tuple[str, str]]) -> Ids:
        first = [("system", self.system)] if self.system else []
        return prompt_ids(as_it_is(conversation_prompt([*first, *turns])), self.bank.base.tokenizer)

    def _generate(self, ids: Ids, words: _Words) -> None:
        bank, base = self.bank, self.bank.base
        prompt = bank.prefix(ids)
        row = torch.tensor([prompt], device=base.device)
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=base.pad_id,
            eos_token_id=base.tokenizer.eos_token_id,
            use_cache=bank.continuation.caches,
        )
        with torch.no_grad(), bank.enter(ForwardContext(expert_weights=bank.instance_weights([[prompt]]))):
            base.model.generate(
                input_ids=row, attention_mask=torch.ones_like(row), generation_config=greedy, streamer=words
            )


def converse(chat: Chat, ask: Callable[[], str], say: Say, note: Say) -> None:
    """Ask and answer until /quit, the end of the input or Ctrl-C.

    `ask` returns what the user says and raises EOFError at the end, `say` is given an answer's words and its end of
    line, `note` what is no part of the conversation.
    """
    while True:
        try:
            text = ask().strip()
            if text == QUIT:
                return
            if text == NEW:
                chat.turns.clear()
                note("a new conversation")
            elif text:
                forgotten = chat.answer(text, say)
                say("\n")
                if forgotten:
                    note(f"{forgotten} of the oldest turns no longer fitted and are forgotten")
        except DataError as error:
            note(str(error))
        except (EOFError, KeyboardInterrupt):
            note("")
            return
