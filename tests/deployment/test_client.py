"""What a client leaves on its machine."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fedamole.deployment.client import rendezvous


def test_what_a_killed_client_left_behind_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, living, foreign = (
        tmp_path / name for name in (f"fedamole-{ended.pid}-x", f"fedamole-{os.getppid()}-y", "fedamole-notes-z")
    )
    for path in (killed, living, foreign):
        path.mkdir()
        (path / "secret").write_text("s")
    made = rendezvous()
    assert sorted(tmp_path.iterdir()) == sorted([living, foreign, made])
    assert made.stat().st_mode & 0o077 == 0
    assert made.name.startswith(f"fedamole-{os.getpid()}-")
