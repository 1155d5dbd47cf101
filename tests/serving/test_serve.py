"""The server with OpenAI's client library, over real HTTP on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Completion as OpenaiCompletion

from fedamole.data.layouts import conversation_prompt
from fedamole.data.text_encoder import text_encoder
from fedamole.data.tokens import prompt_ids
from fedamole.evaluation.generation import generate_answers
from fedamole.personal.generate import raw_prompt
from fedamole.personal.saved_models import open_bank, saved_models
from fedamole.serving.connections import listen
from fedamole.serving.engine import InferenceEngine
from fedamole.serving.keys import make_keys, read_keys
from fedamole.serving.models import groups_with_same_spec
from fedamole.serving.requests import Chunk, GenerationRequest
from fedamole.serving.service import MAX_BODY_BYTES

from ..conftest import Runner, heeding_interrupts
from .served import Served, raw, until

NAMES = ("chat", "entail", "mood", "plain")
PROMPT = "Ann has two pens on day 3 ->\n"
LONG = 60


@pytest.fixture(scope="module")
def alone(run: Path) -> Callable[..., str]:
    """What evaluation says that a client's model answers, loaded by itself."""
    models = {model.client: model for model in saved_models(run)}
    bank, loaded = open_bank(tuple(models.values()))
    adapters = dict(zip(models, loaded, strict=True))

    def answer(name: str, prompt: str, tokens: int) -> str:
        bank.load([adapters[name]])
        return generate_answers(bank, [[prompt_ids(raw_prompt(prompt), bank.base.tokenizer)]], tokens, 10_000)[0][0]

    return answer


def tokens_of(answer: OpenaiCompletion) -> int:
    assert answer.usage is not None
    return answer.usage.completion_tokens


def error_of(error: pytest.ExceptionInfo[openai.APIError]) -> dict[str, Any]:
    """The `error` of a refusal."""
    assert isinstance(error.value.body, dict)
    return error.value.body


def test_the_models_are_listed(served: Served) -> None:
    assert tuple(model.id for model in served.client().models.list()) == NAMES
    assert served.client().models.retrieve("mood").id == "mood"


def test_a_completion_is_what_evaluation_generates(served: Served, alone: Callable[..., str]) -> None:
    for name in NAMES:
        answer = served.client().completions.create(model=name, prompt=PROMPT, max_tokens=LONG)
        assert answer.choices[0].text == alone(name, PROMPT, LONG)
        assert answer.model == name
    assert len({alone(name, PROMPT, LONG) for name in NAMES}) > 1, "the models must differ for this to say anything"


def test_what_an_answer_cost_and_why_it_ended(served: Served, alone: Callable[..., str]) -> None:
    tokenizer = served.engine.bank.base.tokenizer
    client, prompt = served.client(), len(tokenizer(PROMPT)["input_ids"])
    cut = client.completions.create(model="plain", prompt=PROMPT, max_tokens=2)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage is not None
    assert (cut.usage.prompt_tokens, cut.usage.completion_tokens, cut.usage.total_tokens) == (prompt, 2, prompt + 2)
    default = client.completions.create(model="plain", prompt=PROMPT)
    assert default.choices[0].text == alone("plain", PROMPT, 16)
    full_answer = alone("plain", PROMPT, LONG)
    stop = full_answer[len(full_answer) // 2 :][:3]
    stopped = client.completions.create(model="plain", prompt=PROMPT, max_tokens=LONG, stop=[stop, "never said"])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == full_answer[: full_answer.index(stop)].strip()


def test_a_chat_is_laid_out_as_in_training(served: Served, alone: Callable[..., str]) -> None:
    response = [("system", "Be short."), ("user", "day 3: who has two pens? Ann has.")]
    messages: list[Any] = [{"role": role, "content": content} for role, content in response]
    answer = served.client().chat.completions.create(model="chat", messages=messages, max_completion_tokens=20)
    assert answer.choices[0].message.content == alone("chat", conversation_prompt(response), 20)
    assert answer.choices[0].message.role == "assistant"
    halves = [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}]
    parts: list[Any] = [{"role": "developer", "content": halves}]
    again = served.client().chat.completions.create(model="chat", messages=parts + messages[1:], max_tokens=20)
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_special_tokens_in_a_request_are_text(served: Served) -> None:
    """In a prompt, a row and a message: `<end>` is read letter by letter and ends nothing."""
    tokenizer, client = served.engine.bank.base.tokenizer, served.client()
    text = "a <end> b <pad>"
    request: dict[str, Any] = {"model": "entail", "max_tokens": 1}
    response: list[Any] = [{"role": "user", "content": text}]
    results = {
        text: client.completions.create(prompt=text, **request),
        f"{text} Then {text}\n": client.completions.create(
            prompt="", extra_body={"row": {"premise": text, "hypothesis": text}}, **request
        ),
        conversation_prompt([("user", text)]): client.chat.completions.create(messages=response, **request),
    }
    for prompt, answer in results.items():
        parsed, (as_text,) = tokenizer(prompt)["input_ids"], text_encoder(tokenizer).encode([prompt])
        assert {tokenizer.eos_token_id, tokenizer.pad_token_id} < set(parsed)
        assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(as_text)
        assert answer.usage.prompt_tokens == len(as_text) > len(parsed)


def test_a_row_is_laid_out_by_its_clients_template(served: Served, alone: Callable[..., str]) -> None:
    def answer(name: str, **row: str) -> str:
        response = served.client().completions.create(model=name, prompt="", max_tokens=20, extra_body={"row": row})
        return response.choices[0].text

    assert answer("entail", premise="Ann buys a pen.", hypothesis="Ann has it.") == alone(
        "entail", "Ann buys a pen. Then Ann has it.\n", 20
    )
    text = "Text: {}\nWhich class does the text belong to?\nClass:\n".format("an old map is good")
    assert answer("mood", text="an old map is good") == alone("mood", text, 20)
    with pytest.raises(openai.BadRequestError) as error:
        answer("entail", premise="Ann buys a pen.")
    assert error_of(error)["param"] == "row"
    assert "hypothesis" in error_of(error)["message"]


def test_pieces_join_to_the_same_text(served: Served, alone: Callable[..., str]) -> None:
    client: Any = served.client()
    request = {"model": "entail", "max_tokens": LONG, "stream": True}
    chunks = list(client.completions.create(prompt=PROMPT, **request))
    assert "".join(chunk.choices[0].text for chunk in chunks) == alone("entail", PROMPT, LONG)
    assert sum(bool(chunk.choices[0].text) for chunk in chunks) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    messages = [{"role": "user", "content": "who has a red cup?"}]
    chat = list(client.chat.completions.create(messages=messages, stream_options={"include_usage": True}, **request))
    response = "".join(chunk.choices[0].delta.content or "" for chunk in chat if chunk.choices)
    assert response == alone("entail", conversation_prompt([("user", "who has a red cup?")]), LONG)
    assert chat[0].choices[0].delta.role == "assistant"
    assert (chat[-1].choices, chat[-1].usage.completion_tokens) == ([], LONG)
    assert len({chunk.id for chunk in chat}) == 1


def test_clients_at_once_are_batched_and_each_gets_its_own_models_answer(run: Path, alone: Callable[..., str]) -> None:
    """The engine begins when all wait, so whether they meet is no matter of time."""
    served = Served(run)
    request = [(name, f"{prompt} ->\n") for name in NAMES for prompt in ("Bob has a blue hat", "Eve has an old map")]
    try:
        with ThreadPoolExecutor(len(request)) as pool:
            answers = [
                pool.submit(served.client().completions.create, model=name, prompt=prompt, max_tokens=LONG)
                for name, prompt in request
            ]
            until(lambda: served.engine.waiting == len(request))
            served.engine.start()
            for (name, prompt), answer in zip(request, answers, strict=True):
                assert answer.result().choices[0].text == alone(name, prompt, LONG)
    finally:
        served.close()
    assert served.engine.batch_clients[4] > 5
    assert sum(served.engine.batch_clients.values()) <= LONG


@pytest.mark.parametrize("method", ["hetlora", "fedlease"])
def test_other_methods_models_are_served_too(method: str, runs: Runner) -> None:
    """LoRAs of several ranks, and experts that a learned mixer weighs."""
    models = saved_models(runs(method, "federation.rounds=1"))
    bank, adapters = open_bank(models)
    ((indices, padded),) = groups_with_same_spec(adapters)
    assert indices == list(range(len(models)))
    engine = InferenceEngine(bank, padded)
    texts: list[list[str]] = [[] for _ in models]

    def append(text: list[str], chunk: Chunk) -> None:
        text.append(chunk.text)

    for client, text in enumerate(texts):
        engine.submit(GenerationRequest(client, (5, 6, 7), 20), partial(append, text))
    while engine.step():
        pass
    for adapter, text in zip(adapters, texts, strict=True):
        bank.load([adapter])
        assert generate_answers(bank, [[(5, 6, 7)]], 20, 1000)[0] == text


def test_a_key_opens_its_own_clients_model_alone(run: Path, tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys.json", NAMES)
    served = Served(run, read_keys(tmp_path / "keys.json"))
    served.engine.start()
    try:
        mine = served.client(keys["mood"])
        assert [model.id for model in mine.models.list()] == ["mood"]
        assert tokens_of(mine.completions.create(model="mood", prompt="a", max_tokens=2)) == 2
        for name in ("plain", "nobody"):
            with pytest.raises(openai.NotFoundError) as error:
                mine.completions.create(model=name, prompt="a", max_tokens=2)
            assert error_of(error)["code"] == "model_not_found"
            assert name not in error_of(error)["message"]
        with pytest.raises(openai.NotFoundError):
            mine.models.retrieve("plain")
        for wrong in ("none", keys["mood"][:-1], json.loads((tmp_path / "keys.json").read_text())["mood"]):
            with pytest.raises(openai.AuthenticationError):
                served.client(wrong).models.list()
            with pytest.raises(openai.AuthenticationError):
                served.client(wrong).completions.create(model="mood", prompt="a")
        assert raw(served, "GET", "/health")[0] == 200
    finally:
        served.close()


REFUSED: list[tuple[dict[str, Any], int, str | None]] = [
    ({"n": 65}, 400, "n"),
    ({"n": 33, "prompt": ["a", "b"]}, 400, "prompt"),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"echo": 2}, 400, "echo"),
    ({"temperature": 3}, 400, "temperature"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"stop": ""}, 400, "stop"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": ["a", ""]}, 400, "prompt"),
    ({"prompt": [5, 10**6]}, 400, "prompt"),
    ({"prompt": [-1, 5]}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": "word " * 200}, 400, None),
    ({"no_such_field": 1}, 400, "no_such_field"),
    ({"model": "nobody"}, 404, "model"),
]


@pytest.mark.parametrize(("more", "status", "param"), REFUSED, ids=lambda case: str(case)[:24])
def test_what_is_not_done_here_is_refused_in_openais_shape(
    served: Served, more: dict[str, Any], status: int, param: str | None
) -> None:
    body = json.dumps({"model": "mood", "prompt": "a", "max_tokens": 2, **more}).encode()
    result, answer = raw(served, "POST", "/v1/completions", body)
    assert result == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert param is None or answer["error"]["param"] == param


def test_fields_that_ask_for_nothing_are_taken(served: Served) -> None:
    usual: dict[str, Any] = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me"}
    usual["seed"] = 3
    client = served.client()
    plain = client.completions.create(model="mood", prompt=PROMPT, max_tokens=4)
    same = client.completions.create(model="mood", prompt=PROMPT, max_tokens=4, temperature=0, top_p=1, **usual)
    assert same.choices == plain.choices


def test_a_seed_draws_the_same_answer_again(served: Served) -> None:
    request: dict[str, Any] = {"model": "mood", "prompt": PROMPT, "max_tokens": 12, "temperature": 1.5}
    texts = [served.client().completions.create(seed=seed, **request).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_refusals_before_a_body_is_read(served: Served) -> None:
    assert raw(served, "POST", "/v1/completions", b"{")[0] == 400
    assert raw(served, "POST", "/v1/completions", b"[]")[0] == 400
    assert raw(served, "GET", "/v1/nothing")[0] == 404
    assert raw(served, "POST", "/v1/completions", b"{}", Content_Type="text/plain")[0] == 415
    large = b'{"model": "mood", "prompt": "' + b"a" * MAX_BODY_BYTES + b'"}'
    assert raw(served, "POST", "/v1/completions", large)[0] == 413
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example"):
        assert raw(served, "GET", "/v1/models", Host=host)[0] == 403
    for host in ("localhost", "127.0.0.1:8000", "[::1]:80"):
        assert raw(served, "GET", "/v1/models", Host=host)[0] == 200


def test_too_many_requests_of_one_client_and_a_server_that_stops(run: Path) -> None:
    """The engine is not started, so requests wait; when the server stops, they end with an error."""
    served = Served(run, max_waiting=1)
    request: dict[str, Any] = {"model": "mood", "prompt": "a", "max_tokens": 2}
    with ThreadPoolExecutor(2) as pool:
        waits = pool.submit(lambda: served.client().completions.create(**request))
        until(lambda: served.engine.waiting == 1)
        with pytest.raises(openai.RateLimitError) as error:
            served.client().completions.create(**request)
        assert error_of(error)["code"] == "rate_limit_exceeded"
        request = {**request, "model": "plain", "stream": True}
        streams = pool.submit(lambda: list(served.client().completions.create(**request)))
        until(lambda: served.engine.waiting == 2)
        served.close()
        with pytest.raises(openai.InternalServerError, match="stopping") as stopped:
            waits.result()
        assert stopped.value.status_code == 503
        with pytest.raises(openai.APIError, match="stopping"):
            streams.result()


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_disconnects_frees_its_row(run: Path, stream: bool) -> None:
    """The batch has one row; the request in it would never end, but its caller disconnects."""
    served = Served(run, max_rows=1, max_answer_tokens=10**9)
    bank = served.engine.bank
    bank.base.max_positions = 10**9  # the base's own positions are rotations, which go on
    served.engine.start()
    try:
        request: dict[str, Any] = {"model": "mood", "prompt": PROMPT, "max_tokens": 10**6, "stream": stream}
        body = json.dumps(request).encode()
        with socket.create_connection(served.listening.getsockname()) as line:
            line.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            until(lambda: served.engine.running == 1)
        until(lambda: served.engine.running == 0)
        answer = served.client().completions.create(model="plain", prompt="a", max_tokens=2)
        assert tokens_of(answer) == 2
    finally:
        served.close()


@pytest.fixture(scope="module")
def command(run: Path) -> Callable[..., subprocess.Popen[str]]:
    """The command itself, as a process."""

    def start(*options: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "fedamole", "serve", str(run), *options]
        return subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding_interrupts
        )

    return start


def test_the_command_serves_until_it_is_interrupted_and_says_nothing_of_texts(
    command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    keys = make_keys(tmp_path / "keys.json", ("mood",))
    process = command("--port", "0", "--client", "mood", "--client", "plain", "--keys", str(tmp_path / "keys.json"))
    assert process.stderr is not None
    try:
        assert process.stderr.readline().startswith("reads files outside "), "the base lies outside the run's folder"
        first = process.stderr.readline()
        assert first.startswith("2 models on http://127.0.0.1:")
        client = openai.OpenAI(base_url=first.split()[3].rstrip(":"), api_key=keys["mood"], max_retries=5)
        secret = "a word nobody says: xyzzy"
        answer = client.completions.create(model="mood", prompt=secret, max_tokens=4)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="mood", prompt=secret * 100)
        process.send_signal(signal.SIGINT)
        response = first + "".join(process.communicate(timeout=30))
    finally:
        process.kill()
    assert process.returncode == 0
    assert response.endswith("stopped\n")
    for hidden in ("xyzzy", answer.choices[0].text, keys["mood"], "Traceback"):
        assert hidden not in response


def test_strangers_need_keys_and_keys_a_file_of_ones_own(
    fedamole: Callable[..., Any], run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    refused = fedamole("serve", run, "--host", "0.0.0.0")
    assert refused.code == 2
    assert "--make-keys" in refused.err
    result = fedamole("serve", run, "--make-keys", file, "--client", "mood")
    name, key = result.out.split()
    assert name == "mood"
    assert file.stat().st_mode & 0o777 == 0o600
    assert key not in file.read_text()
    more = fedamole("serve", run, "--make-keys", file)
    assert {line.split()[0] for line in more.out.splitlines()} == {"chat", "entail", "plain"}
    known = read_keys(file)
    assert known.owner(key) == "mood"
    assert known.owner(key + " ") is None
    os.chmod(file, 0o640)
    assert "chmod 600" in fedamole("serve", run, "--keys", file).err
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        busy = fedamole("serve", run, "--port", str(taken.getsockname()[1]))
    assert busy.code == 2
    assert "--port" in busy.err
