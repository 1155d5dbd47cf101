"""Descriptions of the methods are those of the method classes."""

import json

from fedamole.methods import METHODS, describe
from fedamole.reporting.method_descriptions import method_descriptions


def test_the_file_is_up_to_date() -> None:
    current = json.loads(json.dumps({name: describe(name) for name in METHODS}))
    assert method_descriptions() == current, "run python scripts/describe_methods.py"
    assert list(method_descriptions()) == list(METHODS), "in the order of the registry"
