"""Scripts of the repository as modules, to call their functions."""

import importlib.util
from pathlib import Path
from typing import Any


def load_script(path: Path) -> Any:
    """Run a script that is no part of a package and return its module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
