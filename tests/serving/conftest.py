"""Fixtures: the small models of tests/model, a run, and a server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import Runner
from ..model.conftest import base, folder  # noqa: F401
from .served import Served


@pytest.fixture(scope="session")
def run(runs: Runner) -> Path:
    """A finished run of FedAMoLE with four clients."""
    return runs("fedamole")


@pytest.fixture(scope="package", name="served")
def served_fixture(run: Path) -> Iterator[Served]:
    """A server without keys over the run's models."""
    served = Served(run)
    served.engine.start()
    yield served
    served.close()
