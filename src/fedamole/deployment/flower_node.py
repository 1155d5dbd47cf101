"""A SuperNode that asks often while there is work, and ends when it has stopped working.

Flower's own asks every three seconds, of which a round waits for the unluckiest client's. Where a server answers it
with an error that is not for trying again (500, as its database is busy), it gives up its work, and a thread of its
keeps the process alive for ever; `fedamole client` starts another one where it ends.
"""

import logging
import os
import sys
import threading
import time

from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

log = logging.getLogger(__name__)

NAME = "flower-supernode"
SOONEST, SHARE = 0.3, 0.05
"""Seconds between two questions at the server, as a share of the time without work, and the fewest of them."""
LOOK = 0.1
"""Seconds between two looks for the answer of this machine's own worker."""


class Pace:
    """Stands for the module `time` in Flower's loop, which sleeps 3 s where there is no message, else 0.5 s or less."""

    def __init__(self) -> None:
        """Begin as if there had been work just now."""
        self.worked = time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait for so long at most: the sooner after work, the shorter."""
        if seconds < 1:
            self.worked, wait = time.monotonic(), LOOK
        else:
            wait = max(SOONEST, SHARE * (time.monotonic() - self.worked))
        time.sleep(min(wait, seconds))


def _ended(about: threading.ExceptHookArgs) -> None:
    """A thread has ended with an error, such as the one that tells the server that this node is alive."""
    log.error("a part of the SuperNode has failed: %s", about.exc_value)
    os._exit(1)


def main() -> None:
    """Run Flower's command until it returns or any of its threads fails."""
    sys.argv[0] = NAME
    threading.excepthook = _ended
    start_client_internal.time = Pace()  # type: ignore[assignment, attr-defined]
    code = 1
    try:
        flower_supernode()
        log.error("the SuperNode has given up its connection")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception:
        log.exception("the SuperNode has failed")
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
