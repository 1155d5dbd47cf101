"""The client handler: each request is carried out once, uncounted work is discarded, and nothing private is sent."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamole.config import load_config, load_run_config
from fedamole.data.settings import SourceSettings
from fedamole.deployment.client_handler import ClientHandler
from fedamole.deployment.run_session import ClientSettings
from fedamole.deployment.security.policy import UNBOUNDED
from fedamole.deployment.shared_config import own_tables, shared_tables
from fedamole.engine.messages import EVALUATE, JOIN, TEST, UPDATE, Reply, Request, unpacked
from fedamole.errors import BaseModelError, ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import bytes_as_tensor, pack, tensor_as_bytes, unpack
from fedamole.model.base import load_base
from fedamole.runs.identity import Identity
from fedamole.runs.run_folder import RunFolder
from tests.conftest import small

RUN_ID = "c0ffee"


class ManualServer:
    """Creates the requests of a server with one client: messages of a method, shifted by a number."""

    def __init__(self, config_file: Path, method: str, *overrides: str) -> None:
        defaults = ("deployment.clients=['entail']", "deployment.min_clients=1", "training.local_steps=1")
        self.config = load_config(config_file, [*small(method), *defaults, "federation.rounds=6", *overrides])
        base = load_base(self.config.base, torch.device("cpu"), Path.cwd())
        self.settings = shared_tables(self.config, base.identity)
        self.settings["config"]["base"]["model"] = "bundled"
        info = ClientInfo("entail", 40)
        self.first = self.config.method.message(
            self.config.method.init(Server(BaseInfo(base.shapes, 32), (info,), 0)), info
        )

    def join(self, **changes: Any) -> Request:
        return Request(RUN_ID, -1, JOIN, settings={**self.settings, **changes})

    def update(self, round_: int, last: int, plus: float = 0.0, **fields: Any) -> Request:
        tensors = getattr(self.first, "tensors", None)
        moved = {key: tensor + plus for key, tensor in (tensors or {}).items()}
        message = self.first if tensors is None else replace(self.first, tensors=moved)
        if hasattr(message, "begun"):
            message = replace(message, begun=round_ > 0)
        return replace(Request(RUN_ID, round_, UPDATE, last=last, message=bytes_as_tensor(pack(message))), **fields)


@pytest.fixture(scope="module")
def served(tiny: Path) -> Callable[..., ManualServer]:
    created: dict[tuple[str, ...], ManualServer] = {}

    def of(*overrides: str) -> ManualServer:
        if overrides not in created:
            created[overrides] = ManualServer(tiny / "config.toml", *overrides)
        return created[overrides]

    return of


@pytest.fixture
def client(tiny: Path, tmp_path: Path) -> Callable[..., ClientHandler]:
    def of(folder: str, **settings: Any) -> ClientHandler:
        source = SourceSettings("entail", path=str(tiny / "entail.jsonl"), template="entail")
        own = {"base": str(tiny / "base"), "device": "cpu", "threads": 1, "policy": UNBOUNDED, **settings}
        return ClientHandler(ClientSettings(source, folder=str(tmp_path / folder), **own), ProgressListener())

    return of


def ask(host: ClientHandler, request: Request) -> Reply:
    return unpacked(Reply, host.answer(pack(request)))


def on_disk(host: ClientHandler) -> dict[str, tuple[int, bytes]]:
    files = [path for path in Path(host.settings.folder).rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def state(host: ClientHandler) -> tuple[str, bytes]:
    path = max(Path(host.settings.folder).glob("*/clients/entail/state/*"))
    return path.name, path.read_bytes()


def same_answer(first: Reply, other: Reply) -> bool:
    """Except times."""
    loss = [reply.report["loss"] for reply in (first, other)]
    return (
        tensor_as_bytes(first.reply) == tensor_as_bytes(other.reply)
        and loss[0] == loss[1]
        and first.scores == other.scores
    )


@pytest.mark.parametrize("method", ["fedalt", "fdlora", "local_only", "fedsa_lora"])
def test_each_request_is_done_once_and_what_did_not_count_is_undone(method: str, served: Any, client: Any) -> None:
    """The first handler gets repeated, replaced and uncounted requests; the second only those that count."""
    often = ["method.sync_every=1"] if method == "fdlora" else []
    server, first_client, other = served(method, *often), client("one"), client("other")
    for host in (first_client, other):
        assert ask(host, server.join()).failed is None
    first = server.update(0, -1)
    before = pack(ask(first_client, first))
    disk = on_disk(first_client)
    assert pack(ask(first_client, first)) == before
    assert on_disk(first_client) == disk, "a repeated request changes nothing"
    late = ask(first_client, server.update(1, 0, plus=0.1))
    assert late.failed is None
    again = ask(first_client, server.update(1, 0, plus=0.2))
    assert (tensor_as_bytes(late.reply) != tensor_as_bytes(again.reply)) == (method != "local_only")

    assert same_answer(ask(other, server.update(0, -1)), unpacked(Reply, before))
    assert same_answer(ask(other, server.update(1, 0, plus=0.2)), again)
    assert state(first_client) == state(other), "the first message of round 1 has left nothing behind"

    ask(first_client, server.update(2, 1))  # its answer comes too late: round 3 follows on round 1
    assert state(first_client)[0] == "round-0002.safetensors"
    for host in (first_client, other):
        assert ask(host, server.update(3, 1, plus=0.3)).failed is None
    assert state(first_client) == state(other)
    ask(
        first_client, server.update(3, 0, plus=0.3)
    )  # a server that went back: the same message, but round 1 does not count
    ask(other, server.update(4, 0, plus=0.3))
    assert [path.name for path in sorted(Path(first_client.settings.folder).glob("*/clients/entail/state/*"))] == [
        "round-0000.safetensors",
        "round-0003.safetensors",
    ]


def test_the_saved_best_model_is_that_of_the_round_that_the_server_names(served: Any, client: Any) -> None:
    server, host = served("local_only"), client("one")
    ask(host, server.join())
    ask(host, server.update(0, -1))
    adapter = Path(host.settings.folder) / "local_only-entail/clients/entail/adapter/adapter_model.safetensors"
    assert not adapter.exists()
    ask(host, server.update(1, 0, best={"local_only": 0}))
    of_round_0 = adapter.read_bytes()
    ask(host, server.update(2, 0, best={"local_only": 0}))  # round 1 did not count
    assert adapter.read_bytes() == of_round_0
    ask(host, server.update(3, 0, best={"local_only": 2}))  # nor did 2: what the server saw is still that of round 0
    assert adapter.read_bytes() == of_round_0
    ask(host, server.update(4, 3, best={"local_only": 3}))
    assert adapter.read_bytes() != of_round_0


def test_a_client_keeps_its_own_record(served: Any, client: Any) -> None:
    """Evaluations in rounds without training stay in its metrics, once each; so does the untuned base."""
    server, host = served("fedit"), client("one")
    for _ in range(2):
        ask(host, server.join())
    ask(host, server.update(0, -1))
    for round_ in (0, 1, 1, 2):
        ask(host, Request(RUN_ID, round_, EVALUATE, "fedit", last=0, message=server.update(0, -1).message))
    ask(host, server.update(3, 0))
    ask(host, Request(RUN_ID, 5, TEST, last=3, best={"fedit": 2}))
    metrics = (Path(host.settings.folder) / "fedit-entail/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in metrics.splitlines()]
    assert [(line["round"], line["split"]) for line in lines] == [
        (-1, "validation"),
        (0, "train"),
        (0, "validation"),
        (1, "validation"),
        (2, "validation"),
        (3, "train"),
    ]
    assert (Path(host.settings.folder) / "fedit-entail/summary.json").exists()


def test_a_damaged_answer_on_disk_is_made_again(served: Any, client: Any) -> None:
    server, host = served("fedit"), client("one")
    ask(host, server.join())
    before = ask(host, server.update(0, -1))
    path = next(Path(host.settings.folder).glob("*/clients/entail/answers/*"))
    path.write_bytes(path.read_bytes()[:-7])
    assert same_answer(ask(host, server.update(0, -1)), before)


def test_a_damaged_private_state_is_named_with_the_remedy(served: Any, client: Any, caplog: Any) -> None:
    server, host = served("fedsa_lora"), client("one")
    ask(host, server.join())
    ask(host, server.update(0, -1))
    path = next(Path(host.settings.folder).glob("*/clients/entail/state/*"))
    path.write_bytes(path.read_bytes()[:-7])
    assert ask(host, server.update(1, 0)).failed == "config"
    assert f"{path} is damaged" in caplog.text
    assert "remove the folder it is in" in caplog.text
    shutil.rmtree(path.parent)
    assert ask(host, server.update(1, 0)).failed is None


BAD: dict[str, tuple[str, Callable[[ManualServer], bytes]]] = {
    "random bytes": ("bad_request", lambda s: b"\x01" * 50),
    "nothing": ("bad_request", lambda s: b""),
    "deep": ("bad_request", lambda s: pack(s.join()).replace(b'"identity', b"[" * 9000 + b'"identity')),
    "unknown operation": ("bad_request", lambda s: pack(s.update(0, -1, operation="read"))),
    "another protocol": ("bad_request", lambda s: pack(s.update(0, -1, protocol=9))),
    "another run": ("not_joined", lambda s: pack(s.update(0, -1, run="another"))),
    "another run's test": ("not_joined", lambda s: pack(Request("another", 0, TEST))),
    "a round too many": ("bad_request", lambda s: pack(s.update(99, -1))),
    "another row": ("bad_request", lambda s: pack(Request(RUN_ID, 0, EVALUATE, "../x", last=-1))),
    "no message": ("bad_request", lambda s: pack(s.update(0, -1, message={}))),
    "a message of another kind": (
        "bad_request",
        lambda s: pack(s.update(0, -1, message=bytes_as_tensor(pack(s.join())))),
    ),
    "a message without tensors": (
        "internal",
        lambda s: pack(s.update(0, -1, message=bytes_as_tensor(pack(replace(s.first, tensors={}))))),
    ),
    "another base": ("base", lambda s: pack(s.join(identity={"weights": "a", "tokenizer": "b", "targets": "c"}))),
}


@pytest.fixture(scope="module")
def joined_client(tiny: Path, served: Any, tmp_path_factory: pytest.TempPathFactory) -> ClientHandler:
    source = SourceSettings("entail", path=str(tiny / "entail.jsonl"), template="entail")
    folder = tmp_path_factory.mktemp("seated") / "private-place"
    settings = ClientSettings(source, str(folder), str(tiny / "base"), device="cpu", threads=1, policy=UNBOUNDED)
    host = ClientHandler(settings, ProgressListener())
    assert ask(host, served("fedit").join()).failed is None
    return host


def secrets(host: ClientHandler, tiny: Path) -> list[bytes]:
    rows = [json.loads(line) for line in (tiny / "entail.jsonl").read_text().splitlines()]
    texts = [row[column] for row in rows for column in ("premise", "hypothesis")]
    return [text.encode() for text in [*texts, "Yes", "Maybe", str(tiny), "private-place", "Error", "Traceback"]]


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_refused_by_a_code_alone(
    name: str, joined_client: ClientHandler, served: Any, tiny: Path
) -> None:
    code, make_request = BAD[name]
    answer = joined_client.answer(make_request(served("fedit")))
    reply = unpacked(Reply, answer)
    assert (reply.failed, reply.client) == (code, "entail")
    assert not reply.report
    assert not reply.scores
    assert not reply.reply
    assert not [text for text in secrets(joined_client, tiny) if text in answer]


def test_answers_hold_nothing_of_the_data_and_no_path(served: Any, client: Any, tiny: Path) -> None:
    server, host = served("fedit", "evaluation.pre_aggregation=true"), client("private-place")
    message = server.update(0, -1).message
    requests = [
        server.join(),
        server.update(0, -1),
        Request(RUN_ID, 0, EVALUATE, "fedit", last=0, message=message),
        Request(RUN_ID, 0, TEST, last=0, best={"fedit": 0}),
    ]
    for request in requests:
        answer = host.answer(pack(request))
        assert unpacked(Reply, answer).failed is None, request.operation
        assert not [text for text in secrets(host, tiny) if text in answer], request.operation


@pytest.mark.parametrize("error", [RuntimeError, OSError, MemoryError, RecursionError, KeyError])
def test_no_word_of_an_error_travels(
    error: Any, joined_client: ClientHandler, served: Any, tiny: Path, caplog: Any
) -> None:
    def fail(done: int, steps: int) -> None:
        raise error("On day 3 Dan buys a red cup, says private-place")

    joined_client.listener.step = fail  # type: ignore[method-assign]
    try:
        answer = joined_client.answer(pack(served("fedit").update(0, -1)))
    finally:
        del joined_client.listener.step
    codes, reply = {OSError: "disk", MemoryError: "out_of_memory"}, unpacked(Reply, answer)
    assert reply.failed == codes.get(error, "internal")
    assert not reply.report
    assert not [text for text in secrets(joined_client, tiny) if text in answer]
    assert "On day 3" in caplog.text, "the client's own log has it"


def test_labels_are_reported_only_where_they_are_shared(served: Any, client: Any, tiny: Path) -> None:
    report = ask(client("shy"), served("fedit").join()).report
    assert set(report) == {"examples", "base", "device"}
    report = ask(client("open", policy=replace(UNBOUNDED, share_labels=True)), served("fedit").join()).report
    assert set(report["labels"]) == {"Yes", "Maybe", "No"}
    assert sum(report["labels"].values()) == report["examples"]["train"]
    source = SourceSettings("entail", path=str(tiny / "plain.jsonl"))
    settings = client("free", policy=replace(UNBOUNDED, share_labels=True)).settings
    free = ClientHandler(replace(settings, source=source), ProgressListener())
    assert "labels" not in ask(free, served("fedit").join()).report, "free text is no label"


def changed(settings: dict[str, Any], table: str, **keys: Any) -> dict[str, Any]:
    config = {name: dict(part) for name, part in settings["config"].items()}
    config[table].update(keys)
    return {**settings, "config": config}


@pytest.mark.parametrize(
    ("table", "keys"),
    [
        ("data", {"source": [{"name": "x", "path": "/etc/passwd"}]}),
        ("data", {"manifest": "/etc/passwd"}),
        ("run", {"folder": "/tmp/x"}),
        ("run", {"device": "cuda"}),
        ("run", {"trackers": ["tensorboard"]}),
        ("run", {"unknown": 1}),
        ("method", {"name": "os.system"}),
        ("training", {"local_steps": "many"}),
        ("data", {"templates": {"x": 5}}),
        ("data", {"templates": [1]}),
    ],
)
def test_settings_that_are_the_clients_own_or_none_at_all(
    table: str, keys: dict[str, Any], served: Any, client: Any
) -> None:
    host = client("one")
    reply = ask(host, replace(served("fedit").join(), settings=changed(served("fedit").settings, table, **keys)))
    assert reply.failed == "config"
    assert not Path(host.settings.folder).exists()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"config": {}},
        {"config": 5, "identity": {}},
        {"config": [], "identity": []},
        {"identity": {"weights": "w", "tokenizer": "t", "targets": "s", "more": 1}},
    ],
)
def test_settings_in_another_form(settings: dict[str, Any], served: Any, client: Any) -> None:
    complete = {**served("fedit").settings, **settings} if "config" not in settings and settings else settings
    assert ask(client("one"), Request(RUN_ID, -1, JOIN, settings=complete)).failed == "config"


@pytest.mark.parametrize(
    "name", ["/models/x", "./x", "../x", "~/x", "x/../../y", "C:\\x", "a/b/c", "", "tiny0", "tiny0/base"]
)
def test_a_servers_base_is_never_a_path(name: str, served: Any, tiny: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tiny.parent)
    settings = changed(served("fedit").settings, "base", model=name)
    with pytest.raises(BaseModelError, match="with --base"):
        own_tables(settings, {"name": "x"}, {}, None)
    assert own_tables(settings, {"name": "x"}, {}, "bundled")["base"]["model"] == "bundled"


def test_a_servers_folder_of_its_base_stays_untold(served: Any, tiny: Path) -> None:
    config, identity = served("fedit").config, Identity(**served("fedit").settings["identity"])
    assert Path(config.base.model) == tiny / "base"
    assert str(tiny) not in json.dumps(shared_tables(config, identity))
    public = replace(config, base=replace(config.base, model="some/model"))
    assert shared_tables(public, identity)["config"]["base"]["model"] == "some/model"


def test_a_hub_id_and_the_bundled_base_may_be_named(served: Any) -> None:
    for name in ("meta-llama/Llama-3.2-1B", "gpt2", "bundled"):
        settings = changed(served("fedit").settings, "base", model=name)
        assert own_tables(settings, {"name": "x"}, {}, None)["base"]["model"] == name
    with pytest.raises(ConfigError, match=r"run\.folder"):
        own_tables(changed(settings, "run", folder="x"), {"name": "x"}, {}, None)


@pytest.mark.parametrize("name", ["../../away", "/tmp/away", "..", "a/b", "\n", "x" * 300])
def test_the_runs_name_does_not_lead_out_of_the_clients_folder(
    name: str, served: Any, client: Any, tmp_path: Path
) -> None:
    host = client("inner/one")
    settings = changed(served("fedit").settings, "run", name=name)
    assert ask(host, replace(served("fedit").join(), settings=settings)).failed == "config"
    assert not list(tmp_path.rglob("run.json"))
    assert not list(tmp_path.parent.glob("away*"))


def test_a_restarted_client_finds_its_session_among_other_folders(
    served: Any, client: Any, tiny: Path, monkeypatch: Any, caplog: Any
) -> None:
    """Its base has a path relative to the start folder; a broken run folder is next to its own."""
    shutil.copytree(tiny / "base", Path(client("x").settings.folder).parent / "mine/base")
    monkeypatch.chdir(Path(client("x").settings.folder).parent / "mine")
    server, host = served("fedit"), client("one", base="./base")
    assert ask(host, server.join()).failed is None
    before = ask(host, server.update(0, -1))
    assert host.session is not None
    host.session.lock.close()
    broken = Path(host.settings.folder) / "a-broken-one"
    broken.mkdir()
    (broken / "run.json").write_text("{}")
    monkeypatch.chdir(tiny)
    again = client("one", base="./base")
    assert pack(ask(again, server.update(0, -1))) == pack(before)
    assert "a-broken-one is ignored" in caplog.text


def test_a_restarted_client_whose_base_moved(served: Any, client: Any, tiny: Path, tmp_path: Path) -> None:
    """The run folder records the new location that --base gives; another base is refused."""
    shutil.copytree(tiny / "base", tmp_path / "base")
    server, host = served("fedit"), client("one", base=str(tmp_path / "base"))
    assert ask(host, server.join()).failed is None
    assert host.session is not None
    host.session.lock.close()
    folder, config = host.session.folder.path, (host.session.folder.path / "config.toml").read_bytes()
    (tmp_path / "base").rename(tmp_path / "moved")
    assert ask(client("one", base=str(tmp_path / "base")), server.update(0, -1)).failed == "base"
    again = client("one", base=str(tmp_path / "moved"))
    assert ask(again, server.update(0, -1)).failed is None
    assert load_run_config(RunFolder.open(folder)).base.model == str(tmp_path / "moved")
    assert (folder / "config.toml").read_bytes() == config


def test_a_folder_that_another_process_holds(served: Any, client: Any, caplog: Any) -> None:
    """A second client with the same folder is refused until the first has ended, at every attempt."""
    server, first = served("fedit"), client("one")
    ask(first, server.join())
    second = client("one")
    caplog.set_level(logging.ERROR)
    for _ in range(2):
        assert ask(second, server.update(0, -1)).failed == "config"
    assert first.session is not None
    first.session.lock.close()
    assert ask(second, server.update(0, -1)).failed is None


def test_messages_reach_the_method_unchanged(served: Any) -> None:
    server = served("fedsa_lora")
    message = unpack(type(server.first), tensor_as_bytes(server.update(0, -1).message) or b"")
    assert all(torch.equal(message.tensors[key], tensor) for key, tensor in server.first.tensors.items())


def test_a_prior_whose_network_is_not_one_is_refused_before_training(served: Any, client: Any) -> None:
    server, host = served("fedmap", "method.prior=icnn"), client("one")
    assert ask(host, server.join()).failed is None
    bias = server.first.net["first/bias"]
    for wrong in ({"first/bias": bias * torch.nan}, {"first/bias": bias[:5]}, {"other": bias.clone()}):
        message = replace(server.first, net={**server.first.net, **wrong})
        reply = ask(host, server.update(0, -1, message=bytes_as_tensor(pack(message))))
        assert reply.failed == "bad_request"
    assert not list(Path(host.settings.folder).glob("*/clients/entail/state/*"))
    assert ask(host, server.update(0, -1)).failed is None
