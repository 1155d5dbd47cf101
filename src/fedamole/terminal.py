"""What every process of this package does first: quieten the libraries, and send warnings to standard error."""

import logging
import os

from rich.console import Console
from rich.logging import RichHandler


def set_up() -> Console:
    """Set the environment and logging up; return the console of standard error."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    return console
