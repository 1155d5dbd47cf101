"""The ServerApp: runs the loop over Flower's grid, in a process that Flower starts and ends."""

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
"""Flower wants the name of one; clients of fedamole run none."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what lies ready in the folder that `fedamole server` named, and say there how it ended."""
    die_with_parent()
    folder = Path(str(context.run_config["folder"]))
    if (folder / SERVER / TICKET).read_text(encoding="utf-8") != context.run_config["ticket"]:
        return  # another submission has taken this one's place
    outcome = folder / SERVER / OUTCOME
    # Flower shows nothing of this process; what it has to say goes into files that `fedamole server` reads.
    handler = rotating(folder / SERVER / LOG)
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("fedamole").addHandler(handler)
    try:
        path = str(context.run_config["order_key"])
        key = load_private(Path(path), read_passphrase(None)) if path else None
        if not isinstance(grid, HttpGrid):
            raise FedamoleError("this version of flwr has another grid: install the one that pyproject.toml asks for")
        coordinate(SignedLink(FlowerLink(grid, Inbox(grid)), key), folder)
    except FedamoleError as error:
        write_atomic(outcome, json.dumps({"error": str(error), "exit_code": error.exit_code}))
        return
    except Exception:
        log.exception("the run ended unexpectedly")
        write_atomic(outcome, json.dumps({"error": f"an unexpected error; see {SERVER}/{LOG}", "exit_code": 1}))
        raise
    write_atomic(outcome, json.dumps({"error": None, "exit_code": 0}))
