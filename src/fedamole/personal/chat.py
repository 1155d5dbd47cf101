"""Chat with a personal model on the terminal. The oldest turns are dropped when the base's positions are full."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TextStreamer
from typing_extensions import override

from fedamole.data.text_encoder import Ids
from fedamole.data.tokens import prompt_ids
from fedamole.errors import DataError
from fedamole.model.bank import Bank
from fedamole.personal.generate import PromptFormat, generate_ids, max_prompt_tokens

QUIT, NEW = "/quit", "/new"
"""Input that ends the chat, and input that starts a new conversation."""


class _WordStreamer(TextStreamer):  # type: ignore[misc]
    """Passes an answer to `on_text` word by word, and collects it in `text`."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.text = on_text, ""

    @override
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        # Whitespace before the first word belongs to the prompt format, not to the answer.
        text = text if self.text else text.lstrip()
        self.text += text
        if text:
            self.on_text(text)


@dataclass
class Chat:
    """A conversation with the model that is loaded in a bank."""

    bank: Bank
    max_new_tokens: int
    system: str = ""
    """System message, which is never dropped; "" for none, or for that of the client's template."""
    prompt_format: PromptFormat = field(default_factory=PromptFormat)
    """How the client's conversations became prompts in training."""
    turns: list[tuple[str, str]] = field(default_factory=list)
    """Turns that still fit, as (role, content), alternately of the user and the assistant."""

    def answer(self, text: str, on_text: Callable[[str], None]) -> int:
        """Answer a message, passing the words to `on_text`; return the number of old turns that were dropped.

        Raises DataError, and leaves the conversation unchanged, if the message alone is too long.
        """
        room = max_prompt_tokens(self.bank, self.max_new_tokens)
        turns = [*self.turns, ("user", text)]
        while len(ids := self._prompt_ids(turns)) > room:
            if len(turns) == 1:
                raise DataError(f"the message takes {len(ids)} tokens in a prompt, and only {room} fit: shorten it")
            turns = turns[2:]
        streamer = _WordStreamer(self.bank.base.tokenizer, on_text)
        self._generate(ids, streamer)
        dropped = len(self.turns) + 1 - len(turns)
        self.turns = [*turns, ("assistant", streamer.text.strip())]
        return dropped

    def _prompt_ids(self, turns: list[tuple[str, str]]) -> Ids:
        system = [("system", self.system)] if self.system else []
        return prompt_ids(self.prompt_format.conversation([*system, *turns]), self.bank.base.tokenizer)

    def _generate(self, ids: Ids, streamer: _WordStreamer) -> None:
        generate_ids(self.bank, self.bank.prefix(ids), self.max_new_tokens, streamer)


def run_chat(
    chat: Chat, read_input: Callable[[], str], on_text: Callable[[str], None], notify: Callable[[str], None]
) -> None:
    """Read messages and answer them until /quit, the end of the input or Ctrl-C.

    Args:
        chat: The conversation.
        read_input: Returns the user's next message; raises EOFError at the end of the input.
        on_text: Receives the words of an answer, and its line end.
        notify: Receives notes that are not part of the conversation.
    """
    while True:
        try:
            text = read_input().strip()
            if text == QUIT:
                return
            if text == NEW:
                chat.turns.clear()
                notify("a new conversation")
            elif text:
                dropped = chat.answer(text, on_text)
                on_text("\n")
                if dropped:
                    notify(f"the oldest {dropped} turns no longer fit and were dropped")
        except DataError as error:
            notify(str(error))
        except (EOFError, KeyboardInterrupt):
            notify("")
            return
