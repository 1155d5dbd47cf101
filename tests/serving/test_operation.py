"""What an operator uses: several runs, metrics, the request log, CORS, the API's description, and a slow stop."""

import contextlib
import json
import logging
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from fedamole.cli.serve import _select_models
from fedamole.errors import ConfigError, RunError
from fedamole.personal.saved_models import base_settings_of, saved_models
from fedamole.serving.connections import listen
from fedamole.serving.keys import make_keys, read_keys
from fedamole.serving.metrics import CallRecord, Metrics
from fedamole.serving.models import open_models, run_names
from fedamole.serving.prompts import read_prompts
from fedamole.serving.protocol import ChatRequest, CompletionRequest, parse_body
from fedamole.serving.scheduling import Limits
from fedamole.serving.served_models import METRICS_OWNER, ServiceSettings
from fedamole.serving.server import HttpServer
from fedamole.serving.service import Service

from ..conftest import Runner
from .served import ENDLESS, REQUEST, Served, post, raw, read_to_end, send, serving, until

CLIENTS = ("chat", "entail", "mood", "plain")


def fetch(served: Served, path: str, method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers of a response."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(served.address + path, method=method, headers=named)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode(), {key.lower(): value for key, value in answer.headers.items()}
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), {key.lower(): value for key, value in error.headers.items()}


@contextlib.contextmanager
def started(service: Service) -> Iterator[tuple[HttpServer, str]]:
    """A server in a thread, and its address."""
    server, listening = HttpServer(service), listen("127.0.0.1", 0)
    for engine in server.engines:
        engine.start()
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    until(lambda: server.started)
    try:
        yield server, "http://{}:{}".format(*listening.getsockname())
    finally:
        server.should_exit = True
        thread.join()


def test_models_of_several_runs_share_what_they_can(run: Path, runs: Runner) -> None:
    """Mixtures, and LoRAs of two methods, all on one base: two engines, each with a base."""
    paths = [run, runs("fedit", "federation.rounds=1"), runs("hetlora", "federation.rounds=1")]
    saved = _select_models(paths, None, None)
    names = [name for name, _ in saved]
    assert [name.rpartition("/")[2] for name in names] == [*CLIENTS] * 3
    assert len(set(names)) == 12
    served = open_models(saved, Limits())
    engines = list(dict.fromkeys(model.engine for model in served))
    assert [sum(model.engine is engine for model in served) for engine in engines] == [4, 8]
    assert [model.index for model in served] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
    assert len({id(engine.bank.base.model) for engine in engines}) == 2


def test_a_model_of_several_runs_is_named_by_run_and_client(run: Path, runs: Runner) -> None:
    other = runs("fedit", "federation.rounds=1")
    models = open_models(_select_models([run, other], None, None), Limits())
    with started(Service(models, ServiceSettings())) as (server, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0, timeout=30)
        names = [model.id for model in client.models.list()]
        assert names == [model.name for model in models]
        assert client.models.retrieve(names[5]).id == names[5]
        answers = {name: client.completions.create(model=name, prompt="Ann has", max_tokens=20) for name in names}
        assert {answer.model for answer in answers.values()} == set(names)
        texts = {name: answer.choices[0].text for name, answer in answers.items()}
        assert texts[names[3]] != texts[names[7]], "the same client in two runs"
        assert len(server.engines) == 2
    other_server = Served(other)
    other_server.engine.start()
    try:
        alone = other_server.client().completions.create(model="plain", prompt="Ann has", max_tokens=20).choices[0].text
        assert texts[names[7]] == alone
    finally:
        other_server.close()


def test_runs_have_short_names_that_differ(tmp_path: Path) -> None:
    assert run_names([tmp_path / "a" / "fedit", tmp_path / "a" / "ditto"]) == ["fedit", "ditto"]
    assert run_names([tmp_path / "a" / "fedit", tmp_path / "b" / "fedit"]) == ["a/fedit", "b/fedit"]
    with pytest.raises(ConfigError, match="given twice"):
        run_names([tmp_path, tmp_path / "." / "x" / ".."])


def test_clients_of_several_runs_are_selected_by_both_names(run: Path, runs: Runner) -> None:
    paths = [run, runs("fedit", "federation.rounds=1")]
    first, second = run_names(paths)
    selected = _select_models(paths, [f"{second}/mood", f"{first}/plain"], None)
    assert [name for name, _ in selected] == [f"{first}/plain", f"{second}/mood"]
    with pytest.raises(RunError, match="there is no such model"):
        _select_models(paths, ["mood"], None)
    assert [name for name, _ in _select_models([run], ["mood"], None)] == ["mood"]
    assert len({base_settings_of(model) for path in paths for model in saved_models(path)}) == 1


def test_metrics_count_requests_and_tokens(run: Path) -> None:
    served = Served(run, features={"metrics": True})
    served.engine.start()
    try:
        tokens = served.client().completions.create(model="mood", prompt="a b c", max_tokens=3, n=2).usage
        assert tokens is not None
        list(served.client().completions.create(model="mood", prompt="a", max_tokens=3, stream=True))
        assert post(served, {**REQUEST, "model": "nobody\n"})[0] == 404
        assert post(served, {**REQUEST, "max_tokens": 0})[0] == 400
        until(lambda: 'status="200"} 2' in fetch(served, "/metrics")[1])
        status, text, headers = fetch(served, "/metrics")
        assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        values = dict(re.findall(r"^(fedamole_\w+(?:\{.*\})?) ([0-9.]+)$", text, re.MULTILINE))
        assert len(values) == sum(not line.startswith("#") for line in text.splitlines()), "every line is a sample"
        route = '{route="/v1/completions",model='
        assert values[f'fedamole_requests_total{route}"mood",status="200"}}'] == "2"
        assert values[f'fedamole_requests_total{route}"",status="404"}}'] == "1"
        assert values[f'fedamole_requests_total{route}"",status="400"}}'] == "1"
        assert values['fedamole_tokens_total{model="mood",kind="answer"}'] == str(tokens.completion_tokens + 3)
        assert int(values['fedamole_tokens_total{model="mood",kind="prompt"}']) == tokens.prompt_tokens + 1
        assert values['fedamole_request_seconds_bucket{le="+Inf"}'] == values["fedamole_request_seconds_count"] == "4"
        assert (
            values['fedamole_answers_running{model="plain"}'] == values['fedamole_answers_waiting{model="mood"}'] == "0"
        )
        assert fetch(served, "/metrics", Host="evil.example")[0] == 403
    finally:
        served.close()


def test_metrics_are_off_unless_enabled_and_need_their_own_key(served: Served, run: Path, tmp_path: Path) -> None:
    assert fetch(served, "/metrics")[0] == 404
    keys = make_keys(tmp_path / "keys.json", ("mood", METRICS_OWNER))
    guarded = Served(run, read_keys(tmp_path / "keys.json"), features={"metrics": True})
    try:
        assert fetch(guarded, "/metrics")[0] == 401
        assert fetch(guarded, "/metrics", Authorization=f"Bearer {keys['mood']}")[0] == 403
        own = f"Bearer {keys[METRICS_OWNER]}"
        status, text, _ = fetch(guarded, "/metrics", Authorization=own)
        assert (status, "fedamole_requests_total" in text) == (200, True)
        assert json.loads(fetch(guarded, "/v1/models", Authorization=own)[1])["data"] == []
    finally:
        guarded.close()


def test_running_and_waiting_answers_are_gauges(run: Path) -> None:
    with serving(run, features={"metrics": True}, max_rows=1) as served:
        lines = [send(served, ENDLESS) for _ in range(2)]
        until(lambda: (served.engine.running, served.engine.waiting) == (1, 1))
        text = fetch(served, "/metrics")[1]
        assert 'fedamole_answers_running{model="mood"} 1\n' in text
        assert 'fedamole_answers_waiting{model="mood"} 1\n' in text
        for line in lines:
            line.close()
        until(lambda: 'status="499"} 2' in fetch(served, "/metrics")[1])


def test_labels_are_escaped_and_a_request_counts_once() -> None:
    metrics, record = Metrics(False), CallRecord("/v1/completions", 'a"\\b\n')
    metrics.finish(record, 200)
    metrics.finish(record, 500)
    assert 'model="a\\"\\\\b\\n",status="200"} 1\n' in metrics.text([])
    assert "500" not in metrics.text([])


def test_the_request_log_has_no_texts(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = Served(run, features={"log_requests": True})
    served.engine.start()
    caplog.set_level(logging.INFO, logger="fedamole.serving.metrics")
    try:
        secret = "xyzzy"
        answer = served.client().completions.create(model="mood", prompt=secret, max_tokens=4, user=secret)
        assert post(served, {"model": f"no {secret}", "prompt": secret})[0] == 404
        assert post(served, {"model": "mood", "prompt": secret, secret: 1})[0] == 400
        until(lambda: len(caplog.messages) == 3)
    finally:
        served.close()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ POST /v1/completions model=mood status=200 prompt_tokens=\d+ answer_tokens=4 "
        r"seconds=\d+\.\d{3}",
        caplog.messages[0],
    )
    assert "model=- status=404" in caplog.messages[1]
    assert secret not in caplog.text
    assert answer.choices[0].text not in caplog.text


def test_scripts_of_named_origins_alone_may_read_answers(run: Path, served: Served, fedamole: Any) -> None:
    page = "http://localhost:3000"
    ask = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}
    assert "access-control-allow-origin" not in fetch(served, "/v1/models", Origin=page)[2]
    allowing = Served(run, features={"origins": (page,)})
    try:
        assert fetch(allowing, "/v1/models", Origin=page)[2]["access-control-allow-origin"] == page
        assert "access-control-allow-origin" not in fetch(allowing, "/v1/models", Origin="http://evil.example")[2]
        status, _, headers = fetch(allowing, "/v1/completions", "OPTIONS", Origin=page, **ask)
        assert (status, headers["access-control-allow-origin"]) == (200, page)
        assert "Authorization" in headers["access-control-allow-headers"]
        assert fetch(allowing, "/v1/completions", "OPTIONS", Origin="http://evil.example", **ask)[0] == 400
        assert raw(allowing, "POST", "/v1/completions", b"{", Origin=page)[0] == 400
    finally:
        allowing.close()
    assert "lets any web page use the models" in fedamole("serve", run, "--cors", "*").err
    assert "write an origin" in fedamole("serve", run, "--cors", "localhost:3000").err


def test_the_description_of_the_api_has_the_bodies(run: Path, served: Served) -> None:
    described = json.loads(fetch(served, "/openapi.json")[1])
    for route, name, columns in (
        ("/v1/completions", "CompletionRequest", {"prompt", "row", "echo", "logprobs", "n", "min_p"}),
        ("/v1/chat/completions", "ChatRequest", {"messages", "top_logprobs", "response_format"}),
    ):
        body = described["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{name}"}
        assert columns <= set(described["components"]["schemas"][name]["properties"])
    references = re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(described))
    assert {"Message", "StreamOptions"} < set(references) <= set(described["components"]["schemas"])
    assert fetch(served, "/docs")[0] == 404, "the page loads scripts from elsewhere"
    with_page = Served(run, features={"docs_page": True})
    try:
        assert "swagger-ui" in fetch(with_page, "/docs")[1]
    finally:
        with_page.close()


def test_open_requests_finish_when_the_server_stops(run: Path) -> None:
    """One is running and one waits; a third is refused meanwhile, and health says so."""
    served = Served(run, drain=30, max_rows=1)
    sample = served.engine._sample
    slow = threading.Event()

    def sampling(*arguments: Any) -> None:
        slow.wait(0.02)
        sample(*arguments)

    served.engine._sample = sampling  # type: ignore[assignment, method-assign]
    served.engine.start()
    request: dict[str, Any] = {"model": "mood", "prompt": "a", "max_tokens": 40}
    with ThreadPoolExecutor(2) as pool:
        client: Any = served.client()
        both = [pool.submit(client.completions.create, **request) for _ in range(2)]
        until(lambda: (served.engine.running, served.engine.waiting) == (1, 1))
        served.server.should_exit = True
        until(lambda: served.engine.draining)
        assert raw(served, "GET", "/health")[0] == 503
        assert post(served, REQUEST)[1]["error"]["code"] == "stopping"
        assert [answer.result().usage.completion_tokens for answer in both] == [40, 40]
    served.close()
    assert served.engine.stopped


def test_requests_that_take_too_long_end_with_an_error(run: Path) -> None:
    with serving(run, drain=0.3) as served:
        line = send(served, {**ENDLESS, "stream": True})
        until(lambda: served.engine.running == 1)
        began = time.monotonic()
        served.close()
        assert 0.3 <= time.monotonic() - began < 5
        assert b'"code": "stopping"' in read_to_end(line)


def test_a_second_interrupt_stops_the_server_at_once(run: Path) -> None:
    with serving(run, drain=600) as served:
        line = send(served, {**ENDLESS, "stream": True})
        until(lambda: served.engine.running == 1)
        served.server.handle_exit(signal.SIGINT, None)
        until(lambda: served.engine.draining)
        assert served.engine.running == 1
        served.server.handle_exit(signal.SIGINT, None)
        served.thread.join(10)
        assert not served.thread.is_alive()
        line.close()


def test_the_commands_options_reach_the_server(
    fedamole: Any, run: Path, runs: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two runs; a chat fills a column of one client, with the same prompt as a row."""
    seen: list[HttpServer] = []

    def serve_and_stop(server: HttpServer, listening: list[socket.socket]) -> None:
        listening[0].close()
        seen.append(server)
        for engine in server.engines:
            engine.stop()

    monkeypatch.setattr(HttpServer, "run", serve_and_stop)
    created = Service.__init__
    services: list[Service] = []

    def noted(service: Service, *arguments: Any) -> None:
        services.append(service)
        created(service, *arguments)

    monkeypatch.setattr(Service, "__init__", noted)
    other = runs("fedit", "federation.rounds=1")
    first, second = run_names([run, other])
    mapping = ["--chat-column", f"{second}/mood=text", "--chat-column", f"{second}/entail=premise"]
    refused = fedamole("serve", run, other, "--port", "0", *mapping)
    assert f"--chat-column premise for {second}/entail" in refused.err
    assert "'hypothesis' is missing" in refused.err
    unknown = fedamole("serve", run, other, "--port", "0", "--chat-column", "mood=text")
    assert "there is no model 'mood'" in unknown.err
    options = [
        "--drain",
        "7",
        "--log-requests",
        "--metrics",
        "--docs-page",
        "--cors",
        "http://a.example/",
        *mapping[:2],
    ]
    result = fedamole("serve", run, other, "--port", "0", *options)
    assert result.code == 0, result.err
    assert "8 models on http://127.0.0.1:" in result.err
    assert "2 bases are loaded" in result.err
    assert seen[0].drain_seconds == 7
    assert services[0].settings == ServiceSettings(None, None, ("http://a.example",), True, True, True)
    models = services[0].models.by_name
    (message,) = [{"role": "user", "content": "an old map is good"}]
    chat = ChatRequest.model_validate({"model": f"{second}/mood", "messages": [message]})
    row = parse_body(CompletionRequest, b'{"model": "-", "row": {"text": "an old map is good"}}')
    (expected,), (prompt,) = (read_prompts(body, models[f"{second}/mood"]) for body in (row, chat))
    assert prompt.ids == expected.ids
    (other_prompt,) = read_prompts(chat, models[f"{first}/mood"])
    assert other_prompt.ids != expected.ids
    made = fedamole("serve", run, "--make-keys", tmp_path / "keys.json", "--client", "mood", "--metrics")
    assert [line.split()[0] for line in made.out.splitlines()] == ["mood", METRICS_OWNER]
