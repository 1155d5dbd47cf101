"""A server in a process of its own, whose clients are handlers in the process of the test.

Both ends of a socket pair carry frames: the number of the node and the payload one way, the answer the other way. The
server runs `coordinate`, as `fedamole server` does, only over this link in place of Flower's.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import tomli_w

from fedamole.deployment.server_run import SETTINGS, coordinate
from fedamole.engine import link as timing
from fedamole.engine.messages import Request, read_request
from fedamole.methods import METHODS
from fedamole.runs.run_folder import SERVER
from tests.contract.exchanges import ThreeExchanges
from tests.deployment.direct import DirectDeployment

NAME = "three_exchanges"
NODE_BYTES = 8
SECONDS = 60.0
"""Maximum time between two requests of the server, including its start."""


class SocketLink:
    """A link over a socket; a request is answered before the next one is sent."""

    def __init__(self, connection: Connection, registered: Mapping[int, str]) -> None:
        self.connection, self.registered, self.count = connection, registered, 0
        self.waiting: dict[str, bytes | str] = {}

    def nodes(self) -> Mapping[int, str]:
        return self.registered

    def send(self, node: int, payload: bytes, round_: int, seconds: float) -> str:
        self.connection.send_bytes(node.to_bytes(NODE_BYTES) + payload)
        self.count += 1
        self.waiting[f"ticket-{self.count}"] = self.connection.recv_bytes()
        return f"ticket-{self.count}"

    def receive(self, tickets: Collection[str]) -> Mapping[str, bytes | str]:
        return {ticket: self.waiting.pop(ticket) for ticket in tickets if ticket in self.waiting}


def run_server(there: DirectDeployment, kill_at: Callable[[str, Request], bool]) -> int:
    """Run the server until it ends; return its exit code. Called again, it resumes the run.

    The server is killed (SIGKILL) when it sends a request for which `kill_at(client, request)` is true; the client does
    not get this request.
    """
    settings = there.server_folder / SERVER / SETTINGS
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(tomli_w.dumps(there.config.tables()))
    near, far = socket.socketpair()
    command = [sys.executable, "-m", __name__, str(there.server_folder), str(far.fileno())]
    process = subprocess.Popen(
        [*command, json.dumps(there.link.registered)],
        pass_fds=[far.fileno()],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    far.close()
    with Connection(near.detach()) as connection:
        try:
            while connection.poll(SECONDS):
                frame = connection.recv_bytes()
                node, payload = int.from_bytes(frame[:NODE_BYTES]), frame[NODE_BYTES:]
                if kill_at(there.link.registered[node], read_request(payload)):
                    process.kill()
                    break
                connection.send_bytes(there.link.hosts[node].answer(payload))
        except EOFError:
            pass  # the server has ended
        finally:
            try:
                process.wait(SECONDS)
            finally:
                process.kill()
    return process.returncode


def main(folder: Path, descriptor: int, registered: Mapping[int, str]) -> None:
    """Start or resume the run in a folder."""
    METHODS[NAME] = ThreeExchanges
    timing.RETRY_SECONDS = timing.POLL_SECONDS = 0.01
    with Connection(descriptor) as connection:
        coordinate(SocketLink(connection, registered), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), {int(node): name for node, name in json.loads(sys.argv[3]).items()})
