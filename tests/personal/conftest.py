"""Fixtures: the small models of tests/model."""

from tests.model.conftest import base, folder

__all__ = ["base", "folder"]
