"""A tiny real base and a small real federation, made on the spot: nothing is downloaded, everything is run."""

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.pairs import pair_rows

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus")
THINGS = ("a red cup", "a blue hat", "two pens", "an old map", "the last pie")

CONFIG = """
[run]
threads = 1
device = "cpu"
group = 2

[base]
model = "base"

[federation]
rounds = 3

[training]
local_steps = 3
batch_size = 2
learning_rate = 0.01
max_length = 96

[evaluation]
max_new_tokens = 4

[data.templates.entail]
prompt = "{premise} Then {hypothesis}\\n"
answer = "{label}"
labels = {0 = "Yes", 1 = "Maybe", 2 = "No"}

[[data.source]]
name = "entail"
path = "entail.jsonl"
template = "entail"

[[data.source]]
name = "mood"
path = "mood.jsonl"

[[data.source]]
name = "chat"
path = "chat.jsonl"

[[data.source]]
name = "plain"
path = "plain.jsonl"

[data.public]
path = "public.jsonl"
"""


def _rows() -> dict[str, list[dict[str, Any]]]:
    """Four clients of different tasks, columns and sizes; every row is another."""
    pairs = [(name, thing) for thing in THINGS for name in NAMES]
    rows: dict[str, list[dict[str, Any]]] = {"entail": [], "mood": [], "chat": [], "plain": []}
    for index, (name, thing) in enumerate(pairs + pairs):
        day = f"day {index}"
        if index < 60:
            label = (index * 7 // 3) % 3
            then = (f"{name} has {thing}.", f"{name} likes it.", f"{name} has nothing.")[label]
            rows["entail"].append({"premise": f"On {day} {name} buys {thing}.", "hypothesis": then, "label": label})
        if index < 40:
            good = index % 3 > 0
            text = f"{day}: {thing} is {'good' if good else 'bad'}, says {name}"
            rows["mood"].append({"text": text, "label_text": "glad" if good else "sad"})
        if index < 50:
            turns = [{"role": "user", "content": f"{day}: who has {thing}? {name} has."}]
            turns.append({"role": "assistant", "content": f"{name} has it"})
            rows["chat"].append({"messages": turns})
        if index < 45:
            rows["plain"].append({"prompt": f"{name} has {thing} on {day} ->\n", "completion": f"{thing} of {name}"})
    return rows


def _write_base(folder: Path, texts: list[str]) -> None:
    """A Llama with random weights and a byte-level BPE tokenizer trained on these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<end>", "<pad>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=raw.get_vocab_size(),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
            eos_token_id=0,
            pad_token_id=1,
            bos_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.toml (4 clients, 3 rounds), its data and its base; read it, do not write to it."""
    folder = tmp_path_factory.mktemp("tiny")
    rows = _rows()
    for name, table in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    prompts = [{"prompt": f"Who of {name} and Ann has {thing} today?\n"} for thing in THINGS for name in NAMES[1:4]]
    (folder / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    _write_base(folder / "base", [str(value) for table in rows.values() for row in table for value in row.values()])
    (folder / "config.toml").write_text(CONFIG)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows()))  # tests/pairs.py
    return folder


@pytest.fixture(scope="session")
def image_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of scripts/make_image_task.py with 40 rows a client; read it, do not write to it."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    from make_image_task import write_task

    folder = tmp_path_factory.mktemp("images")
    write_task(folder, rows=40)
    return folder


def heeding_interrupts() -> None:
    """For `preexec_fn`: a test run in the background of a shell hands its children SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class CommandResult:
    """Output and exit code of a command."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The last line on standard error."""
        return self.err.strip().splitlines()[-1]

    @property
    def error(self) -> str:
        """The error line; empty on success."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == (self.code != 0), (self.code, self.err)
        return lines[0] if lines else ""


def call_command(*arguments: object) -> CommandResult:
    """Call `fedamole` in this process, through the function that the installed script calls."""
    from fedamole.cli import main as cli

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="", write_through=True) for _ in range(2))
    code, threads = 0, torch.get_num_threads()
    with (
        mock.patch.object(sys, "argv", ["fedamole", *map(str, arguments)]),
        mock.patch.dict(os.environ, COLUMNS="200"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        finally:
            torch.set_num_threads(threads)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    assert "Traceback" not in "".join(texts), texts
    return CommandResult(code, *texts)


@pytest.fixture
def fedamole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., CommandResult]:
    """`call_command` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return call_command


def small(method: str) -> list[str]:
    """Overrides that name a method and make it small."""
    from dataclasses import fields

    from fedamole.methods import METHODS

    sizes = {"rank": 2, "alpha": 4, "virtual_tokens": 4, "encoder_hidden_size": 32, "fusion_trials": 10}
    sizes |= {"synthetic_rows": 4, "outer_steps": 2, "condition_size": 16, "dreams": 2, "dream_exchanges": 2}
    sizes |= {"server_steps": 3, "examples_per_class": 2, "real_examples": 4, "new_rows": 1, "max_row_tokens": 8}
    sizes |= {"warmup_rounds": 1, "rare_below": 100}
    known = {field.name for field in fields(METHODS[method])}
    return [
        f"method.name={method}",
        f"run.name={method}",
        *(f"method.{key}={value}" for key, value in sizes.items() if key in known),
    ]


@dataclass(frozen=True)
class Runner:
    """Runs the tiny federation through the real entry point, in this process."""

    config: Path
    folder: Path
    finished: dict[tuple[str, ...], Path]

    def load(self, method: str, *overrides: str) -> Any:
        from fedamole.config import load_config

        return load_config(self.config, [*small(method), *overrides])

    def fresh(self, method: str, *overrides: str, listener: Any = None) -> Path:
        """A new run in a folder of its own."""
        from fedamole.experiment import start
        from fedamole.federation.progress import ProgressListener

        folder = self.free()
        start(self.load(method, *overrides), folder, listener or ProgressListener())
        return folder

    def free(self) -> Path:
        """A folder that does not exist yet."""
        return self.folder / f"run-{len(list(self.folder.iterdir()))}-{os.urandom(4).hex()}"

    def __call__(self, method: str, *overrides: str) -> Path:
        """A finished run, made once for all tests that ask for it: read it, do not write to it."""
        key = (method, *overrides)
        if key not in self.finished:
            self.finished[key] = self.fresh(*key)
        return self.finished[key]


@pytest.fixture(scope="session")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Runs of the tiny federation; `runs("fedit", "federation.rounds=1")` is the folder of a finished one."""
    return Runner(tiny / "config.toml", tmp_path_factory.mktemp("runs"), {})


TIMES = ("seconds", "peak_memory")


def _facts(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in lines]


@pytest.fixture(scope="session")
def facts() -> Callable[[Path], list[dict[str, Any]]]:
    """metrics.jsonl of a run without what the clock and the machine say."""
    return _facts


@pytest.fixture(scope="session")
def remains() -> Callable[[Path], dict[str, Any]]:
    """What two equal runs have in common: metrics, and every other file that holds a result, byte by byte."""

    def read(folder: Path) -> dict[str, Any]:
        kinds = ("checkpoints/*.safetensors", "clients/*/adapter*/*", "clients/*/state/*", "assignment.jsonl")
        files = [path for kind in kinds for path in sorted(folder.glob(kind))]
        return {"metrics": _facts(folder), **{str(path.relative_to(folder)): path.read_bytes() for path in files}}

    return read


@pytest.fixture(scope="session")
def crash(runs: Runner) -> Callable[..., Path]:
    """`crash(point, nth, method, *overrides)`: a run whose process is killed (SIGKILL) at the nth time of a point.

    A point is a method of the run's watcher, or the end of the name of a file that has just been put in place. The
    run is a forked child: libraries are loaded already, and the kill comes at an exact place.
    """
    from fedamole.federation.progress import ProgressListener

    def crashed(point: str, nth: int, method: str, *overrides: str) -> Path:
        folder, calls = runs.free(), 0

        def strike(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)

        def run() -> None:
            from fedamole.experiment import start

            listener = ProgressListener()
            if hasattr(listener, point):
                setattr(listener, point, strike)
            else:

                def struck(move: Callable[[Any, Any], None], source: Any, target: Any) -> None:
                    move(source, target)
                    if str(target).endswith(point):
                        strike()

                setattr(os, "replace", partial(struck, os.replace))  # noqa: B010
                setattr(os, "rename", partial(struck, os.rename))  # noqa: B010
            start(runs.load(method, *overrides), folder, listener)

        child = os.fork()
        if child == 0:
            try:
                run()
            finally:
                os._exit(1)  # it was to be killed before
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{method}: {point} was not called {nth} times"
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert not (folder / "summary.json").exists()
        return folder

    return crashed
