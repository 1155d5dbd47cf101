"""The small models of tests/model serve here too, and the command line as its tests call it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import Runner
from ..model.conftest import base, folder  # noqa: F401
from ..test_cli import fedamole  # noqa: F401
from .served import Served


@pytest.fixture(scope="session")
def run(runs: Runner) -> Path:
    """A finished run of FedAMoLE with four clients."""
    return runs("fedamole")


@pytest.fixture(scope="package")
def served(run: Path) -> Iterator[Served]:
    """A server without keys over the run's models."""
    made = Served(run)
    made.engine.start()
    yield made
    made.close()
