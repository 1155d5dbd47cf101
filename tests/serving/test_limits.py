"""Limits over real HTTP: one caller's requests cannot block the server for others."""

import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from h11._connection import DEFAULT_MAX_INCOMPLETE_EVENT_SIZE
from pydantic import ValidationError

from fedamole.cli import serve as commands
from fedamole.data.filling import text_of
from fedamole.serving import calls, prompts, protocol, quota, server, service
from fedamole.serving.connections import HttpConnection
from fedamole.serving.engine import MAX_FAILED_STEPS, InferenceEngine
from fedamole.serving.keys import make_keys, read_keys
from fedamole.serving.protocol import (
    MAX_STOP_CHARS,
    RANGES,
    ChatRequest,
    CompletionRequest,
    RefusedError,
    parse_body,
)
from fedamole.serving.quota import TokenBucket
from fedamole.serving.responses import ResponseFormat
from fedamole.serving.scheduling import SLICE, Limits
from fedamole.serving.served_models import ServedModel
from fedamole.serving.server import HttpServer
from fedamole.serving.service import Service

from .served import ENDLESS, REQUEST, Served, post, raw, read_to_end, send, serving, until

NAMES = ("chat", "entail", "mood", "plain")
OUT_OF_RANGE: list[tuple[str, str]] = [
    ("max_tokens", "1000001"),
    ("max_tokens", "0"),
    ("max_tokens", "-5"),
    ("max_tokens", "true"),
    ("max_tokens", '"7"'),
    ("max_tokens", "1.5"),
    ("max_tokens", "1e308"),
    ("temperature", "3e-38"),
    ("temperature", "1e-320"),
    ("temperature", "0.0009"),
    ("temperature", "2.1"),
    ("temperature", "-1"),
    ("temperature", "NaN"),
    ("temperature", "1e999"),
    ("temperature", "true"),
    ("top_p", "0"),
    ("top_p", "1.01"),
    ("top_p", "NaN"),
    ("top_p", "-1"),
    ("seed", "9223372036854775808"),
    ("seed", "-9223372036854775809"),
    ("seed", "1" + "0" * 40),
    ("seed", "1.5"),
    ("n", "0"),
    ("n", "65"),
    ("n", "true"),
    ("top_k", "-2"),
    ("top_k", "1.5"),
    ("min_p", "1.1"),
    ("min_p", "NaN"),
    ("repetition_penalty", "0"),
    ("repetition_penalty", "11"),
    ("logprobs", "21"),
    ("logprobs", "true"),
    ("prompt", "[-1]"),
    ("prompt", '["a", 1]'),
    ("prompt", "[2147483648]"),
    ("prompt", "[[1], 2]"),
    ("stop", '""'),
    ("stop", '["a", ""]'),
    ("stop", '["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q"]'),
    ("stop", "[1, 2]"),
    ("stop", json.dumps("x" * (MAX_STOP_CHARS + 1))),
    ("stop", json.dumps(["x" * 900_000])),
]


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE, ids=lambda value: value[:24])
def test_a_value_out_of_range_is_refused_with_the_range(served: Served, field: str, value: str) -> None:
    rest = "".join(f', "{name}": {json.dumps(value_)}' for name, value_ in REQUEST.items() if name != field)
    status, answer = post(served, f'{{"{field}": {value}{rest}}}'.encode())
    assert (status, answer["error"]["param"]) == (400, field)
    assert answer["error"]["message"] == f"{field}: must be {RANGES[field]}"


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0.001},
        {"temperature": 2},
        {"top_p": 1e-320, "temperature": 1},
        {"seed": 2**63 - 1},
        {"seed": -(2**63), "temperature": 1.0},
        {"max_tokens": 1_000_000, "stop": ["x" * MAX_STOP_CHARS] * 16},
        {"frequency_penalty": 0, "presence_penalty": 0.0},
    ],
    ids=lambda more: str(more)[:40],
)
def test_values_at_the_ends_of_the_ranges_are_taken(served: Served, more: dict[str, Any]) -> None:
    assert post(served, {**REQUEST, **more})[0] == 200


@pytest.mark.parametrize("penalty", ["frequency_penalty", "presence_penalty"])
def test_penalties_are_refused_with_what_they_must_be(served: Served, penalty: str) -> None:
    assert post(served, {**REQUEST, penalty: 0.1})[1]["error"]["message"] == f"{penalty}: must be 0, or left out"


BODIES: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "half": (b"{", 400),
    "null": (b"null", 400),
    "deep": (b"[" * 200_000, 400),
    "deep in a field": (b'{"model":"mood","prompt":"a","metadata":' + b"[" * 10**5 + b"]" * 10**5 + b"}", 400),
    "giant number": (b'{"model":"mood","prompt":"a","max_tokens":' + b"9" * 10**5 + b"}", 400),
    "giant number read over": (b'{"model":"mood","prompt":"a","metadata":' + b"9" * 10**5 + b"}", 400),
    "giant seed": (b'{"model":"mood","prompt":"a","seed":' + b"9" * 4000 + b"}", 400),
    "half a million wrong prompts": (b'{"model":"mood","prompt":[' + b"1," * 500_000 + b"1]}", 400),
    "half a million wrong stops": (b'{"model":"mood","prompt":"a","stop":[' + b"1," * 500_000 + b"1]}", 400),
    "many columns": (json.dumps({"model": "mood", "row": {f"{i:x}": [] for i in range(80_000)}}).encode(), 400),
    "a long column": (json.dumps({"model": "mood", "row": {"k" * 900_000: []}}).encode(), 400),
    "a long unknown field": (json.dumps({**REQUEST, "evil" * 100_000: 1}).encode(), 400),
    "escapes": (json.dumps({"model": "mood", "row": {"\x1b[31m" * 1000: "x"}}).encode(), 400),
    "no characters": (b'{"model":"\xff\xfe","prompt":"a"}', 400),
    "half a character": (b'{"model":"mood","prompt":"\\ud800"}', 400),
    "long prompt": (json.dumps({**REQUEST, "prompt": "a " * 400_000}).encode(), 400),
    "other model": (b'{"model":"../mood","prompt":"a"}', 404),
    "too large": (b'{"model":"mood","prompt":"' + b"a" * 2**20 + b'"}', 413),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_was_made_to_harm_is_one_short_error(
    served: Served, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    status, answer = post(served, BODIES[name][0])
    assert status == BODIES[name][1]
    assert len(answer["error"]["message"]) <= 300
    assert len(answer["error"]["param"] or "") <= 64
    assert not caplog.records
    assert post(served, REQUEST)[0] == 200


def test_a_large_body_does_not_block_the_event_loop(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of numbers beside a row takes seconds to parse, so it is parsed in another thread."""
    threads: list[threading.Thread] = []

    def parse(kind: type[CompletionRequest], content: bytes) -> CompletionRequest:
        threads.append(threading.current_thread())
        return parse_body(kind, content)

    monkeypatch.setattr(calls, "parse_body", parse)
    assert post(served, REQUEST)[0] == 200
    assert len(threads) == 1
    assert served.thread not in threads


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_made_into_tokens(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = prompts.MAX_CHARS_PER_POSITION * served.engine.bank.base.max_positions
    monkeypatch.setattr(prompts, "prompt_ids", lambda *_: pytest.fail("it was made into tokens"))
    answer = post(served, {**REQUEST, "prompt": "a" * (most + 1)})[1]["error"]
    assert (answer["code"], f"at most {most}" in answer["message"]) == ("context_length_exceeded", True)


def test_a_wrong_host_is_refused_whatever_it_looks_like(served: Served) -> None:
    for host in ("127.0.0.1.evil.example", "evil.example#127.0.0.1", "[::1", "[127.0.0.1]", "127.1", ""):
        assert raw(served, "GET", "/v1/models", Host=host)[0] == 403


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    return make_keys(tmp_path / "keys.json", NAMES)


def test_one_keys_many_long_requests_do_not_delay_another_keys_short_one(
    run: Path, keys: dict[str, str], tmp_path: Path
) -> None:
    """The long requests never end by themselves; those beyond the limit get a 429 with Retry-After."""
    with serving(run, read_keys(tmp_path / "keys.json"), max_rows=2, max_waiting=3) as served:
        long_requests = [send(served, ENDLESS, keys["mood"]) for _ in range(2)]
        until(lambda: served.engine.running == 2)
        long_requests += [send(served, ENDLESS, keys["mood"]) for _ in range(3)]
        until(lambda: (served.engine.running, served.engine.waiting) == (2, 3))
        excess = send(served, ENDLESS, keys["mood"])
        response = excess.recv(65536)
        assert response.startswith(b"HTTP/1.1 429")
        assert b"retry-after: 1\r\n" in response.lower()
        short = {**REQUEST, "model": "plain"}
        assert post(served, short, Authorization=f"Bearer {keys['plain']}")[0] == 200
        until(lambda: served.engine.running == 2)
        for connection in (*long_requests, excess):
            connection.close()
        until(lambda: (served.engine.running, served.engine.waiting) == (0, 0))
        assert post(served, REQUEST, Authorization=f"Bearer {keys['mood']}")[0] == 200


def test_a_caller_who_hangs_up_while_waiting_gives_its_place_to_the_next(run: Path) -> None:
    """The engine has not begun, so nothing but the hang-up can make room."""
    served = Served(run, max_waiting=1)
    try:
        first = send(served, REQUEST)
        until(lambda: served.engine.waiting == 1)
        assert post(served, REQUEST)[0] == 429
        first.close()
        time.sleep(0.3)
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(post, served, REQUEST)
            until(lambda: sum(not state.closed for state in served.engine._queue.waiting) == 1)
            served.engine.start()
            assert second.result()[0] == 200
    finally:
        served.close()


def test_requests_that_are_open_are_limited_whatever_state_they_are_in(run: Path) -> None:
    """Four models, one place and one to wait in: eight at once, here all without a whole body; then one hangs up."""
    with serving(run, max_rows=1, max_waiting=1) as served:
        lines = []
        for _ in range(8):
            line = socket.create_connection(served.listening.getsockname(), timeout=20)
            line.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 9\r\n\r\n{"
            )
            lines.append(line)
        until(lambda: post(served, REQUEST)[0] == 429)
        lines[0].close()
        until(lambda: post(served, REQUEST)[0] == 200)
        for line in lines:
            line.close()


def test_bodies_of_one_caller_are_bounded_together(run: Path, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "MAX_BODY_BYTES_PER_CALLER", 1000)
    status, answer = post(served, {**REQUEST, "prompt": "a" * 1001})
    assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
    for _ in range(8):
        assert post(served, {**REQUEST, "prompt": "a " * 100})[0] == 200, "what was held is held no more"


def test_a_store_of_tokens_fills_evenly() -> None:
    now = 0.0
    bucket = TokenBucket(60, lambda: now)
    bucket.take(50)
    with pytest.raises(RefusedError) as refused:
        bucket.take(20)
    assert (refused.value.status, refused.value.retry) == (429, 10)
    now = 10.0
    bucket.take(20)
    bucket.give_back(15)
    bucket.take(15)
    now = 10_000.0
    bucket.take(60)
    with pytest.raises(RefusedError) as never:
        bucket.take(61)
    assert never.value.status == 400


def test_tokens_per_minute_are_counted_for_each_key_and_given_back_where_unused(
    run: Path, keys: dict[str, str], tmp_path: Path
) -> None:
    with serving(run, read_keys(tmp_path / "keys.json"), 100) as served:
        mine = {"Authorization": f"Bearer {keys['mood']}"}
        assert post(served, {**REQUEST, "max_tokens": 100}, **mine)[1]["error"]["code"] == "too_many_tokens"
        line = send(served, {**REQUEST, "max_tokens": 90}, keys["mood"])
        assert b" 200 " in line.recv(100)
        line.close()
        response = send(served, {**REQUEST, "max_tokens": 90}, keys["mood"]).recv(65536)
        assert b" 429 " in response
        assert 30 < int(response.lower().partition(b"retry-after: ")[2].split()[0]) <= 60
        theirs = {"Authorization": f"Bearer {keys['plain']}"}
        assert post(served, {**REQUEST, "model": "plain", "max_tokens": 90}, **theirs)[0] == 200
        hangs_up = send(served, {**ENDLESS, "model": "chat", "max_tokens": 90, "stream": True}, keys["chat"])
        assert b" 200 " in hangs_up.recv(100)
        hangs_up.close()
        theirs = {"Authorization": f"Bearer {keys['chat']}"}
        since = time.monotonic()
        until(lambda: post(served, {**REQUEST, "model": "chat", "max_tokens": 50}, **theirs)[0] == 200)
        assert time.monotonic() - since < 15, "by filling up it would have taken 25 seconds"


def test_two_bodies_of_one_caller_are_made_into_tokens_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most, right, go = 0, 0, prompts.read_prompts, threading.Event()

    def slow(body: Any, model: ServedModel) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        go.wait(0.3)
        inside -= 1
        return right(body, model)

    monkeypatch.setattr(calls, "read_prompts", slow)
    with ThreadPoolExecutor(6) as pool:
        assert {status for status, _ in pool.map(lambda _: post(served, REQUEST), range(6))} == {200}
    assert most == quota.MAX_TOKENISING_PER_CALLER == 2


def test_the_page_states_the_limits_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    for row in (
        f"| `temperature` | 0 (the most probable token), or {protocol.MIN_TEMPERATURE} to 2.",
        f"a whole number from 1 to {protocol.LARGEST_MAX_TOKENS:,}.",
        f"| `stop` | at most {protocol.MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters each |",
        f"| `row` | at most {protocol.MAX_COLUMNS} columns",
        f"| `n` | a whole number from 1 to {protocol.MAX_ANSWERS}. `n` times the number of prompts is at most "
        f"{protocol.MAX_ANSWERS}, and",
        f"| `repetition_penalty` | a number from {protocol.MIN_PENALTY} to {protocol.MAX_PENALTY:g};",
        f"| `logprobs`, `top_logprobs` | a whole number from 0 to {protocol.MAX_LOGPROBS} |",
        f"at most {prompts.MAX_CHARS_PER_POSITION} characters for each position of the base",
        f"| request bodies that are being received | {quota.MAX_BODY_BYTES_PER_CALLER >> 20} MiB together | 429 |",
        f"| request bodies that are being tokenised | {quota.MAX_TOKENISING_PER_CALLER} at once | they wait |",
        f"| head of a request | {HttpConnection.head_seconds:.0f} seconds",
        f"| size of an incomplete head | {DEFAULT_MAX_INCOMPLETE_EVENT_SIZE >> 10} KiB | 400 |",
        f"| body of a request | {service.BODY_TIMEOUT:.0f} seconds; {service.MAX_BODY_BYTES >> 20} MiB | 408; 413 |",
        f"| idle time between two requests | {server.KEEP_ALIVE} seconds |",
        f"reads nothing of its answer | {HttpConnection.stall_seconds:.0f} seconds |",
        f"| connections without a request in progress | {HttpConnection.max_idle} |",
        f"| waiting requests, for each model | `--waiting` ({Limits.max_waiting}) | 429 |",
        f"any client's request that has generated {SLICE} tokens since it joined",
    ):
        assert row in text, row
    assert MAX_FAILED_STEPS == 3
    assert "a request that was part of three failed steps fails" in text


def test_an_error_inside_one_request_is_one_line_and_a_500_for_it_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = prompts.read_prompts

    def wrong(body: Any, model: ServedModel) -> Any:
        if body.prompt == "a":
            raise ValueError(f"quoting {body.prompt} and a secret")
        return right(body, model)

    monkeypatch.setattr(calls, "read_prompts", wrong)
    status, answer = post(served, REQUEST)
    assert (status, answer["error"]["message"]) == (500, "the server failed on this request")
    until(lambda: caplog.records)  # the answer is sent first
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert caplog.messages == [f"a request failed: ValueError in test_limits.py:{wrong.__code__.co_firstlineno + 2}"]
    assert post(served, {**REQUEST, "prompt": "b"})[0] == 200


def test_an_error_in_a_stream_ends_that_stream(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ResponseFormat, "last_events", lambda *_: 1 / 0)
        with send(served, {**REQUEST, "stream": True}) as line:
            assert b"[DONE]" not in read_to_end(line)
    until(lambda: caplog.records)
    assert post(served, REQUEST)[0] == 200
    assert len(caplog.records) == 1


def test_the_commands_limits_reach_the_engine(fedamole: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[InferenceEngine, Service]] = []
    right = HttpServer.__init__

    def noted(self: HttpServer, service: Service, *more: Any) -> None:
        right(self, service, *more)
        seen.append((self.engines[0], service))

    monkeypatch.setattr(HttpServer, "__init__", noted)
    monkeypatch.setattr(HttpServer, "run", lambda self, doors: (doors[0].close(), self.engines[0].stop()))
    fedamole("serve", run, "--port", "0", "--each", "3", "--per-minute", "500", "--waiting", "7", "--rows", "5")
    engine, api = seen[0]
    limits = engine.limits
    assert (limits.max_rows_per_client, limits.max_waiting, limits.max_rows, api.settings.per_minute) == (3, 7, 5, 500)


def test_names_from_elsewhere_are_printed_safely(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands._print_new_keys(tmp_path / "keys.json", ("evil\x1b[31m",))
    assert capsys.readouterr().out.startswith("evil\\x1b[31m fedamole-")


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": [1.5] * 10_000},
        {"prompt": [[1.5] * 10_000]},
        {"stop": [1] * 10_000},
        {"row": {f"{i}": [] for i in range(10_000)}},
        {"messages": [1] * 10_000},
        {"messages": [{"role": "user", "content": [{}] * 10_000}]},
    ],
    ids=lambda more: str(more)[:24],
)
def test_a_body_that_is_wrong_ten_thousand_times_is_not_ten_thousand_errors(more: dict[str, Any]) -> None:
    """Otherwise a body of a million bytes blocks the server for seconds."""
    kind = ChatRequest if "messages" in more else CompletionRequest
    with pytest.raises(RefusedError) as refused:
        parse_body(kind, json.dumps({"model": "mood", **more}).encode())
    wrong = refused.value.__context__
    assert isinstance(wrong, ValidationError)
    assert wrong.error_count() < 10


def test_numbers_of_a_row_stay_as_they_are_written() -> None:
    row = b'{"a": 1, "b": 12345678901234567890, "c": 1.10, "d": true, "e": "1.10", "f": -0.0, "g": 1E5}'
    body = parse_body(CompletionRequest, b'{"model": "m", "temperature": 0.50, "row": ' + row + b"}")
    assert body.temperature == 0.5
    assert [text_of(value, name, "row") for name, value in body.columns.items()] == [
        "1",
        "12345678901234567890",
        "1.10",
        "true",
        "1.10",
        "-0.0",
        "1E5",
    ]


def test_a_number_reaches_the_template_unchanged(served: Served) -> None:
    rows = (
        '{"premise": 1.10, "hypothesis": 7}',
        '{"premise": "1.10", "hypothesis": "7"}',
        '{"premise": 1.1, "hypothesis": 7}',
    )
    answers = [post(served, f'{{"model": "entail", "max_tokens": 4, "row": {row}}}'.encode())[1] for row in rows]
    number, text, shorter = ([answer["usage"]["prompt_tokens"], answer["choices"][0]["text"]] for answer in answers)
    assert number == text
    assert number[0] > shorter[0]


@pytest.mark.parametrize(
    "row",
    [
        '{"a": "1", "a": "2"}',
        '{"a": [1.10]}',
        '{"a": {"literal": "1"}}',
        '{"a": ' + 9 * "[",
    ],
)
def test_a_row_of_another_form_is_refused(row: str) -> None:
    with pytest.raises(RefusedError) as refused:
        parse_body(CompletionRequest, f'{{"model": "m", "row": {row}}}'.encode())
    assert refused.value.status == 400
    assert "1.10" not in str(refused.value)
