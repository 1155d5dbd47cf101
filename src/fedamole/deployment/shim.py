"""The command `flwr-clientapp` that asks the process of `flower_forks` for a fork instead of starting anew."""

import sys
from pathlib import Path

NAME = "flwr-clientapp"

SHIM = """#!{python} -IS
import json, socket, sys
words = json.dumps(sys.argv[1:]).encode()
try:
    with socket.socket(socket.AF_UNIX) as forks:
        forks.connect({address!r})
        forks.sendall(words)
        forks.shutdown(socket.SHUT_WR)
        sys.exit(0 if forks.recv(1) else 1)
except OSError as error:
    sys.exit(f"no forks at {address}: {{error}}")
"""


def write_shim(folder: Path, address: str) -> Path:
    """Write the command that hands its words to the forks behind a Unix socket; return the folder for the path."""
    folder.mkdir(parents=True, exist_ok=True)
    shim = folder / NAME
    shim.write_text(SHIM.format(python=sys.executable, address=address))
    shim.chmod(0o700)
    return folder
