"""The comparison of ways to find related clients: its measures by hand, and one run."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.loaded_script import load_script

SCRIPT = Path(__file__).parents[2] / "scripts" / "related_clients.py"


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script(SCRIPT)


def test_similarity_is_the_mean_cosine_of_centred_vectors(script: Any) -> None:
    """Centred at (1, 1), the three vectors are (-1, 0), (1, 0) and (0, 0); a second part turns the third."""
    parts = {"one": torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 1.0]])}
    assert torch.allclose(script.similarity(parts)[0], torch.tensor([1.0, -1.0, 0.0]).double())
    parts["two"] = torch.tensor([[1.0], [-2.0], [1.0]])
    assert torch.allclose(script.similarity(parts)[0], torch.tensor([1.0, -1.0, 0.5]).double())


def test_quality_counts_nearest_relatives_and_the_gap(script: Any) -> None:
    """a1 and a2 are related, b1 and b2 too; b2 is nearest to a1, so three of four find their relative."""
    values = torch.tensor([[1.0, 0.9, 0.1, 0.5], [0.9, 1.0, 0.2, 0.3], [0.1, 0.2, 1.0, 0.4], [0.5, 0.3, 0.4, 1.0]])
    nearest, gap = script.quality(values, ["a", "a", "b", "b"])
    assert nearest == 75.0
    assert gap == pytest.approx(0.4 - 0.5)


def test_without_related_or_other_pairs_there_is_no_gap(script: Any) -> None:
    values = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    assert [str(value) for value in script.quality(values, ["x", "x"])] == ["100.0", "nan"]
    assert [str(value) for value in script.quality(values, ["x", "y"])] == ["nan", "nan"]


def test_it_prints_a_line_for_each_description(tiny: Path, tmp_path: Path) -> None:
    config = (tiny / "config.toml").read_text()
    for name in ("entail", "mood", "chat", "plain"):
        config = config.replace(f'"{name}.jsonl"', f'"{tiny / name}.jsonl"')
    config = config.replace('"base"', f'"{tiny / "base"}"')
    (tmp_path / "c.toml").write_text(config)
    command = [sys.executable, str(SCRIPT), str(tmp_path / "c.toml"), "training.local_steps=1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for text in ("mean hidden state, layer 2", "gradient at the start", "change of B", "losses of each other"):
        assert text in result.stdout
