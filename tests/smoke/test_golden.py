"""Golden runs: what each method's first rounds on the tiny federation came to when this was written.

A change of behaviour, meant or not, shows here. Where it was meant, print the new numbers with
`python -m pytest tests/smoke -s` and say in the commit why they changed.
"""

import json
from typing import Any

import pytest

from fedamole.methods import METHODS

GOLDEN: dict[str, tuple[list[float], list[float], tuple[int, int]]] = {
    # the tiny base writes no row that can be used: the numbers of fedit
    "data_engine": ([6.52214, 6.58176, 6.47061], [6.46769, 6.4056, 6.31198], (2712, 2712)),
    "fdlora": ([6.52214, 6.58176, 6.41544], [6.15338, 6.07431, 5.95388], (2728, 2712)),
    "fedalt": ([6.54192, 6.47023, 6.08979], [6.3857, 6.09396, 5.77542], (2712, 2712)),
    "fedawa": ([6.52214, 6.58182, 6.47085], [6.46772, 6.40573, 6.31222], (2720, 2720)),
    "fedamole": ([6.47281, 6.35935, 6.05773], [6.1005, 5.8172, 5.60038], (20337, 23198)),
    "feddat": ([6.73317, 6.58336, 6.62725], [6.47476, 6.43248, 6.36963], (2720, 2720)),
    "feddm": ([6.73317, 6.59146, 6.68951], [6.49403, 6.45915, 6.42674], (2720, 2199)),
    "fedaf": ([6.42884, 6.31809, 6.62865], [6.48928, 6.47427, 6.4659], (5565, 2954)),
    "codream": ([6.62672, 6.40593, 6.29798], [6.38575, 6.20881, 6.00136], (11531, 3168)),
    "feddpa": ([6.52173, 6.63312, 6.53243], [6.47101, 6.41947, 6.35421], (2712, 2712)),
    "fedamole_peers": ([6.52214, 6.36768, 5.9679], [6.31349, 6.01493, 5.72273], (2712, 2712)),
    "fedex_lora": ([6.52214, 6.56836, 6.44701], [6.45749, 6.38271, 6.27942], (9352, 2728)),
    "fedmap": ([6.52218, 6.36829, 5.97053], [6.31379, 6.0171, 5.72928], (2784, 2784)),
    "feddpms": ([6.56502, 6.59438, 6.40425], [6.47699, 6.41813, 6.33374], (55647, 21307)),
    "fedit": ([6.52214, 6.58176, 6.47061], [6.46769, 6.4056, 6.31198], (2712, 2712)),
    "fedit_ft": ([6.52214, 6.58176, 6.47061], [6.31349, 6.21984, 6.09535], (2712, 2712)),
    "adaptive_experts": ([6.48039, 6.59053, 6.48163], [6.47889, 6.42466, 6.35359], (5408, 2728)),
    "fedmoe": ([6.43442, 6.30112, 5.85619], [6.00749, 5.78003, 5.42781], (32957, 36547)),
    "fedlease": ([6.52217, 6.52096, 6.22827], [6.4225, 6.20111, 5.95896], (8323, 4739)),
    "fedptr": ([6.52214, 6.58168, 6.4709], [6.46769, 6.40577, 6.31198], (4499, 2720)),
    "fedprompt": ([6.45016, 6.51968, 6.41635], [6.37106, 6.30967, 6.26262], (656, 656)),
    "fedprompt_ft": ([6.45016, 6.51968, 6.41635], [6.29687, 6.21582, 6.14512], (656, 656)),
    "fedprox": ([6.52214, 6.58173, 6.47062], [6.46768, 6.40561, 6.31193], (2712, 2712)),
    "fedptuning": ([6.47096, 6.46946, 6.30485], [6.43938, 6.27361, 6.17454], (13824, 13824)),
    "fedptuning_ft": ([6.47096, 6.46946, 6.30485], [6.28049, 6.07418, 6.07027], (13824, 13824)),
    "fedrep": ([6.49548, 6.60292, 6.45719], [6.47241, 6.42001, 6.35425], (1376, 1376)),
    "fedsa_lora": ([6.52214, 6.41196, 6.11307], [6.34271, 6.12727, 5.90415], (1512, 1512)),
    "ffa_lora": ([6.52761, 6.61701, 6.55297], [6.47141, 6.42908, 6.38185], (1256, 1256)),
    "fedsvd": ([6.52761, 6.5762, 6.50065], [6.47141, 6.40663, 6.32888], (2720, 1256)),
    "flexlora": ([6.51039, 6.51365, 6.39898], [6.44851, 6.36411, 6.29914], (2710, 2710)),
    "flora": ([6.5254, 6.60643, 6.53417], [6.4657, 6.41996, 6.36526], (5493, 2728)),
    "hetlora": ([6.51039, 6.56285, 6.46858], [6.45299, 6.40654, 6.36443], (2710, 2710)),
    "ifca_lora": ([6.52808, 6.56579, 6.28769], [6.44308, 6.24237, 5.94655], (8088, 2728)),
    "regmean": ([6.52214, 6.58176, 6.47061], [6.46769, 6.4056, 6.28648], (2728, 4275)),
    "model_glue": ([6.52214, 6.36768, 6.34941], [6.31349, 6.2622, 6.22848], (7859, 2717)),
    "pfedhr": ([6.52214, 6.36763, 5.96855], [6.31349, 6.01434, 5.71966], (1835, 2720)),
    "fed_et": ([6.51695, 6.49815, 6.38599], [6.38924, 6.27518, 6.17734], (2716, 2716)),
    "local_only": ([6.52214, 6.36768, 5.9679], [6.31349, 6.01493, 5.72273], (56, 56)),
    "steerable": ([6.52136, 6.55785, 6.40849], [6.4641, 6.38809, 6.25792], (11936, 11936)),
    "flash": ([6.52214, 6.58176, 6.47061], [6.46769, 6.4056, 6.31198], (2720, 2936)),
    "ditto": ([6.52173, 6.62016, 6.49847], [6.45327, 6.3772, 6.29476], (2712, 2712)),
}
"""By method: mean training loss of rounds 0, 1, 2; mean validation loss; bytes down and up per client and round."""


def test_every_method_has_a_golden_run() -> None:
    """The other variants `_ft` are the same training as their method: tests/contract compares the two."""
    assert {name for name in METHODS if not name.endswith("_ft")} <= set(GOLDEN) <= set(METHODS)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden(name: str, runs: Any) -> None:
    folder = runs(name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    means = [
        [
            sum(results) / len(results)
            for round_ in range(3)
            if (
                results := [
                    line["loss"]
                    for line in lines
                    if (line["split"], line["round"]) == (split, round_) and "loss" in line
                ]
            )
        ]
        for split in ("train", "validation")
    ]
    summary = json.loads((folder / "summary.json").read_text())
    traffic = [round(summary[f"bytes_{way}_per_client_round"]) for way in ("down", "up")]
    print(f'    "{name}": ({[round(x, 5) for x in means[0]]}, {[round(x, 5) for x in means[1]]}, {tuple(traffic)}),')
    train, validation, expected = GOLDEN[name]
    assert means[0] == pytest.approx(train, abs=1e-3)
    assert means[1] == pytest.approx(validation, abs=1e-3)
    assert traffic == pytest.approx(expected, abs=64)
    assert means[1][-1] < means[1][0], "and it learns"
