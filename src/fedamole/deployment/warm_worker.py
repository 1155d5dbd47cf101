"""A client's worker process, which keeps the base in memory and the client's state on disk.

`python -m fedamole.deployment.warm_worker SETTINGS.json`, started by `fedamole client`. It handles one request at a
time over a Unix socket, which only its user can use, and only with the secret.
"""

import json
import logging
import sys
from multiprocessing import AuthenticationError
from multiprocessing.connection import Listener
from pathlib import Path

from fedamole.config import build
from fedamole.deployment.client_handler import ClientHandler
from fedamole.deployment.run_session import ClientSettings
from fedamole.deployment.security.audit_log import AuditError
from fedamole.errors import FedamoleError
from fedamole.federation.progress import PlainProgress
from fedamole.model.base import resolve_device
from fedamole.terminal import set_up

log = logging.getLogger(__name__)


def serve(handler: ClientHandler, address: str, secret: bytes) -> None:
    """Handle requests forever; a connection without the secret, or one that breaks, does not end the worker.

    If the audit log cannot be written, the connection is closed without a reply.
    """
    Path(address).unlink(missing_ok=True)  # left behind by a worker that was killed
    with Listener(address, family="AF_UNIX", authkey=secret) as listener:
        while True:
            try:
                with listener.accept() as connection:
                    answer = handler.answer(connection.recv_bytes())
                    connection.send_bytes(answer)
            except AuditError as error:  # no reply without an audit log entry
                log.error("%s", error)
            except (AuthenticationError, EOFError, OSError) as error:
                log.warning("a connection was lost (%s)", type(error).__name__)


def main() -> None:
    """Read the settings file and serve."""
    console = set_up()
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        client = build(ClientSettings, settings["client"], "client")
        resolve_device(client.device)
    except FedamoleError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)
    serve(ClientHandler(client, PlainProgress(console)), settings["socket"], Path(settings["secret"]).read_bytes())


if __name__ == "__main__":
    main()
