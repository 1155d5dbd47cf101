"""A client's processes run the relay of the installed package, whatever app a server sends, and are quick to ask."""

import inspect
import re
import subprocess
import sys

import pytest
from flwr.supernode import start_client_internal

from fedamole.deployment import flower_node

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


def test_a_supernode_asks_the_sooner_the_later_it_worked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, slept = [100.0], list[float]()
    monkeypatch.setattr(flower_node.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(flower_node.time, "sleep", slept.append)
    pace = flower_node.Pace()
    for passed, asked in ((0.0, 3), (20.0, 3), (1000.0, 3), (0.0, 0.5), (2.0, 3)):
        clock[0] += passed
        pace.sleep(asked)
    assert slept == [0.3, 1.0, 3.0, 0.1, 0.3]


def test_flowers_loop_sleeps_where_the_pace_is_set() -> None:
    """Another version of Flower may sleep elsewhere: then its clients would be slow, and nothing would say so."""
    source = inspect.getsource(start_client_internal)
    assert "\nimport time\n" in source
    assert set(re.findall(r"time\.\w+\(.*\)", source)) == {"time.sleep(3)", "time.sleep(0.5)"}
