"""Attacks on a federation that runs: real processes, certificates and keys, on loopback.

Each succeeded on an earlier version. The run goes on through all of them, and its clients train undisturbed.
"""

import hashlib
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import message_to_proto
from flwr.proto.control_pb2 import ListNodesRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from fedamole.deployment.flower.content import to_array_record
from fedamole.deployment.flower.control import _Token
from fedamole.deployment.flower.fleet import _BoundedClient
from fedamole.deployment.security.certificates import make_certificates
from fedamole.deployment.security.keys import load_private
from fedamole.deployment.security.orders import sign_order
from fedamole.deployment.security.tls import client_context
from tests.deployment.faults import FEDAMOLE, NAMES, Command, Site, site, wait_until

STARTING, ROUND = 300.0, 120.0
AGENT = '''
"""Foreign code that creates a file; it must never run."""
import os
from pathlib import Path
from flwr.agentapp import AgentApp

app = AgentApp()
Path(os.environ["MARKS"], f"imported-{os.getpid()}").write_text("foreign code was imported")

@app.main()
def main(agent, context):
    Path(os.environ["MARKS"], f"ran-{os.getpid()}").write_text("foreign code ran")
'''
PROJECT = """
[project]
name = "harmless"
version = "1.0.0"
description = "x"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "local"

[tool.flwr.app.components]
agentapp = "foreign.agent:app"

[tool.flwr.app.config]
x = ""
"""


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "marks").mkdir()
    os.environ["MARKS"] = str(folder / "marks")
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")  # nobody: loopback goes to no proxy
    with site(
        folder,
        tiny,
        "training.local_steps=5",
        "method.name=fedit",
        "deployment.gathering=60",
        "deployment.deadline=300",
        secure=True,
    ) as there:
        assert there.certs is not None
        make_certificates(there.certs, ["localhost"], NAMES)
        os.environ.update(proxies)
        there.server()
        for name in NAMES:
            there.client(name)
        for name in proxies:
            del os.environ[name]
        there.event("done", STARTING, round=0)
        yield there
    del os.environ["MARKS"]


def command_of(there: Site, name: str) -> Command:
    return next(command for command in reversed(there.commands) if command.output.stem in (name, f"c-{name}"))


def superlink_port(there: Site) -> int:
    arguments = command_of(there, "server").part("fedamole.deployment.flower.superlink").cmdline()
    return int(arguments[arguments.index("--port") + 1])


def node_of(there: Site, name: str) -> int:
    return int((there.folder / f"c-{name}" / f".client-{name}" / "node").read_text())


def goes_on(there: Site, names: tuple[str, ...] = NAMES) -> None:
    """Wait for a round in which all train."""
    now = time.time()
    for name in names:
        there.trained(name, ROUND, since=now)


def agent_app(folder: Path) -> StartRunRequest:
    (folder / "foreign").mkdir(parents=True)
    (folder / "foreign" / "__init__.py").touch()
    (folder / "foreign" / "agent.py").write_text(AGENT)
    (folder / "pyproject.toml").write_text(PROJECT)
    app = build_fab_from_disk(folder)
    fab = Fab(hash_str=hashlib.sha256(app).hexdigest(), content=app)
    return StartRunRequest(fab=fab, user_prompt="hello")


def test_another_account_of_the_coordinators_machine_gets_nothing(attacked: Site, tmp_path: Path) -> None:
    inside = attacked.run / "server" / "loopback" / "loopback.crt"
    control = ControlHttpClient(f"https://127.0.0.1:{superlink_port(attacked)}", verify=client_context(inside))
    for call, request in (
        (control.StartRun, agent_app(tmp_path / "app")),
        (control.ListNodes, ListNodesRequest()),
    ):
        with pytest.raises(httpx.HTTPStatusError) as error:
            call(request)
        assert error.value.response.status_code == 401
        assert error.value.response.content == b""
    certs = attacked.certs
    assert certs is not None
    key = load_private(certs / "clients" / "chat" / "node.key")
    fleet = _BoundedClient(f"https://127.0.0.1:{superlink_port(attacked)}", client_context(inside), key)
    with pytest.raises(httpx.HTTPStatusError) as error:
        fleet.PullMessages(PullMessagesRequest(node=Node(node_id=node_of(attacked, "chat"))))
    assert error.value.response.status_code == 401, "not even with a registered key, past the gateway"
    readable = [path for path in (attacked.run / "server").rglob("*") if path.stat().st_mode & 0o077]
    assert not readable, "what a deployment writes is for its own account alone"
    run = [
        process for process in command_of(attacked, "server").alive() if "flwr-serverapp" in " ".join(process.cmdline())
    ]
    tokens = [path.read_text() for path in (attacked.run / "server" / "tokens").iterdir()]
    assert run
    assert not [token for token in tokens for process in run if token in " ".join(process.cmdline())], (
        "no token is an argument"
    )
    assert (attacked.run / "server" / "tokens" / "control").stat().st_mode & 0o777 == 0o600
    goes_on(attacked)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another account")
def test_another_account_cannot_read_the_tokens(attacked: Site) -> None:
    token = attacked.run / "server" / "tokens" / "control"
    completed = subprocess.run(["cat", str(token)], user=65534, capture_output=True, text=True, check=False)
    assert completed.returncode == 1
    assert "Permission denied" in completed.stderr


def test_not_even_the_coordinator_runs_another_app(attacked: Site, tmp_path: Path) -> None:
    """With the token, Flower takes the app; the executor finds no command for it, and clients know of no apps."""
    token = (attacked.run / "server" / "tokens" / "control").read_text()
    inside = attacked.run / "server" / "loopback" / "loopback.crt"
    control = ControlHttpClient(
        f"https://127.0.0.1:{superlink_port(attacked)}", verify=client_context(inside), interceptors=[_Token(token)]
    )
    assert control.StartRun(agent_app(tmp_path / "app")).HasField("run_id")
    log = attacked.run / "server" / "serverapp.log"
    refused = "refused: a task of type flwr-agentapp"
    wait_until(lambda: refused in log.read_text(), ROUND, "the executor refuses", attacked.told)
    goes_on(attacked)
    assert not list((attacked.folder / "marks").iterdir()), "foreign code was imported"


def test_one_client_gives_no_orders_to_another(attacked: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """North knows south's node id and the format of an order; the gateway refuses all but north's own replies."""
    certs = attacked.certs
    assert certs is not None
    key, me, other = (
        load_private(certs / "clients" / "chat" / "node.key"),
        node_of(attacked, "chat"),
        node_of(attacked, "entail"),
    )
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    ca = client_context(certs / "ca.crt")
    gateway = _BoundedClient(f"https://localhost:{attacked.port}", ca, key)
    order = sign_order(key, "entail", time.time_ns(), b"undo everything")
    length_before = len(command_of(attacked, "entail").text)

    def pushed(source: int, target: int, reply_to: str) -> int:
        message = Message(
            RecordDict({"request": to_array_record(order)}), dst_node_id=target, message_type="query", ttl=300.0
        )
        message.metadata.__dict__.update(_src_node_id=source, _message_id=uuid.uuid4().hex * 2)
        message.metadata.__dict__["_reply_to_message_id"] = reply_to
        proto = message_to_proto(remove_content_from_message(message))
        request = PushMessagesRequest(
            node=Node(node_id=me),
            messages_list=[proto],
            message_object_trees=[get_object_tree(message)],
            clientapp_runtime_list=[0.0],
        )
        with pytest.raises(httpx.HTTPStatusError) as error:
            gateway.PushMessages(request)
        return error.value.response.status_code

    superlink = 1
    assert pushed(superlink, other, "") == 403, "an order in the server's name"
    assert pushed(me, other, "") == 403, "an order in one's own name"
    assert pushed(me, other, "a" * 64) == 403, "an answer to another client"
    assert pushed(other, superlink, "a" * 64) == 403, "an answer in another's name"
    assert "refused an order" not in command_of(attacked, "entail").text[length_before:]
    goes_on(attacked)


def test_a_removed_key_is_refused_at_once_and_the_others_go_on(attacked: Site) -> None:
    """The last test of this run: mood is removed, and cannot return with its old key."""
    assert attacked.certs is not None
    completed = subprocess.run(
        [str(FEDAMOLE), "clients", "remove", "mood", "--certs", str(attacked.certs)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    start, mood = time.time(), command_of(attacked, "mood")
    mood.says("the coordinator does not know this key, or has removed it", ROUND)
    command_of(attacked, "server").says("the old key of mood is refused from now on", ROUND)
    goes_on(attacked, ("chat", "entail"))
    server = command_of(attacked, "server")
    assert server.interrupt() == 130
    attacked.server(resume=True)
    resumed = time.time()
    goes_on(attacked, ("chat", "entail"))
    assert not [line for line in attacked.events("answered", since=resumed, client="mood") if "failed" not in line]
    assert start < resumed
