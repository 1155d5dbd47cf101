"""A `flwr-clientapp` that starts at once: one process that has imported Flower already, and a fork of it per message.

Flower starts the command `flwr-clientapp` for every message, which takes seconds of imports. `fedamole client` puts a
command of that name first in the path of its SuperExec: it hands its words to this process, which forks. Where this
process is not there, the command becomes Flower's own.
"""

import json
import logging
import os
import signal
import socket
import sys
from importlib.metadata import entry_points

import fedamole.deployment.flower_relay  # noqa: F401  imported here so that no fork has to
from fedamole.deployment.shim import NAME

log = logging.getLogger(__name__)

LONGEST = 1 << 16
"""Bytes of a command line."""


def serve(address: str) -> None:
    """Fork a ClientApp for every caller, for ever."""
    (entry,) = entry_points(group="console_scripts", name=NAME)
    run = entry.load()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a fork
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while True:
            caller, _ = listener.accept()
            with caller:
                words = _words(caller)
                if os.fork() == 0:
                    listener.close()
                    caller.close()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    sys.argv = [NAME, *words]
                    sys.exit(run())
                caller.sendall(b"1")


def _words(caller: socket.socket) -> list[str]:
    parts = b""
    while len(parts) < LONGEST and (part := caller.recv(LONGEST)):
        parts += part
    words: list[str] = json.loads(parts)
    return words


if __name__ == "__main__":
    serve(sys.argv[1])
