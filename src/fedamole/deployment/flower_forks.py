"""A `flwr-clientapp` that starts at once: one process that has imported Flower already, and a fork of it per message.

Flower starts the command `flwr-clientapp` for every message, which takes seconds of imports. `fedamole client` puts a
command of that name first in the path of its SuperExec: it hands its words to this process, which forks.

A fork runs the relay and nothing else. Flower would run whatever app the server sends along with a message, and its
SuperLink takes apps from anybody who reaches its control API: here an app's name is all that a client takes from it.
"""

import importlib
import json
import logging
import os
import signal
import socket
import sys
from importlib.metadata import entry_points

from fedamole.deployment import flower_relay
from fedamole.deployment.processes import die_with_parent
from fedamole.deployment.shim import NAME
from fedamole.errors import FedamoleError

log = logging.getLogger(__name__)

LONGEST = 1 << 16
"""Bytes of a command line."""


def run_the_relay_alone() -> None:
    """Have Flower's ClientApp process unpack no app and run the relay, in this process and its forks.

    Raises FedamoleError where this version of Flower loads apps in another way than the one that is known.
    """
    runtime = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    replaced = {
        "install_from_fab": lambda *_, **__: None,
        "get_load_client_app_fn": lambda *_, **__: lambda *_, **__: flower_relay.app,
    }
    for name, instead in replaced.items():
        if not hasattr(runtime, name):
            raise FedamoleError(f"this version of flwr has no {name}: install the one that fedamole[flower] asks for")
        setattr(runtime, name, instead)


def serve(address: str) -> None:
    """Fork a ClientApp for every caller, for ever."""
    run_the_relay_alone()
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
                    die_with_parent()
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
