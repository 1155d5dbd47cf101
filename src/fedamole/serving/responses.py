"""Answers in the JSON of OpenAI's API, complete or as server-sent events, and the lists of models."""

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

from fedamole.serving.protocol import ChatRequest, Json, RequestBody
from fedamole.serving.token_logprobs import TokenLogprob

INCOMPLETE = "\ufffd"
"""What the bytes of an incomplete character decode to."""


def model_list(models: Iterable[tuple[str, int]]) -> Json:
    """Return the response that lists models, given their names and creation times."""
    return {"object": "list", "data": [model_info(name, created) for name, created in models]}


def model_info(name: str, created: int) -> Json:
    """Return the response that describes one model."""
    return {"id": name, "object": "model", "created": created, "owned_by": "fedamole"}


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Return token counts; virtual tokens and the end-of-text token are not counted."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


class LogprobsFormat:
    """The JSON of one answer's log-probabilities. The parts of a streamed answer continue each other."""

    def __init__(self, tokenizer: Any, chat: bool, previous: int | None) -> None:
        """`previous` is the token before the first one: of the prompt, or None if the prompt is part of the answer."""
        self._tokenizer, self._chat, self._previous = tokenizer, chat, previous
        self._offset = 0

    def json(self, logprobs: Sequence[TokenLogprob]) -> Json:
        """Return the next part."""
        return self._chat_json(logprobs) if self._chat else self._completion_json(logprobs)

    def _chat_json(self, logprobs: Sequence[TokenLogprob]) -> Json:
        content = []
        for entry in logprobs:
            top = [self._chat_token(token, value) for token, value in entry.top]
            content.append({**self._chat_token(entry.token, entry.logprob), "top_logprobs": top})
            self._previous = entry.token
        return {"content": content, "refusal": None}

    def _chat_token(self, token: int, logprob: float | None) -> Json:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": None if INCOMPLETE in text else list(text.encode())}

    def _completion_json(self, logprobs: Sequence[TokenLogprob]) -> Json:
        tokens, offsets, tops = list[str](), list[int](), list[dict[str, float] | None]()
        for entry in logprobs:
            text = self._text(entry.token)
            tokens.append(text)
            offsets.append(self._offset)
            tops.append(None if entry.logprob is None else self._top(entry, text, entry.logprob))
            self._offset += len(text)
            self._previous = entry.token
        values = [entry.logprob for entry in logprobs]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, entry: TokenLogprob, text: str, logprob: float) -> dict[str, float]:
        """The most probable tokens and the token itself, by text. Of tokens with equal texts the first one counts."""
        top: dict[str, float] = {}
        for token, value in entry.top:
            top.setdefault(self._text(token), value)
        top.setdefault(text, logprob)
        return top

    def _text(self, token: int) -> str:
        """The text of a token after the previous one: some tokenizers leave out the space before a first word."""
        previous = () if self._previous is None else (self._previous,)
        known, text = self._decode(previous), self._decode((*previous, token))
        return text[len(known) :] if text.startswith(known) else self._decode((token,))

    def _decode(self, tokens: Sequence[int]) -> str:
        decoded = self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(decoded)


class ResponseFormat:
    """The JSON of the answers to one request, complete or in chunks. All chunks have the same id and creation time."""

    def __init__(self, body: RequestBody, unique_id: str) -> None:
        """Format the answers to a request; `unique_id` must differ between responses."""
        self.chat = isinstance(body, ChatRequest)
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{unique_id}",
            "created": int(time.time()),
            "model": body.model,
        }
        options = body.stream_options
        self.with_usage = bool(options and options.include_usage)

    def complete(self, choices: Sequence[Json], counts: dict[str, int]) -> Json:
        """Return the response with complete answers, given their `choice`."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": list(choices), "usage": counts}

    def choice(self, index: int, text: str, finish: str, logprobs: Json | None) -> Json:
        """Return one complete answer."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._choice(index, content, finish, logprobs)

    def first_events(self, answers: int) -> list[str]:
        """Return the events before the first chunks of all answers."""
        if not self.chat:
            return []
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [self._event([self._choice(index, delta, None)]) for index in range(answers)]

    def chunk_event(self, index: int, text: str, logprobs: Json | None = None) -> str:
        """Return the event of one chunk."""
        content = {"delta": {"content": text}} if self.chat else {"text": text}
        return self._event([self._choice(index, content, None, logprobs)])

    def finish_event(self, index: int, finish: str) -> str:
        """Return the event after the last chunk of one answer."""
        return self._event([self._choice(index, {"delta": {}} if self.chat else {"text": ""}, finish)])

    def last_events(self, counts: dict[str, int]) -> list[str]:
        """Return the events after the last answer."""
        return [*([self._event([], counts)] if self.with_usage else []), "data: [DONE]\n\n"]

    def _choice(self, index: int, content: Json, finish: str | None, logprobs: Json | None = None) -> Json:
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

    def _event(self, choices: list[Json], counts: dict[str, int] | None = None) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        usage_field = {"usage": counts} if self.with_usage else {}
        return server_sent_event({**self.head, "object": kind, "choices": choices, **usage_field})


def server_sent_event(content: Json) -> str:
    """Format one server-sent event."""
    return f"data: {json.dumps(content)}\n\n"
