"""Descriptions of the methods that can be read without importing PyTorch.

The method classes import PyTorch, which takes seconds. `bundled/methods.json` therefore holds what
`fedamole.methods.describe` returns for each of them. `scripts/describe_methods.py` writes the file, and a test fails
while it differs from the classes.
"""

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


@functools.cache
def method_descriptions() -> Mapping[str, Mapping[str, Any]]:
    """Return the description of every method by name, in the order of the registry; see `fedamole.methods.describe`."""
    text = (files("fedamole") / "bundled" / "methods.json").read_text(encoding="utf-8")
    return {description["name"]: description for description in json.loads(text)}
