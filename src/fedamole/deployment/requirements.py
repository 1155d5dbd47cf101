"""Checks that every deployment command makes first."""

import os

from fedamole.errors import require_extra


def require_flower(simulation: bool = False) -> None:
    """Require the packages of a deployment (FedamoleError names a missing one) and make new files private.

    `simulation` also requires Ray. The umask is set so that only this user can read the files written from here on.
    """
    from fedamole.deployment.processes import PRIVATE_UMASK

    require_extra("flower", "flwr", "cryptography")
    if simulation:
        require_extra("ray", "ray")
    os.umask(PRIVATE_UMASK)
