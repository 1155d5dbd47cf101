"""`training.objective = "preference"` over the registry: a method trains on pairs, or a ConfigError says why not."""

import json
import math
import re
from typing import Any

import pytest
import torch
from tests.pairs import preference_overrides

from fedamole.errors import ConfigError
from fedamole.experiment import prepare
from fedamole.federation.distillation import Distillation
from fedamole.federation.local import LocalTask
from fedamole.federation.method import TrainingRequest
from fedamole.federation.objective import objective_of
from fedamole.methods import METHODS
from fedamole.methods.fedit import FedIT
from fedamole.model.bank import Bank
from fedamole.model.params import Adapter, new_shared
from fedamole.synthesis.rows import ExtraRows

REFUSED = sorted(name for name, method in METHODS.items() if method.only_answers)
TRAINED = sorted(name for name in {*METHODS} - {*REFUSED} if not name.endswith("_ft"))
ROUND = ("federation.rounds=1", "training.local_steps=2", "training.budget=steps")


@pytest.mark.parametrize("name", TRAINED)
def test_a_round_on_pairs_trains_by_their_loss(name: str, runs: Any) -> None:
    """The reference model reads every pair that is trained on, which no training on answers does."""
    folder = runs(name, *preference_overrides(runs), *ROUND)
    lines = [line for line in map(json.loads, (folder / "metrics.jsonl").open()) if line["split"] == "train"]
    trained = [line for line in lines if line.get("steps")]
    assert {line["client"] for line in trained} == {"pairs-fond", "pairs-stern"}
    for line in lines:
        assert "failed" not in line
    for line in trained:
        assert math.isfinite(line["loss"])
        assert line["probed"] >= 2 * line["steps"]
    scores = json.loads((folder / "summary.json").read_text())["rows"][name]["clients"]
    assert all(0 <= values["preference"] <= 100 for values in scores.values())


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_need_one_answer_refuse_the_objective(name: str, runs: Any) -> None:
    message = f'training.objective = "preference": the method {name} cannot train on preference pairs, because '
    with pytest.raises(ConfigError, match=re.escape(message + METHODS[name].only_answers)):
        runs.load(name, *preference_overrides(runs))
    assert runs.load(name).training.objective == "answer"


def test_those_that_refuse_are_known() -> None:
    assert {name for name in REFUSED if not name.endswith("_ft")} == {
        "codream",
        "data_engine",
        "fed_et",
        "fedaf",
        "feddat",
        "feddm",
        "feddpms",
        "fedptr",
        "pfedhr",
    }
    for name, method in METHODS.items():
        needs_answers = method.trains_at_server or method.sends_synthetic_examples or method.trains_together > 1
        assert method.only_answers or not needs_answers, f"{name}: needs a reason in `only_answers`"
        assert method.only_answers == METHODS[name.removesuffix("_ft")].only_answers


def test_a_request_for_other_rows_or_models_is_an_error_on_pairs(runs: Any) -> None:
    """Whatever a method says of itself: a row of a single answer is never trained on as half a pair."""
    prepared = prepare(runs.load("local_only", *preference_overrides(runs)))
    training, data = prepared.config.training, prepared.clients["pairs-fond"]
    adapter = Adapter(FedIT(rank=2).spec(), new_shared(prepared.base.shapes, 2, torch.Generator().manual_seed(0)))
    follows = Distillation()
    requests = [
        TrainingRequest(adapter, extra=ExtraRows((((1, 2), (3,)),))),
        TrainingRequest(adapter, teacher=adapter, distillation=follows),
        TrainingRequest(adapter, partner=TrainingRequest(adapter, distillation=follows), distillation=follows),
    ]
    for request in requests:
        task = LocalTask("pairs-fond", request, data.train.answer_pairs(), 1e-2)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="cannot have extra rows, a teacher or a partner"):
            objective_of(training).fit(Bank(prepared.base), [task], training, seed=0, round_=0)
