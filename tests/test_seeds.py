"""docs/seeds.md: seventeen related systems, each with its paper, and with a name that exists or "not yet"."""

import re
from pathlib import Path

import pytest
import typer

from fedamole.cli.main import app
from fedamole.methods import METHODS

ROOT = Path(__file__).parents[1]
NAMES = {
    "FedAWA": "fedawa",
    "FedMAP": "fedmap",
    "Adaptive Expert Models": "adaptive_experts",
    "FLASH": "flash",
    "RegMean": "regmean",
    "FedMoE": "fedmoe",
    "FedDAT": "feddat",
    "Model-GLUE": "model_glue",
    "FedDM": "feddm",
    "FedAF": "fedaf",
    "FedPTR": "fedptr",
    "CoDream": "codream",
    "FedDPMS": "feddpms",
    "pFedHR": "pfedhr",
    "Fed-ET": "fed_et",
    "MLLM-DataEngine": "data_engine",
    "Few-shot steerable alignment": "steerable",
}
"""Method of each system, registered or not yet, in the order of the page."""
COMMANDS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def rows() -> dict[str, tuple[str, str, str]]:
    """What each system does, where it is here, and its paper."""
    lines = (ROOT / "docs" / "seeds.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {system: (does, here, paper) for system, does, here, paper in cells[2:]}


def test_the_page_lists_each_system_once_with_its_paper() -> None:
    assert list(rows()) == list(NAMES)
    for system, (does, _, paper) in rows().items():
        assert does.count(".") == 1, f"{system}: one sentence"
        assert does.endswith("."), system
        number = re.search(r"\[arXiv (\d{4}\.\d{5})\]\(https://arxiv\.org/abs/(\d{4}\.\d{5})\)$", paper)
        assert number, system
        assert number[1] == number[2], system


@pytest.mark.parametrize("system", NAMES)
def test_where_a_system_is_exists_and_a_registered_method_is_named(system: str) -> None:
    """A merged method makes this fail until its row names it."""
    _, here, _ = rows()[system]
    methods, commands = re.findall(r"method `(\w+)`", here), re.findall(r"command `fedamole (\w+)`", here)
    assert re.fullmatch(
        r"not yet|(method `\w+`|command `fedamole \w+`)(, (method `\w+`|command `fedamole \w+`))*", here
    )
    assert set(methods) <= set(METHODS)
    assert set(commands) <= COMMANDS
    assert (NAMES[system] in METHODS) == (NAMES[system] in methods)
    paper = rows()[system][2]
    for method in methods:
        number = re.search(r"\d{4}\.\d{5}", METHODS[method].paper)
        assert number, method
        assert number[0] in paper, f"{method} cites another paper than docs/seeds.md"


def test_the_page_is_linked() -> None:
    assert "(seeds.md)" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert re.search(r"^  - .*: seeds\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
