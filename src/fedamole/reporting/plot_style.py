"""Style of all matplotlib figures of this package."""

from pathlib import Path
from typing import Any, Literal

from fedamole.errors import ConfigError

STYLE = {"svg.hashsalt": "fedamole", "font.size": 9, "text.parse_math": False}
"""Matplotlib settings for `rc_context`."""


def require_matplotlib(option: str) -> None:
    """Raise ConfigError if matplotlib, which a command-line option needs, is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{option} needs matplotlib: pip install matplotlib") from error


def style_panel(panel: Any, grid: Literal["x", "y", "both"]) -> None:
    """Draw grid lines along the axes `grid` behind the data, and remove the frame apart from the x axis."""
    panel.grid(axis=grid, color="0.9")
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure without a date, so that equal runs give equal files; create the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
    figure.savefig(path, dpi=160, metadata=metadata)
