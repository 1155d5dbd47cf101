"""Restricts the Flower commands that Flower's processes can start: they find commands in the folder created here."""

import sys
from importlib.metadata import entry_points
from pathlib import Path

SERVERAPP = "flwr-serverapp"
"""The only command that Flower must start for a run, at the coordinator."""
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
"""Commands of Flower 1.41; a test fails if another version has different ones."""
REFUSAL = """#!{python} -IS
import sys
sys.exit("refused: fedamole never uses Flower's command {name}; somebody has requested another app")
"""


REAL = """#!{python} -IS
import os, sys
os.execv({path!r}, [{path!r}, *sys.argv[1:]])
"""


def installed() -> set[str]:
    """Return the names of the commands that the installed Flower provides."""
    return {entry.name for entry in entry_points(group="console_scripts") if entry.dist and entry.dist.name == "flwr"}


def allow_only(allowed: str, folder: Path) -> Path:
    """Create a folder for PATH in which one Flower command works and all others exit with an error."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    for name in sorted(KNOWN | installed()):
        path = str(Path(sys.executable).parent / name)
        script = REAL if name == allowed else REFUSAL
        (folder / name).write_text(script.format(python=sys.executable, name=name, path=path), encoding="utf-8")
        (folder / name).chmod(0o700)
    return folder
