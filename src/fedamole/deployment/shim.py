"""The command `flwr-clientapp` that asks the process of `flower_forks` for a fork instead of starting anew."""

import sys
from pathlib import Path

from fedamole.deployment.processes import command

NAME = "flwr-clientapp"

SHIM = """#!{python} -IS
import json, os, socket, sys
words = json.dumps(sys.argv[1:]).encode()
try:
    with socket.socket(socket.AF_UNIX) as forks:
        forks.connect({address!r})
        forks.sendall(words)
        forks.shutdown(socket.SHUT_WR)
        taken = forks.recv(1)
except OSError:
    taken = b""
if not taken:
    os.execv({own!r}, [{own!r}, *sys.argv[1:]])
"""


def write_shim(folder: Path, address: str) -> Path:
    """Write the command that hands its words to the forks behind a Unix socket; return the folder for the path."""
    folder.mkdir(parents=True, exist_ok=True)
    shim = folder / NAME
    shim.write_text(SHIM.format(python=sys.executable, address=address, own=command(NAME)))
    shim.chmod(0o700)
    return folder
