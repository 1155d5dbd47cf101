import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedamole.cli.main import app
from fedamole.deployment.health import HEALTH_FILE, ClientHealth, client_health, read_health
from fedamole.deployment.security.certificates import make_certificates
from tests.deployment.proxy import Gateway, listening


def judged(home: Path, **fields: Any) -> tuple[bool, str]:
    about = {"state": "connected", "since": time.time() - 600, "last_contact": time.time() - 3, "last_order": None}
    (home / HEALTH_FILE).write_text(json.dumps(about | fields))
    verdict = client_health(home, 180.0)
    return verdict.healthy, verdict.text


def test_what_a_client_writes_is_read(tmp_path: Path) -> None:
    now = time.time()
    health = ClientHealth("connected", since=now - 100, last_contact=now - 2, last_order=now - 50)
    health.write(tmp_path)
    assert read_health(tmp_path / HEALTH_FILE) == health
    verdict = client_health(tmp_path, 180.0)
    assert verdict.healthy
    assert verdict.text.startswith("connected since 20")
    assert client_health(tmp_path / HEALTH_FILE, 180.0).healthy
    assert [path.name for path in tmp_path.iterdir()] == [HEALTH_FILE]


def test_which_client_is_healthy(tmp_path: Path) -> None:
    assert judged(tmp_path)[0]
    assert judged(tmp_path, last_order=time.time() - 1e6)[0]  # nothing to do for days is no fault
    healthy, text = judged(tmp_path, last_contact=time.time() - 181)
    assert (healthy, "no contact for more than 180 s" in text) == (False, True)
    assert judged(tmp_path, last_contact=time.time() - 170)[0]
    for state in ("connecting", "stopped"):
        assert judged(tmp_path, state=state)[0] is False
    assert judged(tmp_path, last_contact=None)[0] is False
    healthy, text = judged(tmp_path, last_contact=time.time() + 1e9)
    assert (healthy, "correct this machine's clock" in text) == (False, True)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "1",
        '{"state": "connected"}',
        '{"state": "fine", "since": 1, "last_contact": 1, "last_order": 1}',
        '{"state": "connected", "since": null, "last_contact": 1, "last_order": 1}',
        '{"state": "connected", "since": true, "last_contact": 1, "last_order": 1}',
        '{"state": "connected", "since": NaN, "last_contact": 1, "last_order": 1}',
        '{"state": "connected", "since": 1, "last_contact": "now", "last_order": 1}',
        '{"state": ["connected"], "since": 1, "last_contact": 1, "last_order": 1}',
        '{"state": "connected", "since": 1, "last_contact": 1, "last_order": 1}' + " " * 5000 + "x",
        "[" * 3000,
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / HEALTH_FILE).write_text(content)
    verdict = client_health(tmp_path, 180.0)
    assert not verdict.healthy
    assert HEALTH_FILE in verdict.text


def run(*arguments: str, **env: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["health", *arguments], env=env)
    return done.exit_code, done.output


def test_the_command_at_a_client(tmp_path: Path) -> None:
    code, text = run(str(tmp_path / ".client-a"))
    assert (code, text.startswith("not healthy: ")) == (1, True)
    assert "start the client, or correct the path" in text
    ClientHealth("connected", time.time(), time.time()).write(tmp_path / ".client-a")
    code, text = run(FEDAMOLE_HEALTH=str(tmp_path / ".client-a"))
    assert (code, text.startswith("healthy: connected since ")) == (0, True)
    ClientHealth("connected", time.time(), time.time() - 30).write(tmp_path / ".client-a")
    assert run(str(tmp_path / ".client-a"))[0] == 0
    assert run(str(tmp_path / ".client-a"), "--within", "20")[0] == 1
    assert run()[0] == 2


def test_the_command_at_a_coordinator(tmp_path: Path) -> None:
    make_certificates(tmp_path / "certs", (), ())
    gateway = Gateway(tmp_path / "certs")
    with listening(gateway):
        code, text = run(f"127.0.0.1:{gateway.port}", FEDAMOLE_CERTS=str(tmp_path / "certs"))
        assert (code, text.startswith(f"healthy: 127.0.0.1:{gateway.port} answers")) == (0, True)
    code, text = run(f"127.0.0.1:{gateway.port}", "--certs", str(tmp_path / "certs"))
    assert (code, "refused: nothing listens there" in text) == (1, True)


def test_the_command_is_quick(tmp_path: Path) -> None:
    """A health check runs twice a minute: it must not import torch."""
    ClientHealth("connected", time.time(), time.time()).write(tmp_path)
    code = (
        "import sys; from fedamole.cli.main import app; sys.argv[1:] = ['health', sys.argv[1]]\n"
        "try: app()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'flwr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=os.environ)
    assert done.stdout.splitlines()[1:] == ["[]"], done.stdout + done.stderr
