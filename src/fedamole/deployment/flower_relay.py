"""The ClientApp: hands a request's bytes to the warm worker beside the SuperNode, and its bytes back.

Flower starts a process for every message; this one imports no torch and knows nothing of what it carries.
"""

import logging
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedamole.deployment.flower_link import opened, sealed

log = logging.getLogger(__name__)

app = ClientApp()


@app.query()
def relay(message: Message, context: Context) -> Message:
    """Carry one request; where the worker is not there, or stops, the server is told just that."""
    try:
        secret = Path(str(context.node_config["secret"])).read_bytes()
        with Client(str(context.node_config["worker"]), family="AF_UNIX", authkey=secret) as worker:
            worker.send_bytes(opened(message.content.array_records["request"]))
            answer = worker.recv_bytes()
    except (OSError, EOFError, KeyError, AuthenticationError) as error:
        log.error("the worker is not there, or has stopped: %s", type(error).__name__)
        return Message(RecordDict({"failed": ConfigRecord({"by": "worker"})}), reply_to=message)
    return Message(RecordDict({"reply": sealed(answer)}), reply_to=message)
