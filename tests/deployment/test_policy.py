"""The policy: all settings that a coordinator may request are compared with the client's own limits."""

import copy
import dataclasses
import json
import logging
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedamole.cli.main import app
from fedamole.config import load_config, plain
from fedamole.data.settings import SourceSettings
from fedamole.data.templates import TemplateSettings
from fedamole.deployment.client_handler import ClientHandler
from fedamole.deployment.run_session import ClientSettings
from fedamole.deployment.security.policy import (
    UNBOUNDED,
    PolicySettings,
    default_text,
    read_columns,
    read_policy,
    row_checks,
)
from fedamole.deployment.shared_config import agreed_hash, check_agree, shared_tables
from fedamole.engine.messages import EVALUATE, JOIN, TEST, UPDATE, Reply, Request, unpacked
from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import bytes_as_tensor, pack, tensor_as_bytes, unpack
from fedamole.model.base import load_base
from fedamole.runs.run_files import MAJORITY
from tests.conftest import small

ROWS = 130
RUN_ID = "c0ffee"
FIELDS = [item.name for item in fields(PolicySettings)]


class RecordingListener(ProgressListener):
    """Records what the client prints."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, text: str) -> None:
        self.lines.append(text)


class Asks:
    """An honest coordinator's settings, which tests change, and its requests."""

    def __init__(self, tiny: Path, method: str, *overrides: str) -> None:
        defaults = [
            "deployment.clients=['north']",
            "deployment.min_clients=1",
            "training.local_steps=5",
            "training.batch_size=4",
            "data.validation_share=0.16",
            "data.test_share=0.16",
            "data.embedding_share=0.25",
            "evaluation.max_new_tokens=2",
        ]
        self.config = load_config(tiny / "config.toml", [*small(method), *defaults, *overrides])
        self.base = load_base(self.config.base, torch.device("cpu"), Path.cwd())
        self.settings = shared_tables(self.config, self.base.identity)
        self.settings["config"]["base"]["model"] = "bundled"
        info = ClientInfo("north", 50)
        self.first = self.config.method.message(
            self.config.method.init(Server(BaseInfo(self.base.shapes, 32), (info,), 0)), info
        )

    def join(self, change: Callable[[dict[str, Any]], None] = lambda config: None, run: str = RUN_ID) -> Request:
        settings = copy.deepcopy(self.settings)
        change(settings["config"])
        return Request(run, -1, JOIN, settings=settings)

    def update(self, round_: int, last: int, plus: float = 0.0) -> Request:
        moved = {key: tensor + plus for key, tensor in self.first.tensors.items()}
        return Request(
            RUN_ID, round_, UPDATE, last=last, message=bytes_as_tensor(pack(replace(self.first, tensors=moved)))
        )


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        table = config
        for part in path[:-1]:
            table = table.setdefault(part, {})
        table[path[-1]] = value

    return change


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough rows for 20 in each split, with a column that no built-in template reads."""
    path = tmp_path_factory.mktemp("rows") / "north.jsonl"
    labels, things = ("glad", "sad"), ("a red cup", "a blue hat", "two pens", "an old map")
    path.write_text(
        "".join(
            json.dumps(
                {
                    "text": f"Letter {n}: {things[n % 4]} for day {n * 37 % 101}",
                    "label": labels[n % 3 > 0],
                    "patient": f"patient {n}",
                    "premise": f"On day {n} Ann buys {things[n % 4]}.",
                    "hypothesis": f"{n} it is.",
                }
            )
            + "\n"
            for n in range(ROWS)
        )
    )
    return path


@pytest.fixture(scope="module")
def asks(tiny: Path) -> Callable[..., Asks]:
    created: dict[tuple[str, ...], Asks] = {}

    def of(*overrides: str) -> Asks:
        if overrides not in created:
            created[overrides] = Asks(tiny, *overrides)
        return created[overrides]

    return of


@pytest.fixture
def client(tiny: Path, rows: Path, tmp_path: Path) -> Callable[..., ClientHandler]:
    """Client handlers with the default policy, unless another is given."""

    def of(
        folder: str = "one", template: str = "classification", listener: Any = None, **settings: Any
    ) -> ClientHandler:
        source = SourceSettings("north", path=str(rows), template=template)
        own = {"base": str(tiny / "base"), "device": "cpu", "threads": 1, **settings}
        return ClientHandler(
            ClientSettings(source, folder=str(tmp_path / folder), **own), listener or ProgressListener()
        )

    return of


def ask(host: ClientHandler, request: Request) -> Reply:
    return unpacked(Reply, host.answer(pack(request)))


# --- the file -------------------------------------------------------------------------------------------------


def test_the_default_file_says_what_the_defaults_are(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    result = CliRunner().invoke(app, ["client", "--write-policy", str(path)])
    assert result.exit_code == 0, result.output
    assert path.read_text() == default_text()
    assert read_policy(path) == PolicySettings()
    for name in FIELDS:
        assert f"\n{name} = " in path.read_text() or f"\n# {name} = []" in path.read_text()
    again = CliRunner().invoke(app, ["client", "--write-policy", str(path)])
    assert isinstance(again.exception, ConfigError), "nothing is overwritten"


def test_the_document_has_every_key_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs/consent.md").read_text()
    for name in FIELDS:
        value = getattr(PolicySettings(), name)
        text = str(value).lower() if isinstance(value, bool) else str(value)
        assert f"| `{name}` | {'' if value is None else f'{text} |'}" in page, name


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("min_row = 3", "unknown key policy.min_row; did you mean 'min_rows'"),
        ("max_rank = 'many'", "policy.max_rank = 'many': must be a whole number"),
        ("max_rank = 0", "policy.max_rank = 0: must be at least 1"),
        ("min_steps = 9\nmax_steps = 8", "policy.min_steps = 9 is above policy.max_steps = 8"),
        ("min_rows = -1", "policy.min_rows = -1: must not be negative"),
        ("methods = ['fedmole']", "there is no method 'fedmole'; did you mean 'fedamole'"),
        ("min_rows = ", "is not TOML"),
    ],
)
def test_a_wrong_key_or_value_is_named(text: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=error.replace("(", r"\(")) as caught:
        read_policy(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_policy(tmp_path / "other.toml")


# --- what a coordinator may ask ------------------------------------------------------------------------------


def test_an_honest_run_passes_the_default_policy_and_is_shown(asks: Any, client: Any) -> None:
    """Train 46, embedding 16 .. by these shares of 130 rows every split has 20 rows, but for fedamole's embedding."""
    listener = RecordingListener()
    host = client(listener=listener)
    server = asks("fedit")
    joined = ask(host, server.join())
    assert joined.failed is None
    assert all(joined.report["examples"][split] >= 20 for split in ("train", "validation", "test"))
    assert listener.lines[0] == f"run fedit, settings {agreed_hash(server.settings)}"
    shown = "\n".join(listener.lines)
    assert "ok       rank: requested 2; allowed at most 64 (max_rank)" in shown
    assert "ok       rows in the train split: requested" in shown
    assert "REFUSED" not in shown
    assert "The coordinator gets each client's own part before it is averaged" in shown
    assert ask(host, server.update(0, -1)).failed is None


@pytest.mark.parametrize(
    ("method", "budget", "steps"),
    [
        ("ditto", "steps", 1200),
        ("ditto", "paper", 2400),
        ("fedit", "paper", 1200),
    ],
)
def test_the_steps_that_a_policy_bounds_are_those_of_the_budget(
    method: str, budget: str, steps: int, tiny: Path
) -> None:
    overrides = [*small(method), "training.local_steps=1200", f"training.budget={budget}"]
    rows = {"train": 500, "embedding": 50, "validation": 50, "test": 50}
    items = row_checks(load_config(tiny / "config.toml", overrides), rows, PolicySettings())
    (most,) = [item for item in items if item.setting == "steps of a round" and "max_steps" in item.allowed]
    assert (most.requested, most.passes) == (str(steps), steps <= 2000)
    (read,) = [item for item in items if "max_examples_per_update" in item.allowed]
    assert read.requested == str(2 * steps), "batches of two rows"


ASKED: dict[str, tuple[str, Callable[[dict[str, Any]], None], str, str]] = {
    # of the attack's list: the code that the server gets, and what the client's own log says
    "a rank that no memory holds": ("fedit", put("method", "rank", value=10**7), "policy", "max_rank"),
    "10^5 rounds": ("fedit", put("federation", "rounds", value=10**5), "policy", "max_rounds"),
    "10^9 new tokens": ("fedit", put("evaluation", "max_new_tokens", value=10**9), "policy", "max_new_tokens"),
    "10^6 tokens of text": ("fedit", put("training", "max_length", value=10**6), "policy", "max_length"),
    "one step": ("fedit", put("training", "local_steps", value=1), "policy", "min_steps"),
    "10^9 steps": ("fedit", put("training", "local_steps", value=10**9), "policy", "max_steps"),
    "one row in a batch": ("fedit", put("training", "batch_size", value=1), "policy", "min_examples_per_update"),
    "10^9 rows in a batch": ("fedit", put("training", "batch_size", value=10**9), "policy", "max_batch_tokens"),
    "a step that destroys all": ("fedit", put("training", "learning_rate", value=1e28), "policy", "max_learning_rate"),
    "gradients clipped to nothing": ("fedit", put("training", "clip_norm", value=1e-10), "policy", "min_clip_norm"),
    "a decay that leaves the last step alone": (
        "fedalt",
        put("method", "weight_decay", value=100.0),
        "config",
        "method.weight_decay = 100.0",
    ),
    "a scaling beyond all measure": ("fedit", put("method", "alpha", value=1e30), "policy", "max_scaling"),
    "accuracy of every round": ("fedit", put("evaluation", "select", value="score"), "policy", "share_majority"),
    "no scaling": ("fedit", put("method", "alpha", value=1e-9), "policy", "min_scaling"),
    "one row of validation": ("fedit", put("data", "validation_share", value=0.001), "policy", "validation split"),
    "one row of test": ("fedit", put("data", "test_share", value=0.001), "policy", "rows in the test split"),
    "nearly all for validation": ("fedit", put("data", "validation_share", value=0.7), "policy", "train split"),
    "an embedding split of one row": ("fedamole", put("data", "embedding_cap", value=1), "policy", "embedding split"),
    "a look at one row": ("ifca_lora", put("method", "probe_examples", value=1), "policy", "probe_examples"),
    "base = /etc": ("fedit", put("base", "model", value="/etc"), "base", "is a folder or a file"),
    "base = ../../etc": ("fedit", put("base", "model", value="../../etc"), "base", "is a folder or a file"),
    "base = ~/x": ("fedit", put("base", "model", value="~/x"), "base", "is a folder or a file"),
    "base = file:///etc": ("fedit", put("base", "model", value="file:///etc"), "base", "is a folder or a file"),
    "a base from the hub": ("fedit", put("base", "model", value="evil/model"), "policy", "hub_base"),
    "the client's source": ("fedit", put("data", "source", value=[{"name": "x", "path": "x"}]), "config", "data."),
    "a manifest": ("fedit", put("data", "manifest", value="/etc/passwd"), "config", "data.manifest"),
    "the client's folder": ("fedit", put("run", "folder", value="/tmp/x"), "config", "run.folder"),
    "the client's device": ("fedit", put("run", "device", value="cuda"), "config", "run.device"),
    "a table of its own": ("fedit", put("deployment", value={"clients": []}), "config", "not in the expected form"),
    "an unknown key": ("fedit", put("training", "\x1b]0;P\x07\x1b[2Jx", value=1), "config", r"\x1b]0;P\x07\x1b[2Jx"),
    "an unknown method": ("fedit", put("method", "name", value="\x1b[31mevil"), "config", r"\x1b[31mevil"),
}


@pytest.mark.parametrize("what", ASKED)
def test_what_is_asked_too_much_is_refused_and_named_here_alone(what: str, asks: Any, client: Any, caplog: Any) -> None:
    method, change, code, named = ASKED[what]
    host = client(**({"base": None} if "base" in what else {}))
    answer = host.answer(pack(asks(method).join(change)))
    reply = unpacked(Reply, answer)
    assert (reply.failed, reply.report, reply.scores, reply.reply) == (code, {}, {}, {})
    assert named in caplog.text
    assert "\x1b" not in caplog.text
    assert not Path(host.settings.folder).exists(), "nothing was begun"


def test_what_is_asked_and_harmless(asks: Any, client: Any, tmp_path: Path) -> None:
    """Names that are paths or control a terminal are refused; a template that the client did not select is not used."""
    for number, name in enumerate(("../../../../tmp/pwn/x", "\x1b]0;pwned\x07\x1b[31m[link=http://evil]x")):
        listener = RecordingListener()
        host = client(f"in/{number}", listener=listener)
        assert ask(host, asks("fedit").join(put("run", "name", value=name))).failed == "config"
        assert "\x1b" not in "".join(listener.lines)
        assert host.session is None
        assert not list(tmp_path.rglob("run.json"))
    foreign = put("data", "templates", value={"triage": {"prompt": "{patient}", "answer": "{label}"}})
    host = client("in/t")
    assert ask(host, asks("fedit").join(foreign)).failed is None
    assert host.session is not None
    assert not any("patient" in example.prompt for example in host.session.data.train.examples)


def test_a_template_of_the_coordinators_reads_allowed_columns_only(asks: Any, client: Any, caplog: Any) -> None:
    def sent(prompt: str) -> Request:
        complete: Request = asks("fedit").join(
            put("data", "templates", value={"triage": {"prompt": prompt, "answer": "{label}"}})
        )
        return complete

    assert ask(client("a", template="triage"), sent("{patient}: {text}")).failed == "policy"
    assert "columns of template triage: requested label, patient, text" in caplog.text
    assert ask(client("b", template="triage"), sent("{text}")).failed is None
    allowed = PolicySettings(columns=("text", "label", "patient"))
    assert ask(client("c", template="triage", policy=allowed), sent("{patient}: {text}")).failed is None
    assert (
        ask(client("d", template="triage", policy=PolicySettings(templates=("alpaca",))), sent("{text}")).failed
        == "policy"
    )


def test_a_client_with_a_single_label_says_what_the_coordinator_has_to_write(
    asks: Any, client: Any, caplog: Any, tmp_path: Path, rows: Path
) -> None:
    path = tmp_path / "glad.jsonl"
    path.write_text("".join(line for line in rows.read_text().splitlines(keepends=True) if '"glad"' in line))

    def host(folder: str, template: str) -> ClientHandler:
        handler: ClientHandler = client(folder, template)
        policy = PolicySettings(min_rows=1, min_examples_per_update=1)
        source = replace(handler.settings.source, path=str(path))
        return ClientHandler(replace(handler.settings, source=source, policy=policy), ProgressListener())

    refused = ask(host("a", "classification"), asks("fedit").join())
    assert refused.failed is not None
    assert "glad" not in repr(refused), "labels stay here"
    assert "in a deployment, the coordinator's" in caplog.text
    assert 'options = ["glad", ...]' in caplog.text
    task = {"prompt": "Text: {text}\nClass:\n", "answer": "{label}", "options": ["glad", "sad"]}
    joined = ask(host("b", "task"), asks("fedit").join(put("data", "templates", value={"task": task})))
    assert joined.failed is None, caplog.text


def test_a_template_reads_the_columns_of_its_category() -> None:
    assert read_columns(TemplateSettings("{text}", "{label}", category="{patient}")) == {"text", "label", "patient"}


def test_a_dropped_column_is_none_that_a_template_may_read(asks: Any, client: Any, caplog: Any) -> None:
    template = put("data", "templates", value={"triage": {"prompt": "{patient}", "answer": "{label}"}})
    host = client("drop", template="triage")
    host = ClientHandler(
        replace(host.settings, source=replace(host.settings.source, columns={"patient": ""})), ProgressListener()
    )
    assert ask(host, asks("fedit").join(template)).failed == "policy"
    assert "columns of template triage: requested label, patient" in caplog.text


def test_synthetic_examples_are_sent_only_if_the_client_allows_it(asks: Any, client: Any, caplog: Any) -> None:
    own: dict[str, Any] = {"share_synthetic": True, "min_rows": 21}
    coordinator = asks("feddm", "method.min_class_examples=21")
    assert ask(client("default"), coordinator.join()).failed == "policy"
    assert "sending synthetic examples: requested yes, allowed no; share_synthetic = true allows it" in caplog.text
    assert ask(client("allows", policy=PolicySettings(**own)), coordinator.join()).failed is None
    assert ask(client("few", policy=PolicySettings(**own)), asks("feddm").join()).failed == "policy"
    assert "rows behind synthetic examples: requested 2, allowed at least 21 (min_rows)" in caplog.text


def test_every_key_of_the_policy_forbids_something(asks: Any, client: Any) -> None:
    """The honest run of the first test, with one limit of the policy just below or above its value."""
    limits: dict[str, Any] = {
        "methods": ("fedamole",),
        "max_rank": 1,
        "min_scaling": 2.1,
        "min_steps": 6,
        "max_steps": 4,
        "min_examples_per_update": 21,
        "max_examples_per_update": 19,
        "min_rows": 22,
        "max_rounds": 2,
        "max_length": 95,
        "max_new_tokens": 1,
        "templates": ("alpaca",),
        "max_disk_mib": 1,
        "max_scaling": 1.9,
        "max_learning_rate": 0.009,
        "max_batch_tokens": 383,
    }
    fitting: dict[str, Any] = {
        "methods": ("fedit",),
        "max_rank": 2,
        "min_scaling": 2.0,
        "min_steps": 5,
        "max_steps": 5,
        "min_examples_per_update": 20,
        "max_examples_per_update": 20,
        "min_rows": 21,
        "max_rounds": 3,
        "max_length": 96,
        "max_new_tokens": 2,
        "templates": ("classification",),
        "max_scaling": 2.0,
        "max_learning_rate": 0.01,
        "max_batch_tokens": 384,
    }
    others = {
        "columns",
        "hub_base",
        "share_labels",
        "share_majority",
        "share_synthetic",
        "min_clip_norm",
    }  # in tests of their own
    assert set(limits) | others == set(FIELDS)
    low: dict[str, Any] = {"min_steps": 0, "min_examples_per_update": 0}
    for number, (key, value) in enumerate(limits.items()):
        host = client(str(number), policy=replace(PolicySettings(**low), **{key: value}))
        if key == "max_disk_mib":
            big = Path(host.settings.folder) / "old/clients/north/state"
            big.parent.mkdir(parents=True)
            big.write_bytes(b"\0" * (1 << 20) + b"\0")
        assert ask(host, asks("fedit").join()).failed == "policy", key
    host = client("fits", policy=replace(PolicySettings(**low), **fitting))
    assert ask(host, asks("fedit").join()).failed is None


def test_a_stricter_policy_ends_a_run_that_is_under_way(asks: Any, client: Any) -> None:
    server, host = asks("fedit"), client()
    ask(host, server.join())
    assert host.session is not None
    host.session.lock.close()
    assert ask(client(policy=PolicySettings(max_rank=1)), server.update(0, -1)).failed == "policy"
    assert ask(client(), server.update(0, -1)).failed is None


def test_rounds_are_counted_however_they_are_called(asks: Any, client: Any, caplog: Any) -> None:
    """A round may be repeated with another message, but the total number of replies is limited."""
    server, host = asks("fedit"), client(policy=PolicySettings(max_rounds=3))
    ask(host, server.join())
    done = [ask(host, server.update(0, -1, plus=number / 10)).failed for number in range(4)]
    assert done == [None, None, None, "policy"]
    assert "requested update 3 times" in caplog.text
    assert ask(host, server.update(0, -1, plus=0.2)).failed is None, "the last answer is repeated, which tells nothing"
    message = server.update(0, -1).message
    scored = [ask(host, Request(RUN_ID, 0, EVALUATE, "fedit", last=0, message=message)).failed for _ in range(4)]
    assert scored == [None, None, None, "policy"]


def test_the_test_split_is_answered_once(asks: Any, client: Any, caplog: Any) -> None:
    """Requests for other models, later, or after a restart, get the first reply again, except for the round."""
    caplog.set_level(logging.INFO)
    server, host = asks("fedit"), client()
    ask(host, server.join())
    ask(host, server.update(0, -1))
    first = ask(host, Request(RUN_ID, 0, TEST, last=0, best={"fedit": 0}))
    assert first.failed is None
    evaluated = Request(RUN_ID, 1, EVALUATE, "fedit", last=1, message=server.update(0, -1, plus=0.3).message)
    assert ask(host, server.update(1, 0, plus=0.3)).failed is None
    assert ask(host, evaluated).failed is None
    assert host.session is not None
    fresh = host.session.worker.evaluator.test_last([host.session.data], "fedit")["north"]
    again = ask(host, Request(RUN_ID, 1, TEST, last=1, best={"fedit": 1}))
    assert again == replace(first, round=1)
    assert again.scores["fedit/last"] != fresh, "another model has another score, which is not told"
    host.session.lock.close()
    assert ask(client(), Request(RUN_ID, 1, TEST, last=1)).scores == first.scores
    assert "sending the stored reply" in caplog.text


def test_the_mix_of_labels_stays_here_unless_it_is_shared(asks: Any, client: Any) -> None:
    for number, (share, reported) in enumerate(((False, False), (True, True))):
        server, host = asks("fedit"), client(str(number), policy=PolicySettings(share_majority=share))
        ask(host, server.join())
        ask(host, server.update(0, -1))
        scores = ask(host, Request(RUN_ID, 0, TEST, last=0)).scores
        assert (MAJORITY in scores) == reported
        own = json.loads((Path(host.settings.folder) / "fedit-north/summary.json").read_text())
        assert "majority" in own["rows"], "the client itself sees it"


# --- consent to one run ----------------------------------------------------------------------------------------


def test_only_the_run_that_was_agreed_on(asks: Any, client: Any, caplog: Any, tmp_path: Path) -> None:
    server = asks("fedit")
    full_hash = agreed_hash(server.settings)
    assert len(full_hash) == 64
    host = client("a", agree=check_agree(full_hash.upper()))
    assert ask(host, server.join(put("training", "learning_rate", value=0.02))).failed == "policy"
    assert f"--agree allows only {full_hash}" in caplog.text
    assert not (tmp_path / "a").exists()
    assert ask(host, server.join()).failed is None
    assert host.session is not None
    host.session.lock.close()
    log = str(tmp_path / "home" / "audit.jsonl")
    for run, failed in (("b" * 32, None), ("c" * 32, "policy"), ("b" * 32, None)):
        again = client("again", agree=full_hash, audit=log)
        join = dataclasses.replace(server.join(), run=run)
        assert ask(again, join).failed == failed, "one run with the agreed settings, and no second one"
        if again.session is not None:
            again.session.lock.close()
    other = client("a", agree="0" * 64)
    assert ask(other, server.update(0, -1)).failed == "policy", "also for a run that is under way"


def test_settings_do_not_change_under_way(asks: Any, client: Any, caplog: Any) -> None:
    server, host = asks("fedit"), client()
    assert ask(host, server.join()).failed is None
    assert ask(host, server.join()).failed is None
    assert ask(host, server.join(put("training", "local_steps", value=6))).failed == "policy"
    assert "settings differ from those this run began with" in caplog.text


def test_the_hash_covers_all_shared_settings(asks: Any) -> None:
    settings = asks("fedit").settings
    wired = json.loads(json.dumps(settings))
    assert agreed_hash(wired) == agreed_hash(settings), "the same on both sides of the wire"
    turned = {key: settings[key] for key in reversed(settings)}
    assert agreed_hash(turned) == agreed_hash(settings)
    hashes = {agreed_hash(settings)}
    for table, values in settings["config"].items():
        for key in values:
            changed = copy.deepcopy(settings)
            changed["config"][table][key] = "other"
            hashes.add(agreed_hash(changed))
    assert len(hashes) == 1 + sum(map(len, settings["config"].values()))


@pytest.mark.parametrize("given", ["abc", "0" * 63, "g" * 64, "0" * 65, "../../x", " " * 64])
def test_what_is_no_hash_cannot_be_agreed_on(given: str) -> None:
    with pytest.raises(ConfigError, match="give the complete hash"):
        check_agree(given)


# --- reading words by settings alone -----------------------------------------------------------------------------


def read_words(host: ClientHandler, tiny: Path, **settings: Any) -> tuple[str | None, list[int]]:
    """The attack: LoRAs with A = 0 and random B, trained so little that what comes back is a sum of outer products of
    the words read. Returns why the client refused, or the token ids whose embedding lies in the row space of A.
    """
    config = load_config(
        tiny / "config.toml",
        [
            "method.name=fedit",
            "method.rank=64",
            f"method.alpha={settings['alpha']}",
            "method.dropout=0.0",
            f"training.local_steps={settings['steps']}",
            f"training.batch_size={settings['batch']}",
            f"training.learning_rate={settings['rate']}",
            "base.model=bundled",
            "training.lr_decay=1.0",
            "data.validation_share=0.16",
            "data.test_share=0.16",
            "deployment.clients=['north']",
            "deployment.min_clients=1",
        ],
    )
    base = load_base(config.base, torch.device("cpu"), Path.cwd())
    tables = shared_tables(config, base.identity)
    tables["config"]["data"]["templates"] = {"triage": {"prompt": "{text}", "answer": "{label}"}}
    joined = ask(host, Request(RUN_ID, -1, JOIN, settings=tables))
    if joined.failed is not None:
        return joined.failed, []
    generator, tensors = torch.Generator().manual_seed(0), {}
    for module, (d_in, d_out) in base.shapes.items():
        tensors[f"{module}/shared/A"] = torch.zeros(64, d_in)
        tensors[f"{module}/shared/B"] = settings["scale"] * torch.randn(d_out, 64, generator=generator)
    message = config.method.records.message(tensors)
    reply = ask(host, Request(RUN_ID, 0, UPDATE, message=bytes_as_tensor(pack(message))))
    assert reply.failed is None
    trained = unpack(config.method.records.reply, tensor_as_bytes(reply.reply) or b"")
    module = next(name for name in base.shapes if "layers.0." in name and "v_proj" in name)
    parts = torch.linalg.svd(trained.tensors[f"{module}/shared/A"].double(), full_matrices=False)
    rank = int((parts.S / parts.S[0]).gt(1e-5).sum())
    directions = parts.Vh[:rank]
    layer = base.model.model.layers[0]
    directions_of_tokens = layer.input_layernorm(base.model.get_input_embeddings().weight.float()).detach().double()
    directions_of_tokens = directions_of_tokens / directions_of_tokens.norm(dim=1, keepdim=True)
    left = (directions_of_tokens - (directions_of_tokens @ directions.T) @ directions).norm(dim=1)
    return None, torch.nonzero(left < 1e-2).flatten().tolist()


ATTACK = {"alpha": 1e-9, "steps": 1, "batch": 1, "rate": 1.0, "scale": 1.0}


def test_words_cannot_be_read_by_settings(tiny: Path, client: Any) -> None:
    """Without a policy the attack names the words of one record; the default policy refuses it, by three limits
    of which each would do.
    """
    host = client("open", template="triage", base=None, policy=UNBOUNDED)
    refused, tokens = read_words(host, tiny, **ATTACK)
    assert refused is None
    assert host.session is not None
    read = [{*row.prompt, *row.answer} for row in host.session.data.train.rows]
    assert 8 < len(tokens) < 40
    assert any(set(tokens) <= ids for ids in read), "all of them are words of one and the same record"

    policies = {"default": PolicySettings()} | {
        key: replace(UNBOUNDED, **{key: getattr(PolicySettings(), key)})
        for key in ("min_scaling", "min_steps", "min_examples_per_update")
    }
    for key, policy in policies.items():
        host = client(key, template="triage", base=None, policy=policy)
        assert read_words(host, tiny, **ATTACK)[0] == "policy", key


def test_within_the_policy_the_attack_names_nobody(tiny: Path, client: Any) -> None:
    """The most that the policy lets through: the same linear step by a tiny B and rate, over 20 rows in five steps.
    A has 64 rows and those 20 rows have more words, so that no word's embedding lies in its row space: none is named.
    """
    refused, tokens = read_words(
        client(template="triage", base=None), tiny, alpha=0.64, steps=5, batch=4, rate=1e-9, scale=1e-6
    )
    assert (refused, tokens) == (None, [])


def test_a_policy_reaches_the_worker_unchanged() -> None:
    """The command hands it over as JSON."""
    from fedamole.config import build

    policy = PolicySettings(max_rank=3, columns=("a", "b"), share_labels=True)
    table = json.loads(json.dumps({"source": {"name": "x", "path": "y"}, "policy": plain(policy)}))
    assert build(ClientSettings, table, "client").policy == policy
    assert math.isclose(policy.min_scaling, 0.01)
