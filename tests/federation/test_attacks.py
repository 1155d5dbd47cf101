"""One client sends replies meant to ruin a federation of real clients on the bundled base."""

import logging
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import small
from tests.federation.attacks import LIAR, attacked, loss_of_others

from fedamole.config import load_config
from fedamole.runs.run_folder import METRICS, RunFolder

CLIENTS = ("hospital_north", "shop_garden", "shop_house", LIAR)
CONFIG = """
[run]
threads = 1
device = "cpu"
group = 4
[federation]
rounds = 2
[training]
local_steps = 8
batch_size = 4
learning_rate = 3e-3
max_length = 96
[evaluation]
max_new_tokens = 1
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run of four clients of the bundled demo under an aggregation, whose liar does something."""
    folder = tmp_path_factory.mktemp("attacks")
    sources = [f'[[data.source]]\nname = "{name}"\npath = "{name}.jsonl"\n' for name in CLIENTS]
    (folder / "config.toml").write_text(CONFIG + "".join(sources))
    for name in CLIENTS:
        rows = (files("fedamole") / "bundled" / "task" / f"{name}.jsonl").read_text().splitlines()
        (folder / f"{name}.jsonl").write_text("\n".join(rows[:50]) + "\n")
    known: dict[tuple[str, str], Path] = {}

    def of(kind: str, aggregation: str) -> Path:
        if (kind, aggregation) not in known:
            config = load_config(folder / "config.toml", [*small("fedit"), f"federation.aggregation={aggregation}"])
            known[kind, aggregation] = attacked(config, folder / f"{kind}-{aggregation}", kind)
        return known[kind, aggregation]

    return of


def clipped(folder: Path) -> list[tuple[str, int]]:
    lines = RunFolder(folder).lines(METRICS)
    return [(line["client"], line["round"]) for line in lines if "clipped" in line]


@pytest.mark.parametrize(("kind", "most"), [("poison", 1.25), ("flip", 1.6)])
def test_one_liar_ruins_a_mean_and_not_a_clipped_mean(kind: str, most: float, run: Any, caplog: Any) -> None:
    """The others' validation loss as a multiple of the one without the liar: below `most`, and twice it for a mean."""
    caplog.set_level(logging.WARNING)
    without = loss_of_others(run("absent", "mean"), "fedit")
    assert loss_of_others(run(kind, "mean"), "fedit") > 2 * without
    folder = run(kind, "clipped")
    assert loss_of_others(folder, "fedit") < most * without
    assert clipped(folder) == [(LIAR, 0), (LIAR, 1)]
    assert f"client {LIAR}, round 1: its change is more than 4 times that of the other clients" in caplog.text
    assert RunFolder(folder).read_json("summary.json")["clipped"] == 2
