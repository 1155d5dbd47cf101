"""GGUF files as bases: what the converted folder contains, that it is made once, and what cannot be converted."""

import multiprocessing
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedamole.config import load_config, rebased
from fedamole.deployment.shared_config import own_tables, shared_tables
from fedamole.errors import BaseModelError
from fedamole.model import gguf
from fedamole.model.base import BaseSettings, load_base, locate, named_base
from fedamole.model.gguf import cache_folder, converted
from fedamole.model.weightless import weightless_base

from ..gguf_files import write_gguf

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def original(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny / "base", tmp_path_factory.mktemp("gguf") / "tiny.gguf", chat_template="{{ 'hi' }}")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this test."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "fedamole" / "gguf-1"


def test_the_folder_is_the_model_in_bfloat16(tiny: Path, original: Path, cache: Path) -> None:
    folder = converted(original)
    assert folder.parent == cache == cache_folder()
    before = AutoModelForCausalLM.from_pretrained(tiny / "base", dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    states = before.state_dict(), after.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor.bfloat16()), name
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    tokenizers = [AutoTokenizer.from_pretrained(item) for item in (tiny / "base", folder)]
    text = "day 3: who has a red cup? <end>é"
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[1].chat_template == "{{ 'hi' }}"
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("newest", [True, False])
def test_quantised_weights_are_close(
    newest: bool, tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not newest:  # earlier releases of transformers 5 do not have this class, and leave a trace in the config
        monkeypatch.setattr(transformers, "GgufConfig", None)
    folder = converted(write_gguf(tiny / "base", tmp_path / "q8.gguf", quantised=True))
    before, after = (
        AutoModelForCausalLM.from_pretrained(item, dtype=torch.float32).state_dict() for item in (tiny / "base", folder)
    )
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    weight = "model.layers.1.self_attn.q_proj.weight"
    error = (before[weight] - after[weight]).abs().max() / before[weight].abs().max()
    assert 0.001 < error < 0.02


def test_it_is_a_base_like_any_other(original: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copy(original, tmp_path / "mine.GGUF")
    base = load_base(BaseSettings("mine.GGUF"), CPU, tmp_path)
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    assert base.name == str(folder) == locate("mine.GGUF", tmp_path)
    assert base.identity == load_base(BaseSettings(str(folder)), CPU, tmp_path).identity
    planned = weightless_base(BaseSettings("mine.GGUF"), tmp_path)
    assert planned.shapes == base.shapes


def test_relative_paths_start_where_those_of_folders_do(original: Path, tmp_path: Path) -> None:
    tables = rebased({"base": {"model": "sub/x.gguf"}}, tmp_path)
    assert tables["base"]["model"] == str(tmp_path / "sub" / "x.gguf")
    assert named_base("x.gguf") == str(Path.cwd() / "x.gguf")
    assert named_base("owner/name") == "owner/name"


def test_a_server_never_names_a_gguf_file_of_a_client(tiny: Path, original: Path, cache: Path) -> None:
    config = load_config(tiny / "config.toml", [f"base.model={original}"])
    tables = shared_tables(config, load_base(config.base, CPU, Path.cwd()).identity)
    assert tables["config"]["base"]["model"] == ""
    tables["config"]["base"]["model"] = "x.gguf"
    with pytest.raises(BaseModelError, match="give your copy of the same model with --base"):
        own_tables(tables, {"name": "a", "path": "a.jsonl"}, {}, None)
    own = own_tables(tables, {"name": "a", "path": "a.jsonl"}, {}, str(original))
    assert own["base"]["model"] == str(original)


def test_it_is_converted_once_and_then_needs_no_package(
    original: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copy(original, tmp_path / "other-name.gguf"))
    folder = converted(original)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert converted(copy) == folder
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_files_beside_it_do_not_count(tiny: Path, cache: Path, tmp_path: Path) -> None:
    copy = write_gguf(tiny / "base", tmp_path / "tiny.gguf")
    (tmp_path / "chat_template.jinja").write_text("of another model")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "another", "model_max_length": 7}')
    tokenizer = AutoTokenizer.from_pretrained(converted(copy))
    assert (tokenizer.chat_template, tokenizer.eos_token) == (None, "<end>")
    assert tokenizer.model_max_length > 7


def _convert(path: Path, barrier: Any, results: Any) -> None:
    convert = gguf.convert

    def counted(path: Path, target: Path) -> None:
        results.put("converts")
        convert(path, target)

    gguf.convert = counted
    barrier.wait()
    results.put(str(converted(path)))


def test_of_two_processes_one_converts(original: Path, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    children = [context.Process(target=_convert, args=(original, barrier, results)) for _ in range(2)]
    for child in children:
        child.start()
    actual = sorted(results.get(timeout=60) for _ in range(3))
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert actual == [str(converted(original))] * 2 + ["converts"]


def test_an_interrupted_conversion_leaves_nothing_half(
    original: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(gguf, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            converted(original)
    assert [path.suffix for path in cache.iterdir()] in ([], [".lock"])
    folder = converted(original)
    # What a killed process leaves is removed by the next one.
    killed = folder.with_suffix(".unfinished")
    folder.rename(killed)
    (killed / "rest").write_text("half")
    assert converted(original) == folder
    assert not killed.exists()
    assert not (folder / "rest").exists()


def _cut(tiny: Path, path: Path) -> None:
    complete = write_gguf(tiny / "base", path.with_name("whole.gguf")).read_bytes()
    path.write_bytes(complete[:-64])


def _headless(tiny: Path, path: Path) -> None:
    path.write_bytes(b"GGUF")


BROKEN: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing": (lambda tiny, path: None, "x.gguf: No such file or directory; check the path"),
    "a folder of another kind": (lambda tiny, path: path.write_text("hello"), "not a GGUF file; name a .gguf file"),
    "truncated": (_cut, "incomplete or damaged; download or copy it again"),
    "its first bytes": (_headless, "incomplete or damaged; download or copy it again"),
    "unknown": (lambda tiny, path: write_gguf(tiny / "base", path, architecture="clip"), "cannot load it as a causal"),
    "encoder": (lambda tiny, path: write_gguf(tiny / "base", path, architecture="bert"), "cannot load it as a causal"),
    "encoder-decoder": (lambda tiny, path: write_gguf(tiny / "base", path, architecture="t5"), "an encoder-decoder"),
    "a part": (
        lambda tiny, path: write_gguf(tiny / "base", path, left_out="blk.1.attn_v"),
        "no weights for 'model.layers.1.self_attn.v_proj.weight'; download it again, or first merge",
    ),
    "layers without end": (
        lambda tiny, path: write_gguf(tiny / "base", path, layers=10**8),
        "it names 100000000 layers but has .* tensors; download it again",
    ),
    "no weights": (lambda tiny, path: write_gguf(tiny / "base", path, left_out="."), "contains no language model"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_usable_gguf_file(kind: str, tiny: Path, cache: Path, tmp_path: Path) -> None:
    make, error = BROKEN[kind]
    make(tiny, tmp_path / "x.gguf")
    with pytest.raises(BaseModelError, match=error) as caught:
        load_base(BaseSettings("x.gguf"), CPU, tmp_path)
    assert "x.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [path for path in cache.glob("*") if path.suffix != ".lock"]


def test_without_the_package_the_error_names_the_extra(
    original: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BaseModelError, match=r"need the package gguf; in the clone: pip install -e \"\.\[gguf\]\""):
        converted(original)


def test_a_cache_that_cannot_be_written(original: Path, cache: Path) -> None:
    cache.parent.parent.write_text("a file in the place of the folder")
    with pytest.raises(BaseModelError, match=r"cannot be stored in the cache .*Not a directory.*set HF_HOME to a"):
        converted(original)
