"""Turn the body of a request into prompts: texts, token ids, a row in the client's template, or a conversation."""

from dataclasses import dataclass

from fedamole.data.examples import Example
from fedamole.data.tokens import prompt_ids
from fedamole.errors import BaseModelError, DataError
from fedamole.model.batch import Ids
from fedamole.personal.generate import raw_prompt, render_prompts
from fedamole.serving.protocol import MAX_ANSWERS, ChatRequest, CompletionRequest, RefusedError, RequestBody
from fedamole.serving.served_models import ServedModel

MAX_CHARS_PER_POSITION = 16
"""Maximum characters of a prompt per position of the base. Longer prompts cannot fit and are not tokenised."""


@dataclass(frozen=True)
class Prompt:
    """A prompt of a request."""

    ids: Ids
    """Token ids, without virtual tokens."""
    text: str
    """The text, which the answer repeats if the request asks for it; empty for a conversation."""


def read_prompts(body: RequestBody, model: ServedModel) -> list[Prompt]:
    """Return the prompts of a request. Raises RefusedError if one is invalid, empty or too long, or for too many."""
    if isinstance(body, ChatRequest):
        return [_of_example(_conversation(body, model), model, "")]
    assert isinstance(body, CompletionRequest)
    texts = body.prompts()
    most, count = min(MAX_ANSWERS, model.engine.limits.max_waiting), len(texts) * (body.n or 1)
    if count > most:
        text = f"prompt: {count} answers (prompts times n), but one request can have at most {most} here"
        raise RefusedError(400, text, "invalid_value", "prompt")
    if body.row:
        example = _row(body, model)
        return [_of_example(example, model, example.prompt)]
    return [
        _of_example(raw_prompt(prompt), model, prompt) if isinstance(prompt, str) else _of_ids(prompt, model)
        for prompt in texts
    ]


def _conversation(body: ChatRequest, model: ServedModel) -> Example:
    try:
        return model.prompt_format.conversation(body.turns())
    except DataError as error:
        raise RefusedError(400, str(error), "invalid_value", "messages") from error


def _row(body: CompletionRequest, model: ServedModel) -> Example:
    try:
        return render_prompts([body.columns], model.prompt_format, "row")[0]
    except DataError as error:
        raise RefusedError(400, str(error), "invalid_value", "row") from error


def _of_example(example: Example, model: ServedModel, text: str) -> Prompt:
    """Tokenise a prompt."""
    characters = len(example.conversation)
    limit = MAX_CHARS_PER_POSITION * model.engine.bank.base.max_positions
    if characters > limit:
        message = f"the prompt has {characters} characters; this model reads at most {limit}"
        raise RefusedError(400, message, "context_length_exceeded")
    try:
        ids = prompt_ids(example, model.engine.bank.base.tokenizer)
    except BaseModelError as error:  # it names a folder of this machine
        message = "the base's chat template refuses this conversation; alternate the roles, or send no system message"
        raise RefusedError(400, message, "invalid_value", "messages") from error
    except DataError as error:
        raise RefusedError(400, str(error), "invalid_value", "prompt") from error
    return _checked(ids, model, text)


def _of_ids(ids: Ids, model: ServedModel) -> Prompt:
    """Check a prompt of token ids, which are read as they are, also those of special tokens."""
    base = model.engine.bank.base
    vocabulary = base.model.get_input_embeddings().weight.shape[0]
    if any(token >= vocabulary for token in ids):
        text = f"prompt: a token id is too large; the vocabulary of this base has {vocabulary} tokens"
        raise RefusedError(400, text, "invalid_value", "prompt")
    _checked(ids, model, "")
    return Prompt(ids, str(base.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)))


def _checked(ids: Ids, model: ServedModel, text: str) -> Prompt:
    engine = model.engine
    if not ids:
        raise RefusedError(400, "the prompt is empty", "invalid_value", "prompt")
    if not engine.max_new_tokens(ids, 1):
        limit = engine.bank.base.max_positions - len(engine.bank.prefix(()))
        message = f"the prompt has {len(ids)} tokens; this model reads at most {limit}"
        raise RefusedError(400, message, "context_length_exceeded")
    return Prompt(ids, text)
