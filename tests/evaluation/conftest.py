"""The small models of tests/model serve here too."""

from ..model.conftest import base, folder  # noqa: F401
