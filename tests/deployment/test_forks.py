"""A client's processes run the relay of the installed package, whatever app a server sends."""

import subprocess
import sys

SCRIPT = """
import importlib
from fedamole.deployment import flower_forks, flower_relay
flower_forks.run_the_relay_alone()
runtime = importlib.import_module("flwr.supernode.runtime.run_clientapp")
assert runtime.install_from_fab(b"not even an archive") is None
load = runtime.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
assert load("stranger/app", "9.9.9", "0" * 64) is flower_relay.app
del runtime.install_from_fab
try:
    flower_forks.run_the_relay_alone()
except flower_forks.FedamoleError as error:
    assert "install_from_fab" in str(error)
else:
    raise AssertionError("a Flower that loads apps in another way went through")
"""


def test_an_app_that_a_server_sends_is_neither_unpacked_nor_run() -> None:
    """In a process of its own, as it changes Flower's modules for good."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
