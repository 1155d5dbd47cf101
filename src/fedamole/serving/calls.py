"""Read the body of a request: one generation request for each of its answers, and how the answers are formatted."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedamole.data.text_encoder import text_encoder
from fedamole.serving.engine import InferenceEngine
from fedamole.serving.json_grammar import JsonGrammar, JsonGrammars, SchemaError, json_grammars
from fedamole.serving.metrics import CallRecord
from fedamole.serving.prompts import Prompt, read_prompts
from fedamole.serving.protocol import Json, RefusedError, RequestBody, parse_body
from fedamole.serving.requests import Chunk, GenerationRequest
from fedamole.serving.responses import LogprobsFormat, ResponseFormat
from fedamole.serving.served_models import ServedModel


@dataclass(frozen=True)
class Call:
    """A request that was read: its generation requests, and how their answers are formatted."""

    body: RequestBody
    model: ServedModel
    prompts: list[Prompt]
    generations: list[GenerationRequest]
    """For each prompt, `n` in a row."""
    record: CallRecord
    response: ResponseFormat
    logprobs: list[LogprobsFormat] = field(default_factory=list)
    """One for each generation request, or none."""

    def text_before(self, index: int) -> str:
        """The text before an answer: its prompt if the request echoes it."""
        return self.prompts[index * len(self.prompts) // len(self.generations)].text if self.body.echoes else ""

    def logprobs_json(self, index: int, chunk: Chunk) -> Json | None:
        """The log-probabilities of a chunk, if the request asks for them."""
        return self.logprobs[index].json(chunk.logprobs) if self.logprobs else None


class CallReader:
    """Reads requests for the models of several engines."""

    def __init__(self, engines: Sequence[InferenceEngine]) -> None:
        """Prepare the tokenizers, so that the first request does not wait for it."""
        self._grammars: dict[InferenceEngine, JsonGrammars | None] = {}
        for engine in engines:
            text_encoder(engine.bank.base.tokenizer)  # takes 2 seconds for a vocabulary of 256,000
            self._grammars[engine] = json_grammars(engine.bank.base.tokenizer)

    def read(
        self, kind: type[RequestBody], content: bytes, find: Callable[[str], ServedModel], record: CallRecord
    ) -> Call:
        """Read the body of a request; `find` returns the model with a name. Raises RefusedError."""
        body = parse_body(kind, content)
        model = find(body.model)
        record.model = model.name
        prompts = read_prompts(body, model)
        record.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        answers = range(body.n or 1)
        grammar = self._grammar(body, model)
        generations = [
            self._generation(body, model, prompt, number, grammar) for prompt in prompts for number in answers
        ]
        response, logprobs = ResponseFormat(body, secrets.token_hex(12)), list[LogprobsFormat]()
        if body.logprob_count is not None:
            tokenizer = model.engine.bank.base.tokenizer
            for generation in generations:
                previous = None if body.echoes else generation.prompt[-1]
                logprobs.append(LogprobsFormat(tokenizer, response.chat, previous))
        return Call(body, model, prompts, generations, record, response, logprobs)

    def _generation(
        self, body: RequestBody, model: ServedModel, prompt: Prompt, number: int, grammar: JsonGrammar | None
    ) -> GenerationRequest:
        """The generation request of one answer; `number` counts the answers to a prompt."""
        longest = body.max_answer_tokens or model.max_new_tokens
        return GenerationRequest(
            model.index,
            prompt.ids,
            model.engine.max_new_tokens(prompt.ids, longest),
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(0, body.top_k or 0),
            min_p=body.min_p or 0.0,
            repetition_penalty=body.repetition_penalty or 1.0,
            seed=None if body.seed is None else body.seed + number,
            stop=body.stop_strings,
            stream=bool(body.stream),
            logprobs=body.logprob_count,
            echo=body.echoes,
            grammar=None if grammar is None else grammar.copy(),
        )

    def _grammar(self, body: RequestBody, model: ServedModel) -> JsonGrammar | None:
        """The grammar of the answers; None for free text."""
        schema, param = body.schema_of_answer, "response_format"
        if schema is None:
            return None
        grammars = self._grammars[model.engine]
        if grammars is None:
            text = (
                f"{param}: this server cannot write JSON; it needs the extra `json`, and a base that llguidance reads"
            )
            raise RefusedError(400, text, "unsupported_value", param)
        try:
            return grammars.grammar(schema)
        except SchemaError as error:
            raise RefusedError(400, f"{param}: {error}", "invalid_value", param) from error
