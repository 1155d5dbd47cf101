"""A client's data as token ids, ready for the base model."""

import logging
from dataclasses import dataclass
from typing import Any

from fedamole.data.examples import Example, Shard
from fedamole.data.layouts import CONVERSATION_END
from fedamole.data.tokens import Tokenised, TokenRow, tokenise, warn_of_text
from fedamole.errors import DataError
from fedamole.evaluation.preferences import AnswerPair
from fedamole.federation.method import ClientInfo
from fedamole.model.batch import TokenPair
from fedamole.runs.run_files import SPLITS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Token rows and the examples they were made from; `rows[i]` belongs to `examples[i]`."""

    rows: tuple[TokenRow, ...]
    examples: tuple[Example, ...]

    def pairs(self) -> list[TokenPair]:
        """Return the (prompt ids, answer ids) of all rows."""
        return [(row.prompt, row.answer) for row in self.rows]

    def answer_pairs(self) -> list[AnswerPair]:
        """Return (prompt ids, (ids of the chosen answer, ids of the rejected answer)) of all rows."""
        return [(row.prompt, (row.answer, row.rejected)) for row in self.rows]


@dataclass(frozen=True)
class ClientData:
    """The splits of one client."""

    info: ClientInfo
    train: Split
    embedding: Split
    validation: Split
    test: Split


def client_data(shard: Shard, tokenizer: Any, max_length: int) -> ClientData:
    """Tokenise the data of one client.

    Logs a warning with the number of prompts that were cut, of examples that were left out because their answer alone
    is longer than `max_length` tokens, and of texts that the tokenizer cannot reproduce. Raises DataError if a text
    cannot be tokenised or if a split becomes empty.
    """
    splits, results = dict[str, Split](), list[Tokenised]()
    for name in SPLITS:
        examples = getattr(shard, name)
        try:
            tokens = tokenise(examples, tokenizer, max_length)
        except DataError as error:
            raise DataError(f"client {shard.client}, {name} data: {error}") from error
        splits[name] = Split(tokens.rows, tuple(examples[i] for i in tokens.indices))
        results.append(tokens)
        if not tokens.rows:
            raise DataError(
                f"client {shard.client}: no {name} example fits into training.max_length = {max_length}; raise it"
            )
    warn_of_text(f"client {shard.client}", results)
    if tokenizer.chat_template and any(_is_conversation(example) for example in shard.train):
        log.warning(
            "client %s: its conversations are written with headings (### User), though the base has a chat template; "
            'to use it, set template = "chat" (or "chat_turns") in the [[data.source]], or --template chat',
            shard.client,
        )
    cut, dropped = sum(tokens.cut for tokens in results), sum(tokens.dropped for tokens in results)
    if cut or dropped:
        log.warning(
            "client %s: %d prompts cut to fit training.max_length = %d (from the context first, never the answer), "
            "%d examples left out because their answer alone is too long",
            shard.client,
            cut,
            max_length,
            dropped,
        )
    return ClientData(ClientInfo(shard.client, len(splits["train"].rows)), **splits)


def _is_conversation(example: Example) -> bool:
    """Return whether a row with `messages` was rendered without a chat template."""
    return example.turns is None and example.prompt.endswith(CONVERSATION_END)
