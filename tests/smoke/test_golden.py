"""Golden runs: what each method's first rounds on the tiny federation came to when this was written.

A change of behaviour, meant or not, shows here. Where it was meant, print the new numbers with
`python -m pytest tests/smoke -s` and say in the commit why they changed.
"""

import json
from typing import Any

import pytest

from fedamole.methods import METHODS

GOLDEN: dict[str, tuple[list[float], list[float], tuple[int, int]]] = {
    "fedamole": ([6.47281, 6.35935, 6.05773], [6.1005, 5.8172, 5.60038], (20337, 23730)),
    "fedit": ([6.52214, 6.58176, 6.47061], [6.46769, 6.4056, 6.31198], (2712, 2712)),
    "fedit_ft": ([6.52214, 6.58176, 6.47061], [6.31349, 6.21984, 6.09535], (2712, 2712)),
    "local_only": ([6.52214, 6.36768, 5.9679], [6.31349, 6.01493, 5.72273], (56, 56)),
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
