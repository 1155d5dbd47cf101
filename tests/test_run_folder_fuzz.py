"""Every file of a run's folder, damaged at random or with intent: one clear error, and nothing outside is touched."""

import json
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.received import ReceivedRun, call, received_run

CLIENT = "clients/mood"
FILES = (
    "run.json",
    "config.toml",
    "manifest.json",
    "metrics.jsonl",
    "assignment.jsonl",
    "summary.json",
    "routing.json",
    "trackers.json",
    "audit.json",
    "clients.json",
    "checkpoints/round-0000.json",
    "checkpoints/round-0001.json",
    "checkpoints/round-0001.safetensors",
    f"{CLIENT}/adapter/adapter_config.json",
    f"{CLIENT}/adapter/adapter_model.safetensors",
    f"{CLIENT}/adapter/base_identity.json",
    f"{CLIENT}/adapter/README.md",
    f"{CLIENT}/state/round-0001.safetensors",
    "clients",
    CLIENT,
    f"{CLIENT}/adapter",
    f"{CLIENT}/state",
    "checkpoints",
    ".lock",
    ".summary.json.writing",
)

SCALARS: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    3,
    10**30,
    -(10**30),
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "..",
    "../outside",
    "../../outside",
    "/",
    "{outside}",
    "{outside}/secret.json",
    "a" * 5000,
    "\x1b[2J\u202e\u200b",
    "[link=http://x]y[/link]",
    "</script><img src=x onerror=alert(1)>",
    "\ud800",
    "mood\nmood",
    "MOOD",
    "\x00",
    "$\\frac{",
    "fedamole",
    "cuda:7",
)
VALUES = st.one_of(
    st.sampled_from(SCALARS),
    st.sampled_from(SCALARS).map(lambda value: [value]),
    st.sampled_from(SCALARS).map(lambda value: {"mood": value}),
    st.sampled_from([value for value in SCALARS if isinstance(value, str)]).map(lambda key: {key: 1}),
    st.integers(1, 3).map(lambda power: _nested(10**power)),
    st.just([]),
    st.just({}),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
)
SHARE = st.floats(0, 1, allow_nan=False)
DAMAGES = st.one_of(
    st.tuples(st.just("flip"), SHARE, st.integers(1, 255)),
    st.tuples(st.just("cut"), SHARE),
    st.tuples(st.just("insert"), SHARE, st.binary(min_size=1, max_size=20)),
    st.tuples(
        st.just("content"),
        st.sampled_from(
            [
                b"",
                b"\xff\xfe",
                b"{}",
                b"[]",
                b"null",
                b"[" * 100_000,
                b'{"a":' * 100_000,
                b"\x00" * 100,
                b"x = " + b"[" * 5000,
                b"\xff" * 8 + b"{}",
            ]
        ),
    ),
    st.tuples(st.just("encode"), st.sampled_from(["utf-16", "utf-8-sig", "utf-7"])),
    st.tuples(
        st.just("place"),
        st.sampled_from(
            [
                "gone",
                "folder",
                "link to a file",
                "link to a folder",
                "link to nothing",
                "link to itself",
                "pipe",
            ]
        ),
    ),
    st.tuples(st.just("twice"), SHARE),
    st.tuples(st.just("value"), SHARE, VALUES),
    st.tuples(st.just("value"), SHARE, VALUES),
    st.tuples(st.just("key"), SHARE, st.sampled_from([value for value in SCALARS if isinstance(value, str)])),
    st.tuples(st.just("without"), SHARE),
)


def _nested(depth: int) -> Any:
    result: Any = 1
    for _ in range(min(depth, 400)):
        result = [result]
    return result


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON value, as (container, key)."""
    results = []
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        results += [(value, key), *_nodes(value[key])]
    return results


def _parsed(path: Path) -> tuple[Any, Callable[[Any], bytes]]:
    """The values of a file and how to write them, whatever kind of text it is."""
    content = path.read_bytes()
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        return lines, lambda value: "".join(json.dumps(line) + "\n" for line in value).encode()
    if path.suffix == ".toml":
        return tomllib.loads(content.decode()), lambda value: tomli_w.dumps(value).encode("utf-8", "surrogatepass")
    if path.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])

        def write(value: Any) -> bytes:
            text = json.dumps(value).encode()
            return len(text).to_bytes(8, "little") + text + content[8 + size :]

        return header, write
    return json.loads(content), lambda value: json.dumps(value).encode()


def spoil(folder: ReceivedRun, name: str, damage: tuple[Any, ...]) -> None:
    """Damage a file of the run; what cannot be done to it leaves it as it is."""
    path, (kind, *how) = folder.run / name, damage
    if kind == "place":
        _misplace(folder, path, how[0])
        return
    if not path.is_file():
        return
    content = path.read_bytes()
    at = int(how[0] * max(0, len(content) - 1)) if kind in ("flip", "cut", "insert") else 0
    if kind == "flip" and content:
        path.write_bytes(content[:at] + bytes([content[at] ^ how[1]]) + content[at + 1 :])
    elif kind == "cut":
        path.write_bytes(content[:at])
    elif kind == "insert":
        path.write_bytes(content[:at] + how[1] + content[at:])
    elif kind == "content":
        path.write_bytes(how[0])
    elif kind == "encode":
        path.write_bytes(content.decode("utf-8", "replace").encode(how[0]))
    elif path.suffix != ".md":
        _rewrite(folder, path, kind, how)


def _misplace(folder: ReceivedRun, path: Path, how: str) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how != "gone":
        target = {"link to a file": folder.outside / "secret.json", "link to a folder": folder.outside}
        path.symlink_to(target.get(how, path if "itself" in how else folder.path / "nothing"))


def _rewrite(folder: ReceivedRun, path: Path, kind: str, how: list[Any]) -> None:
    value, write = _parsed(path)
    nodes = _nodes(value)
    if not nodes:
        return
    container, key = nodes[int(how[0] * (len(nodes) - 1))]
    if kind == "value":
        container[key] = json.loads(json.dumps(how[1]).replace("{outside}", str(folder.outside)))
    elif kind == "without":
        del container[key]
    elif kind == "key" and isinstance(container, dict):
        container[how[1].replace("{outside}", str(folder.outside))] = container.pop(key)
    try:
        written = write(value)
    except (TypeError, ValueError):  # TOML has no word for some values
        return
    if kind == "twice" and path.suffix == ".json" and isinstance(container, dict):
        quoted = json.dumps(key).encode() + b": "
        written = written.replace(quoted, quoted + b'"first", ' + quoted, 1)
    path.write_bytes(written)


def damaged(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call a test with so many damaged folders, the same ones in every run."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        few = settings(
            max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=quiet
        )
        return few(given(name=st.sampled_from(FILES), damage=DAMAGES)(test))

    return decorated


@pytest.fixture(scope="module")
def complete(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with every file that one may have."""
    run = Path(shutil.copytree(runs("fedamole", "federation.rounds=2"), tmp_path_factory.mktemp("whole") / "run"))
    modules = {"model.layers.0.self_attn.q_proj": {"1": 0.25, "2": 0.75}}
    (run / "routing.json").write_text(json.dumps({"split": "validation", "clients": {"mood": modules}}))
    attack = {"auroc": 0.6, "error": 0.1, "tpr": 0.0}
    canaries = dict.fromkeys(("bound", "delta"), 0.5) | dict.fromkeys(("canaries", "guesses", "correct", "steps"), 9)
    audited = {
        "canaries": {**canaries, "claimed": 2.0, "noise": 1.0, "noise_repeats": False},
        "membership": {"train": 9, "test": 9, "own": attack, "others": {**attack, "models": 3}},
        "inversion": {"recall": 0.3, "chance": 0.1, "highest": 0.2, "tokens": 9, "vocabulary": 99},
    }
    results = {"clients": {"mood": audited}, "attribute": {"not_applicable": "no groups"}}
    (run / "audit.json").write_text(json.dumps({"format": 1, "method": "fedamole", **results}))
    clients = {"mood": {"examples": {"train": 3}, "labels": {"glad": 2, "sad": 1}}}
    (run / "trackers.json").write_text(json.dumps({"mlflow": {"step": 2, "id": "a1", "finished": True}}))
    (run / "clients.json").write_text(json.dumps(clients))
    return run


@pytest.fixture(scope="module")
def unfinished(complete: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its last round committed and nothing after it."""
    run = Path(shutil.copytree(complete, tmp_path_factory.mktemp("unfinished") / "run"))
    (run / "summary.json").unlink()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["split"] != "test"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return run


def check(run: Path, name: str, damage: tuple[Any, ...], *commands: tuple[str, ...]) -> None:
    """Call commands on a damaged copy; `{run}` and `{out}` in them are its path and that of what is written."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = received_run(Path(temporary) / "arena", run)
        spoil(folder, name, damage)
        before = folder.seen()
        for arguments in commands:
            call(*(argument.format(run=folder.run, out=folder.path / "out") for argument in arguments))
            assert folder.seen() == before, f"{arguments[0]} touched something outside"


SHOW = (("show", "{run}"), ("show", "{run}", "--markdown"), ("report", "{run}", "--out", "{out}"))
GENERATE = (("generate", "{run}", "Ann has", "--client", "mood", "--max-new-tokens", "2"),)
EXPORT = (("export", "{run}", "--client", "mood", "--out", "{out}", "--force", "--tokens", "200"),)
RESUME = (("resume", "{run}"), ("show", "{run}"))


@damaged(80)
def test_tables_and_pages(complete: Path, name: str, damage: Any) -> None:
    check(complete, name, damage, *SHOW)


@damaged(15)
def test_answers(complete: Path, name: str, damage: Any) -> None:
    check(complete, name, damage, *GENERATE)


@damaged(6)
def test_exports(complete: Path, name: str, damage: Any) -> None:
    check(complete, name, damage, *EXPORT)


@damaged(10)
def test_going_on(unfinished: Path, name: str, damage: Any) -> None:
    check(unfinished, name, damage, *RESUME)


@pytest.mark.faults
@damaged(2000)
def test_tables_and_pages_at_length(complete: Path, name: str, damage: Any) -> None:
    check(complete, name, damage, *SHOW)


@pytest.mark.faults
@damaged(500)
def test_models_at_length(complete: Path, name: str, damage: Any) -> None:
    check(complete, name, damage, *GENERATE, *EXPORT)


@pytest.mark.faults
@damaged(400)
def test_going_on_at_length(unfinished: Path, name: str, damage: Any) -> None:
    check(unfinished, name, damage, *RESUME)


def test_an_undamaged_folder_passes(complete: Path, unfinished: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        for at, (run, commands) in enumerate([(complete, (*SHOW, *GENERATE)), (unfinished, RESUME)]):
            folder = received_run(Path(temporary) / str(at), run)
            for arguments in commands:
                result = call(*(argument.format(run=folder.run, out=folder.path / "out") for argument in arguments))
                assert result.code == 0, result.err
