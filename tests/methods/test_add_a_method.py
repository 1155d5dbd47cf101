"""docs/add-a-method.md: its toy is built from the page, registered, run and held to the registry's contracts."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamole.federation.method import BaseInfo, ClientInfo, Method, Server, TrainingRequest
from fedamole.methods import METHODS, with_variants

PAGE = Path(__file__).parents[2] / "docs" / "add-a-method.md"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: Any) -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    path = tmp_path_factory.mktemp("toy") / "fedmedian.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("fedmedian", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fedmedian"] = module
    spec.loader.exec_module(module)
    return module


def test_the_toy_takes_the_median_by_hand(toy: Any) -> None:
    """Of 1, 2 and 90 it is 2; of 1 and 2 it is 1.5."""
    server = Server(BaseInfo({"m": (2, 2)}), tuple(ClientInfo(name, 1) for name in "abc"), 0)
    values = {"a": 1.0, "b": 90.0, "c": 2.0}
    sent = {name: toy.Median({"m/shared/A": torch.full((1, 2), value)}) for name, value in values.items()}
    state = toy.Median({"m/shared/A": torch.zeros(1, 2)})
    method = toy.FedMedian()
    assert method.aggregate(server, state, sent).tensors["m/shared/A"].tolist() == [[2.0, 2.0]]
    del sent["b"]
    assert method.aggregate(server, state, sent).tensors["m/shared/A"].tolist() == [[1.5, 1.5]]


def test_the_toy_runs_and_learns(toy: Any, runs: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(METHODS, "fedmedian", toy.FedMedian)
    lines = [json.loads(line) for line in (runs("fedmedian") / "metrics.jsonl").open()]
    losses = [
        sum(line["loss"] for line in lines if (line["split"], line["round"]) == ("validation", round_))
        for round_ in (-1, 2)
    ]
    assert losses[1] < losses[0]
    assert len(list(runs("fedmedian").glob("clients/*/adapter/adapter_model.safetensors"))) == 4


def test_the_registry_adds_the_variant_that_is_scored_before_the_aggregation(toy: Any) -> None:
    result = with_variants({"fedmedian": toy.FedMedian, "local_only": METHODS["local_only"]})
    assert list(result) == ["fedmedian", "fedmedian_ft", "local_only"]
    assert result["fedmedian_ft"].evaluates == "pre_aggregation"
    assert issubclass(result["fedmedian_ft"], toy.FedMedian)


def test_every_file_and_name_on_the_page_exists() -> None:
    page, source = PAGE.read_text(), Path(__file__).parents[2] / "src" / "fedamole"
    for name in set(re.findall(r"`(\w+\.py)`", page)):
        assert (source / "methods" / name).exists(), name
    for name in re.findall(r"override `(\w+)`", page):
        assert hasattr(Method, name), name
    for option in re.findall(r"`TrainingRequest\(adapter, (.*?)\)`", page):
        for name in re.findall(r"(\w+)=", option):
            assert name in {field.name for field in dataclasses.fields(TrainingRequest)}, name
