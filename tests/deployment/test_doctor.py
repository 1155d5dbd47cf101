import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from fedamole.deployment import connection_check, doctor
from fedamole.deployment.doctor import Finding, examine_client, examine_server
from fedamole.deployment.security import dates
from fedamole.deployment.security.certificates import make_certificates

SECRET = "patient Miller"
HEALTHY = b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\nConnection: close\r\n\r\n{"status":"ok"}'
Serve = Callable[..., str]


@pytest.fixture(autouse=True)
def _without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    make_certificates(tmp_path / "certs", ("fed.example.org",), ("clinic",))
    return tmp_path / "certs"


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`serve(certs)`: a TLS server on a free port of all loopback addresses; its port as text.

    It gives `answer` to each request, the gateway's to GET /health by default. Without certificates it says `plain` to
    each connection and closes it, or, for None, says nothing at all.
    """
    indices: list[socket.socket] = []

    def work(
        listener: socket.socket, certs: Path | None, plain: bytes | None, answer: bytes, newest: ssl.TLSVersion
    ) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = newest
        if certs is not None:
            context.load_cert_chain(certs / "server.crt", certs / "server.key")
        held = []
        while True:
            try:
                stream = listener.accept()[0]
            except OSError:
                return
            try:
                if certs is not None:
                    with context.wrap_socket(stream, server_side=True) as secured:
                        assert secured.recv(4096).startswith(b"GET /health HTTP/1.1\r\n")
                        secured.sendall(answer)
                elif plain is not None:
                    stream.sendall(plain)
                    stream.close()
                else:
                    held.append(stream)
            except OSError:
                pass  # the client did not like the certificate

    def start(
        certs: Path | None,
        plain: bytes | None = None,
        answer: bytes = HEALTHY,
        newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ) -> str:
        listener = socket.create_server(("0.0.0.0", 0))
        indices.append(listener)
        threading.Thread(target=work, args=(listener, certs, plain, answer, newest), daemon=True).start()
        return str(listener.getsockname()[1])

    yield start
    for listener in indices:
        listener.close()


def of(what: str, findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.what == what]


def only(what: str, findings: list[Finding]) -> Finding:
    matches = of(what, findings)
    assert len(matches) == 1, matches
    return matches[0]


def asked(server: str, certs: Path | None) -> Finding:
    """The finding about the server at a client."""
    finding = only("server", list(doctor.server_answers(server, certs)))
    assert (finding.state == "ok") == (finding.remedy == "")
    return finding


def test_a_good_server_and_a_good_client(certs: Path, serve: Serve, tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text('[base]\nmodel = "bundled"\n')
    data = rows(tmp_path / "mood.jsonl", *({"text": f"day {at}", "label": at % 2} for at in range(4)))
    server = examine_server(config, certs, "127.0.0.1", free_port())
    assert {finding.what for finding in server} == {
        "python",
        "packages",
        "commands",
        "port",
        "certificates",
        "disk",
        "base",
    }
    port, own = serve(certs), certs / "clients" / "clinic"
    client = examine_client(f"127.0.0.1:{port}", own, "bundled", data)
    assert {finding.what for finding in client} == {
        "python",
        "packages",
        "device",
        "disk",
        "certificates",
        "server",
        "base",
        "data",
    }
    for finding in (*server, *client):
        # Where Flower is not installed, that is what the doctor has to find.
        if finding.what not in ("packages", "commands", "disk"):
            assert finding.state == "ok", finding


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_trusted_server(certs: Path, serve: Serve) -> None:
    finding = asked(f"localhost:{serve(certs)}", certs / "clients" / "clinic")
    assert finding.state == "ok"
    assert f"{datetime.now(UTC) + timedelta(days=825):%Y-%m-%d}" in finding.text


def test_nothing_listens(certs: Path) -> None:
    finding = asked(f"127.0.0.1:{free_port()}", certs)
    assert (finding.state, "refused: nothing listens" in finding.text) == ("problem", True)


def test_no_answer_to_the_first_packet(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener whose queue is full drops packets as a firewall does."""
    monkeypatch.setattr(connection_check, "TIMEOUT_S", 0.4)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = []
        for _ in range(4):
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(listener.getsockname())
        finding = asked(f"127.0.0.1:{listener.getsockname()[1]}", certs)
        for connection in waiting:
            connection.close()
    assert "(timeout)" in finding.text
    assert "firewall" in finding.remedy


def test_a_wrong_name(certs: Path, serve: Serve) -> None:
    finding = asked(f"127.0.0.2:{serve(certs)}", certs)
    assert "not for this name" in finding.text


def test_a_wrong_authority(certs: Path, serve: Serve, tmp_path: Path) -> None:
    make_certificates(tmp_path / "other", (), ())
    finding = asked(f"127.0.0.1:{serve(certs)}", tmp_path / "other")
    assert "wrong CA" in finding.text


@pytest.mark.parametrize(
    ("days", "state", "text"),
    [
        (-826, "problem", "has expired"),
        (-800, "warning", "expires on"),
        (2, "problem", "not valid yet"),
        (-700, "ok", "valid until"),
    ],
)
def test_dates(certs: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, days: int, state: str, text: str) -> None:
    moment = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    with monkeypatch.context() as then:
        then.setattr(dates, "now", lambda: moment)
        make_certificates(certs, (), (), renew_server=True)
    finding = asked(f"localhost:{serve(certs)}", certs)
    assert (finding.state, text in finding.text) == (state, True), finding


def test_a_port_that_speaks_no_tls(certs: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = asked(f"127.0.0.1:{serve(None, b'HTTP/1.1 400 Bad Request')}", certs)
    assert "TLS fails" in finding.text
    assert "does not support TLS" in finding.remedy
    monkeypatch.setattr(connection_check, "TIMEOUT_S", 0.3)
    assert "no TLS answer" in asked(f"127.0.0.1:{serve(None)}", certs).text


def test_no_certificates_are_for_this_machine_alone(serve: Serve) -> None:
    port = serve(None)
    assert asked(f"127.0.0.1:{port}", None).state == "warning"
    assert asked(f"127.0.0.2:{port}", None).state == "problem"
    assert only("certificates", list(doctor.server_certificates(None, "0.0.0.0"))).state == "problem"


def test_an_authority_that_cannot_be_read(certs: Path, serve: Serve, tmp_path: Path) -> None:
    port = serve(certs)
    assert "cannot be read" in asked(f"127.0.0.1:{port}", tmp_path / "nowhere").text
    (certs / "ca.crt").write_text("rubbish")
    assert "cannot be read" in asked(f"127.0.0.1:{port}", certs).text


@pytest.mark.parametrize("server", ["fed.example.org", "https://fed.org:1", "fed:0", "fed:70000", "::1:8443", ""])
def test_addresses_that_are_none(server: str) -> None:
    assert "is not HOST:PORT" in asked(server, None).text


def test_a_name_without_address(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "no address" in asked("fed.invalid:8443", certs).text
    assert "no address" in only("port", list(doctor.port_is_free("fed.invalid", 1))).text


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", "is unexpected (404)"),
        (HEALTHY.replace(b"200 OK", b"503 Down"), "is unavailable (503)"),
        (HEALTHY.replace(b'"ok"', b'"no"'), "is unexpected (200)"),
        (HEALTHY.replace(b"15", b"99999") + b" " * 99984, "is unexpected (200)"),
        (HEALTHY.replace(b'{"status":"ok"}', b'["status","ok"]'), "is unexpected (200)"),
        (HEALTHY.replace(b"15", b"4000").replace(b'{"status":"ok"}', b"[" * 4000), "is unexpected (200)"),
        (b"nonsense", "does not answer GET /health (RemoteProtocolError)"),
    ],
)
def test_a_trusted_server_that_is_no_gateway_of_ours(certs: Path, serve: Serve, answer: bytes, text: str) -> None:
    finding = asked(f"localhost:{serve(certs, answer=answer)}", certs)
    assert (finding.state, text in finding.text) == ("problem", True), finding


def test_less_than_tls_1_3_is_refused(certs: Path, serve: Serve) -> None:
    assert "TLS fails" in asked(f"localhost:{serve(certs, newest=ssl.TLSVersion.TLSv1_2)}", certs).text


def test_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        finding = only("port", list(doctor.port_is_free("127.0.0.1", taken)))
        assert (finding.state, "in use" in finding.text) == ("problem", True)
        assert only("port", list(doctor.port_is_free("0.0.0.0", taken))).state == "problem"
    assert only("port", list(doctor.port_is_free("127.0.0.1", taken))).state == "ok"
    elsewhere = only("port", list(doctor.port_is_free("192.0.2.1", taken)))
    assert (elsewhere.state, "not an address of this machine" in elsewhere.text) == ("warning", True)


def test_certificates_of_a_server_and_of_a_client(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = only("certificates", examine_server(None, certs, "other.example.org", 0))
    assert (wrong.state, "not for other.example.org" in wrong.text) == ("problem", True)
    soon = datetime.now(UTC) + timedelta(days=800)
    monkeypatch.setattr(dates, "now", lambda: soon)
    findings = of("certificates", examine_server(None, certs, "localhost", 0))
    assert [(finding.state, finding.text.split("/")[-1].split()[0]) for finding in findings] == [
        ("warning", "clinic.pub"),
        ("warning", "server.crt"),
    ]
    own = certs / "clients" / "clinic"
    (own / "node.key").unlink()
    missing = only("certificates", examine_client(None, own, None, None))
    assert (missing.state, "node.key is missing" in missing.text) == ("problem", True)


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2", "flwr": "1.41.3"}
    monkeypatch.setattr(doctor, "version", lambda name: installed[name])
    assert {finding.state for finding in doctor.package_versions()} == {"ok"}
    for name, other in (("flwr", "1.42.0"), ("torch", "2.5.1"), ("transformers", "6.0.0"), ("peft", "0.22.0")):
        with monkeypatch.context() as now:
            now.setitem(installed, name, other)
            bad = [finding for finding in doctor.package_versions() if finding.state == "problem"]
            assert [finding.text.split()[:2] for finding in bad] == [[name, other]]
            assert bad[0].remedy.startswith(f"pip install '{name}")


def test_a_package_and_commands_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", absent)
    assert "flwr is not installed here" in [finding.text for finding in doctor.package_versions()]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert "flower-superexec" in only("commands", doctor.commands()).text
    for name in doctor.COMMANDS:
        (tmp_path / name).touch(mode=0o755)
    assert only("commands", doctor.commands()).state == "ok"
    (tmp_path / "flwr-serverapp").unlink()
    assert only("commands", doctor.commands()).text.startswith("flwr-serverapp not found")


def test_no_heavy_import_before_it_is_needed(certs: Path) -> None:
    code = (
        "import sys; from fedamole.deployment import doctor; doctor.package_versions();"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'flwr'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5 * 2**30 - 1}))
    assert only("disk", doctor.disk(tmp_path)).state == "warning"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5 * 2**30}))
    assert only("disk", doctor.disk(tmp_path)).state == "ok"


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CPU" in only("device", doctor.device()).text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert only("device", doctor.device()).text == "Some GPU, 10 of 80 GiB free"


def test_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError

    def state(base: str) -> tuple[str, str]:
        finding = only("base", examine_client(None, None, base, None))
        return finding.state, finding.text

    assert state("bundled")[0] == "ok"
    assert state(str(tmp_path / "absent"))[0] == "problem"
    (tmp_path / "half").mkdir()
    assert "no config.json" in state(str(tmp_path / "half"))[1]
    (tmp_path / "half" / "config.json").write_text("{}")
    assert state(str(tmp_path / "half"))[0] == "problem"
    (tmp_path / "half" / "model.safetensors").touch()
    assert state(str(tmp_path / "half"))[0] == "ok"
    assert "neither a folder nor a hub id" in state("what ever?")[1]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert state("some/model") == (
        "warning",
        "some/model: not in this machine's cache, and HF_HUB_OFFLINE forbids downloads",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def refuse(error: Exception) -> None:
        def raising(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", raising)

    refuse(ConnectionError("no route"))
    assert state("some/model")[0] == "warning"
    refuse(RepositoryNotFoundError.__new__(RepositoryNotFoundError))
    assert state("some/model")[0] == "problem"
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    assert "is downloaded" in state("some/model")[1]
    refuse(AssertionError("what is cached needs no network"))
    snapshot = tmp_path / "cache" / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").touch()
    refs = tmp_path / "cache" / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert state("some/model")[0] == "ok"


def test_what_others_can_compute_is_listed(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('[base]\nmodel = "bundled"\n[deployment]\nclients = ["a", "b", "c", "d", "e", "f"]\n')
    findings = [finding for finding in examine_server(config, None, "127.0.0.1", 0) if finding.what == "exposure"]
    assert all(finding.state == "ok" for finding in findings)
    assert "The coordinator gets each client's own part" in " ".join(f.text for f in findings).replace("the c", "The c")
    assert len(findings) > 2


def test_the_base_of_a_config(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").touch()
    config.write_text('[base]\nmodel = "model"\n')  # relative to the config
    assert only("base", list(doctor.base_of_config(config))).state == "ok"
    config.write_text('[base]\nmodle = "x"\n')
    assert "modle" in only("base", examine_server(config, None, "localhost", 0)).text
    config.write_text("[base\n")
    assert only("base", examine_server(config, None, "localhost", 0)).state == "problem"


def rows(path: Path, *content: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.mark.parametrize(
    ("content", "template"),
    [
        ([{"prompt": f"{SECRET} {at}", "completion": SECRET} for at in range(3)], "plain"),
        ([{"instruction": f"{SECRET} {at}", "output": SECRET} for at in range(3)], "alpaca"),
        ([{"text": f"{SECRET} {at}", "label": at} for at in range(3)], "classification"),
        ([{"text": f"{SECRET} {at}", "label_text": f"{SECRET} {at}"} for at in range(3)], "classification"),
        ([{"premise": SECRET, "hypothesis": SECRET, "label": at} for at in range(3)], "snli"),
    ],
)
def test_data_that_fit(tmp_path: Path, content: list[dict[str, Any]], template: str) -> None:
    findings = of("data", examine_client(None, None, None, rows(tmp_path / "d.jsonl", *content)))
    assert [finding.state for finding in findings] == ["ok", "ok"]
    assert "3 rows with the columns" in findings[0].text
    assert f"template {template!r}" in findings[0].text
    assert set(content[0]) <= {word.strip(",;") for word in findings[0].text.split()}
    assert findings[1].text.startswith("3 of 3 rows")
    assert SECRET not in repr(findings)


def test_a_template_of_the_coordinator(tmp_path: Path) -> None:
    data = rows(tmp_path / "d.jsonl", *({"body": f"{SECRET} {at}", "urgent": "yes"} for at in range(3)))
    findings = of("data", examine_client(None, None, None, data, "triage"))
    assert [finding.state for finding in findings] == ["ok", "warning"]
    assert "the coordinator must define it; it was not checked" in findings[1].text
    near = of("data", examine_client(None, None, None, data, "alpcaa"))[1]
    assert "did you mean 'alpaca'" in near.remedy
    config = tmp_path / "run.toml"
    # The rest of the file is the coordinator's business, and need not be right here.
    text = '[base]\nmodel = "./not-here"\n[data.templates.triage]\nprompt = "{body}?\\n"\nanswer = "{urgent}"\n'
    config.write_text(text)
    findings = of("data", examine_client(None, None, None, data, "triage", config=config))
    assert [finding.state for finding in findings] == ["ok", "ok"], findings
    assert "template 'triage' would be chosen" in findings[0].text
    assert findings[1].text == "3 of 3 rows have an answer"
    config.write_text(text.replace("{body}", "{letter}"))
    findings = of("data", examine_client(None, None, None, data, "triage", config=config))
    assert (findings[1].state, "letter" in findings[1].text) == ("problem", True)
    findings = of("data", examine_client(None, None, None, data, "other", config=config))
    assert (findings[1].state, "known are auto" in findings[1].text) == ("problem", True)
    config.write_text(text.replace("prompt", "promt"))
    findings = of("data", examine_client(None, None, None, data, "triage", config=config))
    assert (findings[-1].state, "promt" in findings[-1].text) == ("problem", True)


def test_messages_beside_a_prompt(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": SECRET}, {"role": "assistant", "content": "y"}]
    data = rows(tmp_path / "d.jsonl", *({"prompt": SECRET, "messages": talk} for _ in range(3)))
    findings = of("data", examine_client(None, None, None, data))
    assert (findings[-1].state, "--template messages or --column prompt=" in findings[-1].text) == ("problem", True)
    findings = of("data", examine_client(None, None, None, data, "messages"))
    assert [finding.state for finding in findings] == ["ok", "ok"]
    assert "template 'messages' would be chosen" in findings[0].text
    findings = of("data", examine_client(None, None, None, data, columns={"prompt": ""}))
    assert [finding.state for finding in findings] == ["ok", "ok"]


def test_a_single_label_is_reported_without_its_text(tmp_path: Path) -> None:
    data = rows(tmp_path / "d.jsonl", *({"text": str(at), "label": SECRET} for at in range(3)))
    finding = of("data", examine_client(None, None, None, data))[-1]
    assert "fewer than two values" in finding.text
    assert "options of a template under [data.templates], and select it with --template" in finding.remedy
    assert SECRET not in repr(finding)
    config = tmp_path / "run.toml"
    config.write_text(
        f"[data.templates.task]\nprompt = '{{text}}?'\nanswer = '{{label}}'\noptions = ['{SECRET}', 'b']\n"
    )
    findings = of("data", examine_client(None, None, None, data, "task", config=config))
    assert [finding.state for finding in findings] == ["ok", "ok"]


def test_data_that_do_not_fit_are_never_quoted(tmp_path: Path) -> None:
    turns = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    wrong = {"messages": [{"role": SECRET, "content": SECRET}, {"role": "assistant", "content": SECRET}]}
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "' + SECRET)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "ragged.csv").write_text(f"prompt,completion\na,b\n{SECRET},{SECRET},{SECRET},{SECRET}\n")
    (tmp_path / "d.txt").write_text(SECRET)
    no_answer = [{"prompt": SECRET, "completion": ""}]
    cases = {
        rows(tmp_path / "unknown.jsonl", {"question": SECRET, "solution": SECRET}): "no template fits",
        rows(
            tmp_path / "label.jsonl",
            *({"premise": SECRET, "hypothesis": "b", "label": word} for word in ("neutral", SECRET)),
        ): "1 of 2 rows do not match the template, the first is label.jsonl, row 2",
        rows(tmp_path / "one.jsonl", {"text": "a", "label": SECRET}): "fewer than two values",
        rows(tmp_path / "blank.jsonl", *no_answer): "no row has an answer",
        rows(tmp_path / "turns.jsonl", turns, wrong): "turns.jsonl, row 2: cannot be read",
        tmp_path / "torn.jsonl": "torn.jsonl, line 2: cannot be read",
        tmp_path / "ragged.csv": "ragged.csv, line 3: cannot be read",
        tmp_path / "empty.jsonl": "is empty",
        tmp_path / "d.txt": "unknown file format",
        tmp_path / "absent.jsonl": "there is no file",
    }
    for path, text in cases.items():
        findings = of("data", examine_client(None, None, None, path))
        assert findings[-1].state == "problem", (path, findings)
        assert text in findings[-1].text, (path, findings)
        assert SECRET not in repr(findings), path


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any) -> list[Finding]:
        raise RuntimeError(f"{SECRET}\nsecond line")

    for name in ("disk", "device", "server_answers", "data_fit"):
        monkeypatch.setattr(doctor, name, broken)
    findings = examine_client("localhost:1", None, None, tmp_path / "x.jsonl")
    for what in ("disk", "device", "server"):
        finding = only(what, findings)
        assert finding.state == "problem"
        assert finding.text == f"the check itself failed: RuntimeError: {SECRET}"
    assert only("data", findings).text == "the check itself failed: RuntimeError"
