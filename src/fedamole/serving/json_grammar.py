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
MAX_SCHEMA_CHARS = 16_384
"""Longest schema as JSON. The time to compile one grows with its length."""
SCHEMA_FUEL, TOKEN_FUEL, MAX_STATES = 300_000, 100_000, 20_000
"""Limits of llguidance: milliseconds for the schema and for a token, and about 40 MB of memory for an answer."""


class SchemaError(FedamoleError):
    """A schema that is invalid or not supported."""


class JsonGrammar:
    """The state of one answer in its schema's grammar."""

    def __init__(self, matcher: "LLMatcher") -> None:
        """Start at the beginning of the answer."""
        self._matcher = matcher

    def copy(self) -> "JsonGrammar":
        """Return the same state for another answer."""
        return JsonGrammar(self._matcher.deep_copy())

    def masked(self, logits: Tensor) -> Tensor:
        """Return logits (V) with minus infinity for tokens that cannot follow. Raises FedamoleError if none can."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).bool()
        if self._matcher.is_error() or not allowed.any():
            raise SchemaError("the schema exceeds the limits of this server, or allows no answer")
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
        from llguidance import LLMatcher, LLParserLimits

        try:
            text = json.dumps(schema)
            if len(text) > MAX_SCHEMA_CHARS:
                raise SchemaError(
                    f"the schema has {len(text)} characters of JSON; at most {MAX_SCHEMA_CHARS} are allowed"
                )
            refuse_multiples(schema)
            source = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITE_SPACE})
        except (ValueError, RecursionError) as error:
            raise SchemaError("the schema is not a JSON schema") from error
        limits = LLParserLimits(
            initial_lexer_fuel=SCHEMA_FUEL,
            step_lexer_fuel=TOKEN_FUEL,
            max_lexer_states=MAX_STATES,
            verbose_errors=False,
        )
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        if matcher.is_error():
            lines = matcher.get_error().splitlines() or ["the schema is not supported"]
            raise SchemaError(lines[0][:MAX_REASON_CHARS])
        grammar = JsonGrammar(matcher)
        grammar.copy().masked(torch.zeros(1))
        return grammar


def refuse_multiples(value: Any) -> None:
    """Raise SchemaError for `multipleOf`, for which llguidance needs time and memory in proportion to the number."""
    if isinstance(value, dict):
        if isinstance(value.get("multipleOf"), int | float):
            raise SchemaError("multipleOf is not supported")
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            refuse_multiples(item)


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
