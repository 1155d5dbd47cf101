"""Flower's commands: a process of Flower's finds the next one by its name, and finds here only what it may start."""

import sys
from importlib.metadata import entry_points
from pathlib import Path

SERVERAPP = "flwr-serverapp"
"""The only command that a run of fedamole needs to have started by Flower, at the coordinator."""
KNOWN = frozenset(
    (
        "flower-superexec",
        "flower-superlink",
        "flower-supernode",
        "flwr",
        "flwr-agentapp",
        "flwr-clientapp",
        "flwr-connector",
        "flwr-model",
        "flwr-serverapp",
        "flwr-simulation",
    )
)
"""The commands of Flower 1.41; a test fails where a version has others."""
REFUSAL = """#!{python} -IS
import sys
sys.exit("refused: {name} is a command of Flower's that no run of fedamole uses; somebody has asked for another app")
"""


REAL = """#!{python} -IS
import os, sys
os.execv({path!r}, [{path!r}, *sys.argv[1:]])
"""


def installed() -> set[str]:
    """Names of the commands that Flower's distribution brings here."""
    return {entry.name for entry in entry_points(group="console_scripts") if entry.dist and entry.dist.name == "flwr"}


def allow_only(allowed: str, folder: Path) -> Path:
    """Make a folder for a PATH: one of Flower's commands is the real one, all others end at once and say so."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name in sorted(KNOWN | installed()):
        path = str(Path(sys.executable).parent / name)
        script = REAL if name == allowed else REFUSAL
        (folder / name).write_text(script.format(python=sys.executable, name=name, path=path), encoding="utf-8")
        (folder / name).chmod(0o700)
    return folder
