"""What a client must remember across restarts: for which exchanges it has given away seeds.

A client whose seeds are given away may not take part in the same exchange again: two sums over different survivors
differ by one client's update. Secrets are never written: a client that is killed cannot give away the seeds of the
exchange it was in, neither its own nor those of others.
"""

import json
import os
from pathlib import Path

from fedamole.federation.secure.statements import Context, SecureAggregationError


class Journal:
    """A file of one line per exchange, written before the first seed leaves."""

    def __init__(self, path: Path) -> None:
        """Open a client's journal, which may not exist yet. Raises SecureAggregationError if it cannot be read."""
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):  # the last write was cut off, so nothing was given away after it
            path.write_text("".join(lines := lines[:-1]), encoding="utf-8")
        try:
            self.revealed = {Context(*map(json.loads(line).__getitem__, Context._fields)) for line in lines}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SecureAggregationError(
                f"{path}: is damaged, so this client cannot tell which sums it has opened; restore it from a copy, or "
                "take part in a new run"
            ) from error

    def check_open(self, context: Context) -> None:
        """Raise SecureAggregationError if seeds of an exchange were given away."""
        if context in self.revealed:
            raise SecureAggregationError(
                f"round {context.round}, exchange {context.exchange}: this client's update is in a sum that was "
                "opened already; a second sum would reveal single updates"
            )

    def record(self, context: Context) -> None:
        """Write that seeds of an exchange are about to be given away; return once that is on disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(file, (json.dumps(context._asdict()) + "\n").encode())
            os.fsync(file)
        finally:
            os.close(file)
        self.revealed.add(context)
