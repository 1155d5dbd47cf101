"""The folder of `fedamole choose --out`: one file that names the model of each client, in the run that trained it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from fedamole.errors import RunError
from fedamole.files import new_folder, write_atomic
from fedamole.model.pretrained import CONFIG
from fedamole.reporting.choosing import Choice
from fedamole.runs.run_files import CHOICE
from fedamole.runs.run_folder import RunFolder

FORMAT = 1


def write_choice(folder: Path, choices: Sequence[Choice]) -> None:
    """Write the models that clients chose into a new folder, for `generate`, `serve`, `export` and the other commands.

    The models stay in the folders of their runs, which choice.json names by relative paths. Raises RunError if the
    folder exists, or if a run has no saved model of its client.
    """
    clients = {}
    for choice in choices:
        run, client, variant = RunFolder.open(choice.chosen.run.path), choice.client, choice.chosen.variant
        untuned = client in choice.chosen.untuned
        if not untuned and not (run.adapter(client, variant) / CONFIG).exists():
            reason = (
                "a coordinator's folder holds no personal models; they are saved at the clients"
                if run.kind == "server"
                else "put it back from a copy"
            )
            raise RunError(f"{run.path} has no saved model {variant!r} of {client}: {reason}")
        path = os.path.relpath(run.path.resolve(), folder.resolve())
        clients[client] = {"run": path, "id": run.about["id"], "variant": variant, "untuned": untuned}
    with new_folder(folder):
        write_atomic(folder / CHOICE, json.dumps({"format": FORMAT, "clients": clients}, indent=1) + "\n")
