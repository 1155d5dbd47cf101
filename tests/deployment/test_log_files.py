import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedamole.deployment import log_files
from fedamole.deployment.log_files import rotate, rotating

WRITER = """
import sys, time
with open(sys.argv[1], "ab", buffering=0) as out:
    for line in sys.stdin:
        out.write(line.encode())
        print("written", flush=True)
"""


def contents(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted(path.parent.iterdir())}


def test_a_log_that_another_process_holds_open(tmp_path: Path) -> None:
    """Nothing is lost, there is no hole, and the writer continues in the truncated file."""
    path = tmp_path / "superlink.log"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdin is not None
    assert writer.stdout is not None

    def write(text: str) -> None:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(text + "\n")
        writer.stdin.flush()
        assert writer.stdout.readline() == "written\n"

    write("a" * 50)
    assert not rotate(path, max_bytes=51)
    assert rotate(path, max_bytes=50)
    write("b")
    assert contents(path) == {"superlink.log": "b\n", "superlink.log.1": "a" * 50 + "\n"}
    for letter in "cde":
        assert rotate(path, max_bytes=1, keep=2)
        write(letter)
    assert contents(path) == {"superlink.log": "e\n", "superlink.log.1": "d\n", "superlink.log.2": "c\n"}
    assert path.with_name("superlink.log.1").stat().st_mode & 0o777 == 0o600
    writer.stdin.close()
    assert writer.wait(10) == 0


def test_a_log_that_is_written_all_the_time(tmp_path: Path) -> None:
    path = tmp_path / "gateway.log"
    code = (
        "import sys, time\nwith open(sys.argv[1], 'ab', buffering=0) as out:\n"
        "    for number in range(3000): out.write(b'%06d\\n' % number); time.sleep(0.0002)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    rotations = 0
    while writer.poll() is None:
        rotations += rotate(path, max_bytes=1000, keep=1000)
        time.sleep(0.002)
    numbers = [int(line) for text in contents(path).values() for line in text.splitlines()]
    assert rotations > 10
    assert len(numbers) == len(set(numbers))
    assert set(numbers) <= set(range(3000))
    # What falls into the moment between copy and cut is lost; on a busy machine that moment is longer, but rare.
    assert len(numbers) > 1500


def test_nothing_to_rotate(tmp_path: Path) -> None:
    assert not rotate(tmp_path / "absent.log")
    (tmp_path / "small.log").write_text("x")
    assert not rotate(tmp_path / "small.log")
    with pytest.raises(ValueError, match="keep = 0"):
        rotate(tmp_path / "small.log", keep=0)


def test_a_full_disk_does_not_change_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.log"
    path.write_text("x" * 100)

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with caplog.at_level(logging.WARNING):
        assert not rotate(path, max_bytes=10)
    assert "No space left" in caplog.text
    assert contents(path) == {"a.log": "x" * 100}


def test_a_link_in_the_place_of_a_log_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("x" * 100)
    (tmp_path / "a.log").symlink_to(tmp_path / "other")
    assert not rotate(tmp_path / "a.log", max_bytes=10)
    assert (tmp_path / "other").read_text() == "x" * 100


def test_a_log_of_our_own(tmp_path: Path) -> None:
    handler = rotating(tmp_path / "run.log", max_bytes=30, keep=2)
    for number in range(8):
        handler.emit(logging.LogRecord("x", logging.WARNING, "", 0, f"line {number} of ten or more", (), None))
    handler.close()
    assert sorted(contents(tmp_path / "run.log")) == ["run.log", "run.log.1", "run.log.2"]
    assert "line 7" in (tmp_path / "run.log").read_text()
    assert (log_files.MAX_BYTES, log_files.MAX_OLD_LOGS) == (10 * 2**20, 3)
