"""Answers in JSON that follow a schema, with llguidance: tokens that would violate the schema are not sampled."""

import importlib.util
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedamole.data.chat import stop_ids
from fedamole.errors import FedamoleError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

log = logging.getLogger(__name__)

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
"""The schema of any JSON object."""
WHITE_SPACE = " ?"
"""White space between tokens of JSON. Without a limit, a model could write blanks for ever."""
MAX_REASON_CHARS = 160


class SchemaError(FedamoleError):
    """A schema that is invalid or not supported."""


class JsonGrammar:
    """The state of one answer in its schema's grammar."""

    def __init__(self, matcher: "LLMatcher") -> None:
        """Start at the beginning of the answer."""
        self._matcher = matcher

    def masked(self, logits: Tensor) -> Tensor:
        """Return logits (V) with minus infinity for tokens that cannot follow. Raises FedamoleError if none can."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).bool()
        if self._matcher.is_error() or not allowed.any():
            raise FedamoleError("the grammar of the answer is in an invalid state")
        mask = torch.zeros(len(logits), dtype=torch.bool)  # the logits may be padded beyond the vocabulary
        mask[: len(allowed)] = allowed[: len(logits)]
        return logits.masked_fill(~mask.to(logits.device), -torch.inf)

    def accept(self, token: int) -> None:
        """Read the token that was generated."""
        self._matcher.consume_token(token)


class JsonGrammars:
    """Compiles schemas for a tokenizer."""

    def __init__(self, tokenizer: "LLTokenizer") -> None:
        """Use a tokenizer of llguidance."""
        self._tokenizer = tokenizer

    def grammar(self, schema: Mapping[str, Any]) -> JsonGrammar:
        """Return the grammar of one answer. Raises SchemaError if the schema is invalid or not supported."""
        from llguidance import LLMatcher

        try:
            text = json.dumps(schema)
            source = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITE_SPACE})
        except (ValueError, RecursionError) as error:
            raise SchemaError("the schema is not a JSON schema") from error
        matcher = LLMatcher(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            lines = matcher.get_error().splitlines() or ["the schema is not supported"]
            raise SchemaError(lines[0][:MAX_REASON_CHARS])
        return JsonGrammar(matcher)


def json_grammars(tokenizer: Any) -> JsonGrammars | None:
    """Return the grammars for a tokenizer of transformers; None if llguidance is missing or cannot read it.

    Takes a second for a large vocabulary.
    """
    if importlib.util.find_spec("llguidance") is None:
        return None
    from llguidance.hf import from_tokenizer

    try:
        return JsonGrammars(from_tokenizer(tokenizer, eos_token=list(stop_ids(tokenizer))))
    except Exception as error:  # tokenizers are of many kinds, and llguidance reads most of them
        log.info("answers cannot be in JSON: llguidance cannot read the base's tokenizer (%s)", type(error).__name__)
        return None
