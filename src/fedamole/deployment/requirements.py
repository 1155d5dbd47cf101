"""What every command of a deployment does first."""

import importlib.util
import os


def require_flower(*more: str) -> None:
    """Make sure that what a deployment needs beyond a simulation is here; and write for this user's eyes only."""
    from fedamole.deployment.processes import PRIVATE
    from fedamole.errors import FedamoleError, how_to_install

    extra = "ray" if more else "flower"
    for package in ("flwr", "cryptography", *more):
        if importlib.util.find_spec(package) is None:
            raise FedamoleError(f"this needs {package}, which is not installed; {how_to_install(extra)}")
    os.umask(PRIVATE)
