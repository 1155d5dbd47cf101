"""Style of all matplotlib figures of this package."""

from pathlib import Path
from typing import Any

STYLE = {"svg.hashsalt": "fedamole", "font.size": 9, "text.parse_math": False}
"""Matplotlib settings for `rc_context`."""


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure without a date, so that equal runs give equal files; create the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
    figure.savefig(path, dpi=160, metadata=metadata)
