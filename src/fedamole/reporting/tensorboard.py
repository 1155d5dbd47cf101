"""TensorBoard output: writes the lines of metrics.jsonl as scalars."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedamole.errors import ConfigError, how_to_install


class TensorBoardSink:
    """Writes metrics to TensorBoard event files. A repeated round has the same step and replaces its first attempt."""

    def __init__(self, folder: Path) -> None:
        """Open event files in a folder.

        Raises:
            ConfigError: TensorBoard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"run.tensorboard = true needs TensorBoard; {how_to_install('tensorboard')}; or set it to false"
            ) from error
        self.writer = SummaryWriter(str(folder))

    def __call__(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write the numbers of some lines of metrics.jsonl."""
        for line in lines:
            tag = "/".join(str(line[key]) for key in ("split", "method", "which", "client", "exchange") if key in line)
            for name, value in line.items():
                if name not in ("round", "exchange") and isinstance(value, int | float):
                    self.writer.add_scalar(f"{tag}/{name}", value, line["round"])
        self.writer.flush()
