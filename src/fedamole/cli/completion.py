"""Values that the shell completes: folders of runs, clients of a run, methods. Imports no heavy package."""

import os
from pathlib import Path

from fedamole.errors import FedamoleError
from fedamole.reporting.method_descriptions import method_descriptions
from fedamole.runs.run_folder import MANIFEST, RUN, RunFolder

METHOD_KEY = "method.name="
MOST = 500
"""Maximum number of folders that are looked into."""


def complete_runs(incomplete: str) -> list[str]:
    """Return run folders, and folders that may contain some, whose path begins with the typed text."""
    typed = Path(incomplete)
    parent = typed if incomplete.endswith("/") or not incomplete else typed.parent
    start = "" if incomplete.endswith("/") or not incomplete else typed.name
    try:
        folders = sorted(
            child
            for child in list(parent.iterdir())[:MOST]
            if child.name.startswith(start) and not child.name.startswith(".") and child.is_dir()
        )
    except OSError:
        return []
    runs = [folder for folder in folders if (folder / RUN).exists()]
    containers = [
        folder for folder in folders if folder not in runs and next(folder.glob(f"*/{RUN}"), None) is not None
    ]
    return [*map(str, runs), *(f"{folder}/" for folder in containers)]


def complete_clients(incomplete: str) -> list[str]:
    """Return the clients of the first run that the command line names.

    The parsed arguments are of no use: click drops them while an option still lacks its value.
    """
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    run = next((word for word in line.split() if (Path(word) / RUN).exists()), None)
    if run is None:
        return []
    try:
        clients = RunFolder.open(Path(run)).read_json(MANIFEST)["clients"]
    except (FedamoleError, OSError):
        return []
    names = [client["client"] if isinstance(client, dict) else client for client in clients]
    return sorted(name for name in names if name.startswith(incomplete))


def complete_methods(incomplete: str) -> list[str]:
    """Return the names of methods that begin with the typed text."""
    return [name for name in method_descriptions() if name.startswith(incomplete)]


def complete_overrides(incomplete: str) -> list[str]:
    """Return `method.name=NAME` for the methods that the typed text may mean."""
    if not incomplete or not incomplete.startswith(METHOD_KEY):
        return [METHOD_KEY] if incomplete and METHOD_KEY.startswith(incomplete) else []
    return [f"{METHOD_KEY}{name}" for name in complete_methods(incomplete.removeprefix(METHOD_KEY))]
