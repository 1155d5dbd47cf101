"""Golden runs: what each method's first rounds on the tiny federation came to when this was written.

A change of behaviour, meant or not, shows here. Where it was meant, print the new numbers with
`python -m pytest tests/smoke -s` and say in the commit why they changed.
"""

import json
from typing import Any

import pytest

from fedamole.methods import METHODS

GOLDEN: dict[str, tuple[list[float], list[float], tuple[int, int]]] = {
    "fedamole": ([6.47125, 6.35084, 6.05083], [6.10506, 5.80056, 5.57882], (20336, 23729)),
    "fedit": ([6.52103, 6.58359, 6.46733], [6.46545, 6.40197, 6.30795], (2712, 2712)),
    "fedit_ft": ([6.52103, 6.58359, 6.46733], [6.31387, 6.21097, 6.09069], (2712, 2712)),
    "local_only": ([6.52103, 6.38117, 5.9819], [6.31387, 6.01779, 5.73979], (56, 56)),
}
"""By method: mean training loss of rounds 0, 1, 2; mean validation loss; bytes down and up per client and round."""


@pytest.mark.parametrize("name", sorted(METHODS))
def test_golden(name: str, runs: Any) -> None:
    folder = runs(name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    means = [
        [
            sum(found) / len(found)
            for round_ in range(3)
            if (found := [line["loss"] for line in lines if (line["split"], line["round"]) == (split, round_)])
        ]
        for split in ("train", "validation")
    ]
    summary = json.loads((folder / "summary.json").read_text())
    traffic = [round(summary[f"bytes_{way}_per_client_round"]) for way in ("down", "up")]
    print(f'    "{name}": ({[round(x, 5) for x in means[0]]}, {[round(x, 5) for x in means[1]]}, {tuple(traffic)}),')
    train, validation, wanted = GOLDEN[name]
    assert means[0] == pytest.approx(train, abs=1e-3)
    assert means[1] == pytest.approx(validation, abs=1e-3)
    assert traffic == pytest.approx(wanted, abs=64)
    assert means[1][-1] < means[1][0], "and it learns"
