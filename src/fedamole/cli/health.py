"""`fedamole health`. Nothing heavy is imported before it is needed."""

from pathlib import Path
from typing import Annotated

import typer

from fedamole.terminal import say


def health(
    target: Annotated[
        str,
        typer.Argument(
            envvar="FEDAMOLE_HEALTH",
            help="HOST:PORT of a coordinator, or a client's folder: runs/.client-NAME.",
        ),
    ],
    certs: Annotated[
        Path,
        typer.Option(
            envvar="FEDAMOLE_CERTS",
            help="Coordinator: folder with the ca.crt to check its certificate against.",
        ),
    ] = Path("certs"),
    within: Annotated[
        float,
        typer.Option(
            min=1.0,
            help="Client: seconds since the last contact after which it is unhealthy.",
        ),
    ] = 180.0,
) -> None:
    """Tell whether a coordinator or a client works: one line, and exit code 0 (healthy) or 1 (not healthy).

    For health checks of containers and for monitors. A coordinator is asked over TLS; of a client the file is read that
    it writes at every contact. `fedamole doctor` says more about what is wrong with a set-up.
    """
    from fedamole.deployment.connection_check import parse_address
    from fedamole.deployment.health import client_health, coordinator_health

    verdict = (
        client_health(Path(target), within) if parse_address(target) is None else coordinator_health(target, certs)
    )
    say(f"{'healthy' if verdict.healthy else 'not healthy'}: {verdict.text}")
    if not verdict.healthy:
        raise typer.Exit(1)
