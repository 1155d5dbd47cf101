"""A SuperNode that ends when it has stopped working, so that `fedamole client` can start another.

Where a server answers a SuperNode with an error that is not for trying again (500, as its database is busy), Flower's
own command gives up its work, and a thread of its keeps the process alive for ever.
"""

import logging
import os
import sys
import threading

from flwr.supernode.cli import flower_supernode

log = logging.getLogger(__name__)

NAME = "flower-supernode"


def _ended(about: threading.ExceptHookArgs) -> None:
    """A thread has ended with an error, such as the one that tells the server that this node is alive."""
    log.error("a part of the SuperNode has failed: %s", about.exc_value)
    os._exit(1)


def main() -> None:
    """Run Flower's command until it returns or any of its threads fails."""
    sys.argv[0] = NAME
    threading.excepthook = _ended
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
