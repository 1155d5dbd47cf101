"""The small models of tests/model serve here too, and the command line as its tests call it."""

from ..model.conftest import base, folder  # noqa: F401
from ..test_cli import fedamole  # noqa: F401
