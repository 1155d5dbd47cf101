"""The ServerApp, which runs the training loop over Flower's grid in a process that Flower starts."""

import json
import logging
from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid.http_grid import HttpGrid

from fedamole.deployment.flower.inbox import Inbox
from fedamole.deployment.flower.link import FlowerLink
from fedamole.deployment.log_files import rotating
from fedamole.deployment.processes import die_with_parent
from fedamole.deployment.security.keys import load_private, read_passphrase
from fedamole.deployment.security.orders import SignedLink
from fedamole.deployment.server_run import LOG, OUTCOME, TICKET, coordinate
from fedamole.errors import FedamoleError
from fedamole.files import write_atomic
from fedamole.runs.run_folder import SERVER
from fedamole.terminal import PrintableFormatter

log = logging.getLogger(__name__)

app = ServerApp()
no_client = ClientApp()
"""Flower requires a ClientApp; clients of fedamole do not run it."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the run prepared by `fedamole server` in its folder, and write the outcome there."""
    die_with_parent()
    folder = Path(str(context.run_config["folder"]))
    if (folder / SERVER / TICKET).read_text(encoding="utf-8") != context.run_config["ticket"]:
        return  # another submission has replaced this one
    outcome = folder / SERVER / OUTCOME
    # Flower does not show this process's output, so it writes to files that `fedamole server` reads.
    handler = rotating(folder / SERVER / LOG)
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("fedamole").addHandler(handler)
    try:
        path = str(context.run_config["order_key"])
        key = load_private(Path(path), read_passphrase(None)) if path else None
        if not isinstance(grid, HttpGrid):
            raise FedamoleError("unsupported version of flwr: install the version required in pyproject.toml")
        coordinate(SignedLink(FlowerLink(grid, Inbox(grid)), key), folder)
    except FedamoleError as error:
        write_atomic(outcome, json.dumps({"error": str(error), "exit_code": error.exit_code}))
        return
    except Exception:
        log.exception("the run failed unexpectedly")
        write_atomic(outcome, json.dumps({"error": f"unexpected error; see {SERVER}/{LOG}", "exit_code": 1}))
        raise
    write_atomic(outcome, json.dumps({"error": None, "exit_code": 0}))
