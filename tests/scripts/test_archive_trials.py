"""Archives of finished trials: what is packed, how folders are named, and what unpacking refuses."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "archive_trials.py"


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def make_trial(folder: Path, data: Path, finished: bool = True) -> None:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f'[base]\nmodel = "{data}/base"\n')
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "checkpoint.safetensors").write_bytes(b"\0" * 10)
    if finished:
        (folder / "summary.json").write_text("{}\n")


def test_finished_trials_travel_without_models_and_paths(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    make_trial(here / "runs/small/fedit-s0", here / "shared")
    make_trial(here / "runs/small/fedit-s1", here / "shared", finished=False)
    packed = call(here, "pack", "a.tar.xz", "runs/small", "--name", "SHARED=shared")
    assert packed.returncode == 0, packed.stderr
    assert packed.stdout == "a.tar.xz: 1 trials\n"
    with tarfile.open(here / "a.tar.xz") as archive:
        assert sorted(archive.getnames()) == [
            "runs/small/fedit-s0/config.toml",
            "runs/small/fedit-s0/metrics.jsonl",
            "runs/small/fedit-s0/summary.json",
        ]
        content = archive.extractfile("runs/small/fedit-s0/config.toml")
        assert content is not None
        assert content.read() == b'[base]\nmodel = "SHARED/base"\n'
    there.mkdir()
    for _ in range(2):  # a second time changes nothing
        unpacked = call(there, "unpack", "../here/a.tar.xz", "--name", "SHARED=../data")
        assert unpacked.returncode == 0, unpacked.stderr
    assert (there / "runs/small/fedit-s0/config.toml").read_text() == f'[base]\nmodel = "{tmp_path}/data/base"\n'


def test_an_archive_writes_only_files_of_trials_below_the_current_directory(tmp_path: Path) -> None:
    for name in ("../summary.json", os.fspath(tmp_path / "summary.json"), "runs/a/run.sh"):
        archive = tmp_path / "a.tar.xz"
        with tarfile.open(archive, "w:xz") as target:
            entry = tarfile.TarInfo(name)
            entry.size = 2
            target.addfile(entry, io.BytesIO(b"{}"))
        folder = tmp_path / "empty"
        folder.mkdir(exist_ok=True)
        refused = call(folder, "unpack", "../a.tar.xz")
        assert refused.returncode == 1
        assert "is not a file of a trial of at most 64 MiB; nothing was written" in refused.stderr
        assert not list(folder.rglob("*"))
        assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (tarfile.SYMTYPE, b"", "is not a file of a trial"),
        (tarfile.DIRTYPE, b"", "is not a file of a trial"),
        (tarfile.REGTYPE, b"\xff", "is not text in UTF-8; nothing was written"),
    ],
)
def test_links_folders_and_other_bytes_are_refused_in_one_line(
    tmp_path: Path, kind: bytes, content: bytes, message: str
) -> None:
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as target:
        entry = tarfile.TarInfo("runs/a/summary.json")
        entry.type, entry.linkname, entry.size = kind, "../../secret", len(content)
        target.addfile(entry, io.BytesIO(content))
    refused = call(tmp_path, "unpack", "a.tar.xz")
    assert refused.returncode == 1
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("unpack", "missing.tar.xz"), "No such file or directory"),
        (("pack", "a.tar.xz", "missing"), "missing: give a folder of runs"),
        (("pack", "a.tar.xz", ".", "--name", "SHARED"), "--name must be NAME=FOLDER"),
    ],
)
def test_a_mistake_gets_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    refused = call(tmp_path, *arguments)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_nothing_that_exists_is_overwritten(tmp_path: Path) -> None:
    make_trial(tmp_path / "runs/fedit-s0", tmp_path / "shared")
    assert call(tmp_path, "pack", "a.tar.xz", "runs").returncode == 0
    (tmp_path / "runs/fedit-s0/summary.json").write_text('{"changed": 1}\n')
    refused = call(tmp_path, "unpack", "a.tar.xz")
    assert "exists with other content; nothing was written" in refused.stderr
    assert (tmp_path / "runs/fedit-s0/summary.json").read_text() == '{"changed": 1}\n'
