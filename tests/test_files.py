"""Concurrent creation of files and folders, and failing disks."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedamole.errors import RunError, describe_os_error
from fedamole.files import exclusive, new_file, new_folder, write_atomic
from fedamole.runs.identity import Identity
from fedamole.runs.run_folder import RunFolder


def just_before(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[[Any], object]) -> None:
    """Simulate another process that acts just before this one calls a function."""
    real, acted = getattr(owner, name), list[bool]()

    def call(*arguments: Any, **options: Any) -> Any:
        if not acted and act(arguments[0]):
            acted.append(True)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


def test_a_folder_that_another_process_makes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = os.mkdir
    just_before(monkeypatch, os, "mkdir", lambda path: (mkdir(path), True) if str(path).endswith("run") else False)
    with new_folder(tmp_path / "run", numbered=True) as folder:
        assert folder == tmp_path / "run-2"
    with pytest.raises(RunError, match="already exists"), new_folder(tmp_path / "run"):
        pass


def test_many_at_once_get_a_folder_each(tmp_path: Path) -> None:
    result, begin = list[Path](), threading.Barrier(8)

    def claim() -> None:
        begin.wait()
        with new_folder(tmp_path / "runs" / "case", numbered=True) as folder:
            result.append(folder)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in result) == ["case", *(f"case-{number}" for number in range(2, 9))]


def interrupted(_: object = None) -> None:
    raise KeyboardInterrupt


def test_a_folder_in_which_nothing_was_written_is_removed_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "runs" / "case"):
        interrupted()
    assert not (tmp_path / "runs").exists()
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "runs" / "case") as folder:
        interrupted((folder / "config.toml").write_text("begun"))
    assert (tmp_path / "runs" / "case" / "config.toml").exists()


def test_a_file_that_another_process_makes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    just_before(monkeypatch, os, "open", lambda _: path.write_text("theirs"))
    with pytest.raises(RunError, match="already exists and is not overwritten"), new_file(path):
        pass
    assert path.read_text() == "theirs"


def test_a_file_is_taken_before_the_work_and_given_back_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "deep" / "out"):
        interrupted((tmp_path / "deep" / "out").stat())
    assert not (tmp_path / "deep" / "out").exists()


def test_two_runs_in_one_named_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both processes found the name free; the second does not change the file of the first."""
    identity = Identity("w", "t", "x")

    def begin(config: str) -> RunFolder:
        return RunFolder.create(tmp_path / "run", config, "{}", "fedit", identity)

    monkeypatch.setattr(RunFolder, "refuse_existing", lambda _: None)
    begin("a = 1\n")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(RunError, match="already exists"):
        begin("a = 2\n")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    path, errors, begin = tmp_path / "report.html", list[BaseException](), threading.Barrier(6)

    def write(text: str) -> None:
        begin.wait()
        try:
            for _ in range(30):
                write_atomic(path, text)
                assert len(set(path.read_text())) == 1, "one writer's content, whole"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(str(number) * (1000 + number),)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_atomic(path, "new")
    assert describe_os_error(caught.value) == (
        f"{path}: No space left on device; free some space, or choose a folder on another disk"
    )
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]
    folder = RunFolder(tmp_path)
    with pytest.raises(OSError, match="No space") as caught:
        folder.append("metrics.jsonl", [{}])
    assert str(tmp_path / "metrics.jsonl") in describe_os_error(caught.value)


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path / ".lock", "taken"),
        pytest.raises(RunError, match="taken"),
        exclusive(tmp_path / ".lock", "taken"),
    ):
        pass
    with exclusive(tmp_path / ".lock", "taken"):
        pass


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EMFILE, errno.EISDIR, errno.ENOTDIR])
def test_errors_of_the_system_name_path_and_remedy(number: int) -> None:
    text = describe_os_error(OSError(number, os.strerror(number), "some/place"))
    assert text.startswith(f"some/place: {os.strerror(number)}; ")
    assert "\n" not in text
    assert describe_os_error(OSError("odd")) == "odd"
