"""How matplotlib draws every figure of this project."""

from pathlib import Path
from typing import Any

STYLE = {"svg.hashsalt": "fedamole", "font.size": 9, "text.parse_math": False}
"""Settings of matplotlib (`rc_context`)."""


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture; without a date, so that the same runs make the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
    figure.savefig(path, dpi=160, metadata=metadata)
