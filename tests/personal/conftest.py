"""The command line, as the tests of it call it, and the small models of tests/model."""

from tests.model.conftest import base, folder
from tests.test_cli import fedamole

__all__ = ["base", "fedamole", "folder"]
