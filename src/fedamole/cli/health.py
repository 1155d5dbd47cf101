"""`fedamole health`. Large packages are imported only when the command runs."""

from pathlib import Path
from typing import Annotated

import typer

from fedamole.terminal import say


def health(
    target: Annotated[
        str,
        typer.Argument(
            envvar="FEDAMOLE_HEALTH",
            help="HOST:PORT of a coordinator, or a client's home folder: runs/.client-NAME.",
        ),
    ],
    certs: Annotated[
        Path,
        typer.Option(
            envvar="FEDAMOLE_CERTS",
            help="Coordinator: folder with the ca.crt that its certificate is checked against.",
        ),
    ] = Path("certs"),
    within: Annotated[
        float,
        typer.Option(
            min=1.0,
            help="Client: maximum seconds since its last contact.",
        ),
    ] = 180.0,
) -> None:
    """Report whether a coordinator or a client is healthy: one line, and exit code 0 (healthy) or 1 (not healthy).

    For container health checks and monitoring. A coordinator is queried over TLS; for a client, the file is read that
    it updates at every contact. `fedamole doctor` explains problems in detail.
    """
    from fedamole.deployment.connection_check import parse_address
    from fedamole.deployment.health import client_health, coordinator_health

    status = client_health(Path(target), within) if parse_address(target) is None else coordinator_health(target, certs)
    say(f"{'healthy' if status.healthy else 'not healthy'}: {status.text}")
    if not status.healthy:
        raise typer.Exit(1)
