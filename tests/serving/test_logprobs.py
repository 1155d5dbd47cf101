"""Log-probabilities, echoed prompts and token ids: those of a plain forward pass, as evaluators read them."""

from collections.abc import Callable, Sequence
from functools import partial
from math import log
from operator import itemgetter
from typing import Any

import pytest
import torch

from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.serving import decode_batch
from fedamole.serving.decode_batch import _CheckRow, _uncached_logits
from fedamole.serving.engine import InferenceEngine
from fedamole.serving.requests import Chunk, GenerationRequest
from fedamole.serving.responses import LogprobsFormat
from fedamole.serving.token_logprobs import MIN_LOGPROB, TokenLogprob, token_logprobs

from .served import Served, post, raw
from .test_engine import KINDS, PROMPTS, run_steps

PROMPT = "Ann has two pens on day 3 ->\n"


def expected(bank: Bank, client: int, prompt: Sequence[int], answer: Sequence[int] = ()) -> torch.Tensor:
    """Log-probabilities (n - 1 + m, V) after each token of a text but the last, from passes without a cache."""
    row, real = _CheckRow(client, bank.prefix(tuple(prompt))), len(prompt)
    virtual = len(row.prompt) - real
    logits = []
    for end in range(1, real):
        logits.append(_uncached_logits(bank, _CheckRow(client, row.prompt[: virtual + end]), ()))
    logits += [_uncached_logits(bank, row, tuple(answer[:end])) for end in range(len(answer))]
    return torch.cat(logits).log_softmax(1)


def near(probability: float) -> Any:
    return pytest.approx(log(probability))


def test_values_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 3.0]]).log()
    first, second = token_logprobs(logits, [1, 0], 2)
    assert (first.token, first.logprob) == (1, near(0.25))
    assert first.top == ((0, near(0.5)), (1, near(0.25)))
    assert second.logprob == MIN_LOGPROB, "JSON has no infinity"
    assert second.top == ((2, near(0.75)), (1, near(0.25)))
    assert token_logprobs(logits, [2, 2], 0)[1] == TokenLogprob(2, near(0.75))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "sliding window", "prompts"])
def test_a_prompt_in_pieces_is_scored_as_in_a_plain_forward_pass(
    base: Callable[..., Base], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of different lengths join together, in pieces of 5 tokens, beside a row that is not scored."""
    monkeypatch.setattr(decode_batch, "LOGITS_AT_ONCE", 15)
    architecture, adapters = KINDS[kind]
    bank = Bank(base(architecture))
    engine, chunks = InferenceEngine(bank, adapters(bank.base)), dict[int, Chunk]()
    for client, prompt in enumerate(PROMPTS[1:]):
        echo, logprobs = client != 2, None if client == 2 else 3
        request = GenerationRequest(client, prompt, 4, logprobs=logprobs, echo=echo)
        engine.submit(request, partial(chunks.__setitem__, client))
    run_steps(engine)
    assert chunks[2].logprobs == ()
    for client in (0, 1):
        prompt, entries = PROMPTS[1 + client], chunks[client].logprobs
        answer = [entry.token for entry in entries[len(prompt) :]]
        assert [entry.token for entry in entries[: len(prompt)]] == list(prompt)
        assert (entries[0].logprob, len(answer)) == (None, 4)
        reference = expected(bank, client, prompt, answer)
        for values, entry in zip(reference, entries[1:], strict=True):
            assert entry.logprob == pytest.approx(float(values[entry.token]), abs=2e-4)
            assert [value for _, value in entry.top] == pytest.approx(values.topk(3).values.tolist(), abs=2e-4)
        assert all(entry.top[0][0] == entry.token for entry in entries[len(prompt) :]), "greedy"


def evaluator_scores(answer: dict[str, Any], context_lengths: Sequence[int]) -> list[tuple[float, bool]]:
    """Sum of the continuations' log-probabilities, and whether they are greedy.

    As the documentation of lm-evaluation-harness 0.4.13 (docs/API_guide.md, `parse_logprobs`) has it: the entries from
    the context's length to the last but one, because the server generates one token more.
    """
    scores = []
    for choice, length in zip(sorted(answer["choices"], key=itemgetter("index")), context_lengths, strict=True):
        values = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        scores.append((sum(values), greedy))
    return scores


def test_an_evaluators_request_gets_the_scores_of_its_continuations(served: Served) -> None:
    """The request that lm-evaluation-harness sends: lists of token ids, echoed with log-probabilities."""
    bank, client = served.engine.bank, served.engine.bank.base.tokenizer
    context = client(PROMPT)["input_ids"]
    endings = [client(text)["input_ids"] for text in ("two pens of Ann", "a", "the old map")]
    body: dict[str, Any] = {"model": "plain", "prompt": [context + ending for ending in endings], "temperature": 0}
    body |= {"max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    status, answer = post(served, body)
    assert status == 200
    scores = evaluator_scores(answer, [len(context)] * 3)
    index = [model.name for model in served.service.models.models].index("plain")
    for (total, greedy), ending, choice in zip(scores, endings, answer["choices"], strict=True):
        reference = expected(bank, index, context + ending)[len(context) - 1 :]
        own = reference.gather(1, torch.tensor(ending).unsqueeze(1)).sum()
        assert total == pytest.approx(float(own), abs=1e-3)
        assert greedy == (reference.argmax(1).tolist() == ending)
        logprobs = choice["logprobs"]
        assert len({len(values) for values in logprobs.values()}) == 1
        assert len(logprobs["tokens"]) == len(context) + len(ending) + 1, "also if the token generated ends the text"
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        assert choice["text"].startswith("".join(logprobs["tokens"][:-1]))
        assert all(len(top) in (1, 2) for top in logprobs["top_logprobs"][1:])
    assert answer["usage"]["prompt_tokens"] == sum(len(context) + len(ending) for ending in endings)


def test_an_end_of_text_token_has_a_logprob_but_no_text(served: Served) -> None:
    tokenizer = served.engine.bank.base.tokenizer
    request: dict[str, Any] = {"model": "plain", "prompt": PROMPT, "max_tokens": 60, "logprobs": 0}
    # A grammar of one short text, because the end is greedy nowhere else.
    request["extra_body"] = {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [1234]}}}}
    answer = served.client().completions.create(**request)
    tokens = answer.choices[0].logprobs.tokens
    assert answer.usage is not None
    assert (answer.choices[0].finish_reason, tokens[-1]) == ("stop", tokenizer.eos_token)
    assert len(tokens) == answer.usage.completion_tokens + 1
    assert "".join(tokens[:-1]).strip() == answer.choices[0].text
    assert answer.choices[0].logprobs.text_offset[:2] == [0, len(tokens[0])]
    parts = list(served.client().completions.create(stream=True, **request))
    streamed = [part.choices[0].logprobs for part in parts if part.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [value for part in streamed for value in getattr(part, name)]
        assert joined == pytest.approx(getattr(answer.choices[0].logprobs, name)) or joined == tokens


def test_an_echo_is_the_prompt_and_its_continuation(served: Served) -> None:
    request: dict[str, Any] = {"model": "plain", "prompt": PROMPT, "max_tokens": 6, "echo": True}
    plain = served.client().completions.create(model="plain", prompt=PROMPT, max_tokens=6).choices[0].text
    text = served.client().completions.create(**request).choices[0].text
    assert text.startswith(PROMPT)
    assert text.removeprefix(PROMPT).strip() == plain
    chunks = list(served.client().completions.create(stream=True, **request))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    row = {"premise": "Ann buys a pen.", "hypothesis": "Ann has it."}
    of_row = served.client().completions.create(
        model="entail", prompt="", max_tokens=1, echo=True, extra_body={"row": row}
    )
    assert of_row.choices[0].text.startswith("Ann buys a pen. Then Ann has it.\n")


def test_token_ids_are_read_as_they_are(served: Served) -> None:
    tokenizer, client = served.engine.bank.base.tokenizer, served.client()
    ids = tokenizer(PROMPT)["input_ids"]
    text = client.completions.create(model="mood", prompt=PROMPT, max_tokens=8)
    assert client.completions.create(model="mood", prompt=ids, max_tokens=8).choices == text.choices
    several = client.completions.create(model="mood", prompt=[ids, ids[:-3], ids], max_tokens=8)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.choices[0].text == several.choices[2].text == text.choices[0].text
    ended = client.completions.create(model="mood", prompt=[*ids, tokenizer.eos_token_id], max_tokens=1, echo=True)
    assert tokenizer.eos_token in ended.choices[0].text


def test_a_chat_has_logprobs_in_its_own_format(served: Served) -> None:
    messages: list[Any] = [{"role": "user", "content": "who has a red cup?"}]
    request: dict[str, Any] = {"model": "chat", "messages": messages, "max_tokens": 6}
    answer = served.client().chat.completions.create(logprobs=True, top_logprobs=2, **request).choices[0]
    assert answer.logprobs is not None
    content = answer.logprobs.content
    assert content is not None
    assert "".join(entry.token for entry in content).strip().startswith(answer.message.content or "")
    for entry in content:
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert bytes(entry.bytes or []).decode() == ("" if entry.token == "\ufffd" else entry.token)
    without = served.client().chat.completions.create(logprobs=True, **request).choices[0]
    assert without.logprobs is not None
    assert [entry.top_logprobs for entry in without.logprobs.content or []] == [[]] * len(content)
    status, refused = raw(
        served,
        "POST",
        "/v1/chat/completions",
        b'{"model": "chat", "messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}',
    )
    assert (status, refused["error"]["param"]) == (400, "top_logprobs")


def test_tokens_with_the_same_text_do_not_hide_each_other() -> None:
    """A tokenizer that leaves out a first space: the greedy token stays the maximum of its position."""

    class Words:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join({1: " a", 2: "a", 3: "b"}[token] for token in ids).lstrip()

    entry = TokenLogprob(2, -2.0, ((1, -0.5), (3, -1.0)))
    first = LogprobsFormat(Words(), False, None).json([entry])
    assert first["top_logprobs"] == [{"a": -0.5, "b": -1.0}]
    after = LogprobsFormat(Words(), False, 3).json([entry, TokenLogprob(1, -0.1)])
    assert (after["tokens"], after["text_offset"]) == (["a", " a"], [0, 1])
    assert after["top_logprobs"][0] == {" a": -0.5, "b": -1.0, "a": -2.0}
