"""Options of a request: several prompts and answers, sampling, tools, and answers in JSON."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai.types.chat import ChatCompletionToolParam

from fedamole.model.base import Base
from fedamole.serving.calls import CallReader
from fedamole.serving.json_grammar import JsonGrammar, json_grammars
from fedamole.serving.sampling import penalise_repetition, sample_token

from ..data.test_chat import make
from .served import Served, post, until

PROMPT = "Ann has two pens on day 3 ->\n"
TOOL: ChatCompletionToolParam = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
SCHEMA = {
    "type": "object",
    "properties": {"goods": {"enum": ["cup", "pen"]}, "count": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["goods", "count"],
    "additionalProperties": False,
}


def draws(top_p: float = 1.0, **how: Any) -> set[int]:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    return {sample_token(logits, 1.0, top_p, generator, **how) for _ in range(300)}


def test_top_k_and_min_p_remove_improbable_tokens() -> None:
    assert draws() == {0, 1, 2, 3}
    assert draws(top_k=2) == {0, 1}
    assert draws(top_k=10) == {0, 1, 2, 3}
    assert draws(min_p=0.5) == {0, 1}, "0.3 of 0.5 is 0.6, 0.15 is 0.3"
    assert draws(min_p=1.0) == {0}
    # Of two tokens with 0.5 and 0.3, the first has 0.625 of the probability.
    assert draws(top_k=2, top_p=0.62) == {0}
    assert draws(top_k=3, top_p=0.62) == {0, 1}


def test_repetition_lowers_the_logits_of_tokens_that_occurred() -> None:
    logits = torch.tensor([2.0, -1.0, 3.0])
    assert penalise_repetition(logits, [0, 1, 0], 2.0).tolist() == [1.0, -2.0, 3.0]
    assert logits.tolist() == [2.0, -1.0, 3.0]


def test_a_greedy_answer_with_a_penalty_repeats_less(served: Served) -> None:
    ids = served.engine.bank.base.tokenizer(PROMPT)["input_ids"]
    request: dict[str, Any] = {"model": "plain", "prompt": PROMPT, "max_tokens": 30}
    plain = served.client().completions.create(logprobs=0, **request).choices[0]
    assert (
        served.client().completions.create(extra_body={"repetition_penalty": 1}, **request).choices[0].text
        == plain.text
    )
    other = served.client().completions.create(logprobs=0, extra_body={"repetition_penalty": 10}, **request).choices[0]
    assert other.text != plain.text
    assert len(ids) > 5


def test_prompts_and_n_give_answers_in_order(served: Served) -> None:
    client = served.client()
    request: dict[str, Any] = {"model": "mood", "max_tokens": 12, "temperature": 1.5, "seed": 3}
    prompts = [PROMPT, "Eve has an old map ->\n"]
    answer = client.completions.create(prompt=prompts, n=2, **request)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) > 2
    single = [
        client.completions.create(prompt=prompt, **request | {"seed": seed}) for prompt in prompts for seed in (3, 4)
    ]
    assert texts == [answer.choices[0].text for answer in single]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(part.usage.prompt_tokens for part in single[::2] if part.usage)
    assert answer.usage.completion_tokens == sum(part.usage.completion_tokens for part in single if part.usage)
    streamed = ["", "", "", ""]
    finished = []
    options: Any = {"include_usage": True}
    for chunk in client.completions.create(prompt=prompts, n=2, stream=True, stream_options=options, **request):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            finished += [choice.index] if choice.finish_reason else []
    assert (streamed, sorted(finished), chunk.usage) == (texts, [0, 1, 2, 3], answer.usage)
    messages: list[Any] = [{"role": "user", "content": "who has a red cup?"}]
    chat = client.chat.completions.create(messages=messages, n=3, **request)
    assert [choice.index for choice in chat.choices] == [0, 1, 2]
    assert post(served, {"model": "mood", "prompt": ["a"] * 5, "n": 13})[1]["error"]["param"] == "prompt"


def test_all_answers_of_a_request_wait_together_or_none(run: Any) -> None:
    served = Served(run, max_waiting=3)
    try:
        assert "at most 3" in post(served, {"model": "mood", "prompt": "a", "n": 4})[1]["error"]["message"]
        with openai.OpenAI(base_url=f"{served.address}/v1", api_key="-", max_retries=0, timeout=0.5) as client:
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(model="mood", prompt="a", n=2, max_tokens=2)
            until(lambda: all(state.closed for state in served.engine._queue.waiting))
        assert len(served.engine._queue.waiting) == 2
        served.engine.start()
        assert post(served, {"model": "mood", "prompt": "a", "n": 3, "max_tokens": 2})[0] == 200
        until(lambda: not served.service._usage_by_caller["127.0.0.1"].open_requests)
    finally:
        served.close()


def test_tools_are_ignored_unless_one_must_be_called(served: Served) -> None:
    client: Any = served.client()
    messages = [{"role": "user", "content": "who has a red cup?"}]
    request: dict[str, Any] = {"model": "chat", "messages": messages, "max_tokens": 8}
    plain = client.chat.completions.create(**request)
    for choice in ("auto", "none"):
        answer = client.chat.completions.create(tools=[TOOL], tool_choice=choice, parallel_tool_calls=True, **request)
        assert answer.choices == plain.choices
    assert plain.choices[0].message.tool_calls is None
    for must in ("required", {"type": "function", "function": {"name": "look_up"}}):
        with pytest.raises(openai.BadRequestError, match=r'tool_choice: must be "auto" or "none"'):
            client.chat.completions.create(tools=[TOOL], tool_choice=must, **request)


def test_an_answer_follows_a_json_schema(served: Served) -> None:
    """The model was not trained on JSON, greedy or not, and a stream has the same answer."""
    client: Any = served.client()
    messages = [{"role": "user", "content": "who has a red cup?"}]
    request: dict[str, Any] = {"model": "chat", "messages": messages, "max_tokens": 60}
    request["response_format"] = {"type": "json_schema", "json_schema": {"name": "sale", "schema": SCHEMA}}
    for more in ({}, {"temperature": 1.5, "seed": 1}, {"temperature": 2.0, "seed": 2, "top_p": 0.9}):
        answer = client.chat.completions.create(**request, **more).choices[0]
        assert answer.finish_reason == "stop"
        sale = json.loads(answer.message.content or "")
        assert (set(sale), sale["goods"] in ("cup", "pen"), 1 <= sale["count"] <= 99) == (
            {"goods", "count"},
            True,
            True,
        )
    parts = [part.choices[0].delta.content or "" for part in client.chat.completions.create(stream=True, **request)]
    assert json.loads("".join(parts)) == json.loads(
        client.chat.completions.create(**request).choices[0].message.content or ""
    )
    several = client.chat.completions.create(n=3, temperature=1.5, seed=5, **request).choices
    assert all(json.loads(choice.message.content or "")["count"] for choice in several)
    plain = client.chat.completions.create(**request | {"response_format": {"type": "text"}}).choices[0]
    assert not (plain.message.content or "").startswith("{")
    both = {"model": "mood", "prompt": "a", "max_tokens": 40, "temperature": 2, "seed": 0}
    text = post(served, {**both, "response_format": {"type": "json_object"}})[1]["choices"][0]["text"]
    assert text.startswith("{")


@pytest.mark.parametrize(
    "requested",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "string", "pattern": "("}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "http://127.0.0.1:9/x"}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer", "multipleOf": 99999989}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"anyOf": [{"multipleOf": 7}, {"enum": [1]}]}}},
        {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"enum": ["x" * 20 + str(i) for i in range(900)]}},
        },
        {"type": "xml"},
        "json",
    ],
    ids=lambda requested: str(requested)[:90],
)
def test_a_schema_that_cannot_be_followed_is_refused(served: Served, requested: Any) -> None:
    status, answer = post(served, {"model": "mood", "prompt": "a", "response_format": requested})
    assert status == 400
    assert answer["error"]["message"].startswith("response_format")


def test_a_schema_is_compiled_once_for_all_answers(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, compiled = served.service._calls._grammars[served.engine], list[Any]()
    assert grammars is not None
    compile_ = grammars.grammar

    def counted(schema: Any) -> JsonGrammar:
        compiled.append(schema)
        return compile_(schema)

    monkeypatch.setattr(grammars, "grammar", counted)
    body = {"model": "mood", "prompt": ["a", "b"], "n": 3, "max_tokens": 8, "temperature": 1, "seed": 0}
    status, answer = post(served, {**body, "response_format": {"type": "json_object"}})
    assert status == 200
    assert len(answer["choices"]) == 6
    assert all(choice["text"].startswith("{") for choice in answer["choices"])
    assert len(compiled) == 1


def test_without_the_library_json_is_refused_with_the_remedy(
    base: Callable[..., Base], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert json_grammars(base("llama").tokenizer) is None
    monkeypatch.setattr(served.service._calls, "_grammars", {served.engine: None})
    assert isinstance(served.service._calls, CallReader)
    body = {"model": "mood", "prompt": "a", "response_format": {"type": "json_object"}}
    status, answer = post(served, body)
    assert (status, answer["error"]["param"]) == (400, "response_format")
    assert "needs the extra `json`" in answer["error"]["message"]


def test_a_tokenizer_that_the_library_cannot_read_has_no_grammars() -> None:
    assert json_grammars(make()) is None, "it consists of words, without the bytes of JSON"


def test_the_examples_of_the_page_run(run: Any) -> None:
    """In order, with the names of this run's clients; a chat fills the column that the page's command declares."""
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 4
    served = Served(run)
    served.engine.start()
    printed: list[tuple[Any, ...]] = []
    names: dict[str, Any] = {"print": lambda *values: printed.append(values)}
    changes = {"http://127.0.0.1:8000": served.address, '"shop_house"': '"plain"'}
    changes['{"instruction": "Write the record as one line.", "context":'] = '{"prompt":'
    try:
        for example in examples:
            for old, new in changes.items():
                example = example.replace(old, new)
            exec(example, names)
    finally:
        served.close()
    assert len(printed) == 1 + 1 + 1 + 4 + 1
    assert [values[0] for values in printed[3:7]] == [0, 1, 2, 3]
    assert set(json.loads(printed[-1][0])) == {"goods", "count"}
