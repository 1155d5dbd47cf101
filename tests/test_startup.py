"""Commands that need no PyTorch start without importing it, which would take seconds."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedamole.runs

HEAVY = ("torch", "transformers", "datasets", "peft", "flwr", "scipy", "numpy", "matplotlib", "sklearn")
REPORT_IMPORTS = """
import atexit, sys
atexit.register(lambda: print("IMPORTED", *[name for name in {heavy} if name in sys.modules]))
"""


def imported(code: str) -> list[str]:
    """Run code in a new process; return the heavy packages that it has imported at its end."""
    script = REPORT_IMPORTS.format(heavy=HEAVY) + code
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    marked = [line for line in done.stdout.splitlines() if line.startswith("IMPORTED")]
    assert len(marked) == 1, done.stderr
    assert done.returncode == 0, done.stderr
    return marked[0].split()[1:]


def command(*arguments: object) -> str:
    return f"sys.argv = {['fedamole', *map(str, arguments)]}\nfrom fedamole.cli.main import main\nmain()"


def test_a_heavy_import_would_be_seen() -> None:
    assert imported("import numpy") == ["numpy"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("methods",),
        ("methods", "fedamole", "--json"),
        ("doctor", "--help"),
        ("certs", "--help"),
        ("compare", "--help"),
    ],
    ids=" ".join,
)
def test_commands_without_a_run(arguments: tuple[str, ...]) -> None:
    assert imported(command(*arguments)) == []


def test_show_and_report(runs: Any, tmp_path: Path) -> None:
    folders = [runs("fedit"), runs("fedit", "run.seed=1"), runs("local_only"), runs("local_only", "run.seed=1")]
    assert imported(command("show", *folders)) == []
    assert imported(command("show", *folders, "--markdown")) == []
    assert imported(command("report", *folders, "--out", tmp_path / "report.html")) == []
    assert (tmp_path / "report.html").exists()


def test_the_package_runs() -> None:
    modules = [path.stem for path in Path(fedamole.runs.__file__).parent.glob("*.py") if path.stem != "__init__"]
    assert {"run_folder", "run_files", "checkpoint", "identity"} <= set(modules)
    assert imported("".join(f"import fedamole.runs.{module}\n" for module in modules)) == []
