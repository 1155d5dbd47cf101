"""FedIT: the average by hand; FedIT-FT is the same training looked at before the aggregation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.methods import METHODS
from fedamole.methods.fedit import FedIT
from fedamole.methods.shared.averaging import SharedTensors

INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SERVER = Server(BaseInfo({"m": (2, 2)}), INFOS, seed=0)


def lora(value: float) -> SharedTensors:
    return SharedTensors({"m/shared/A": torch.full((1, 2), value), "m/shared/B": torch.full((2, 1), -value)})


@pytest.mark.parametrize(
    ("weighting", "answered", "mean"),
    [
        ("uniform", "abc", 3.0),  # (1 + 2 + 6) / 3
        ("uniform", "ac", 3.5),  # (1 + 6) / 2
        ("examples", "abc", 19 / 6),  # (10 * 1 + 30 * 2 + 20 * 6) / 60
        ("examples", "ac", 13 / 3),  # (10 * 1 + 20 * 6) / 30
    ],
)
def test_the_average_by_hand(weighting: Any, answered: str, mean: float) -> None:
    replies = {name: lora(value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 6.0)) if name in answered}
    after = FedIT(weighting=weighting).aggregate(SERVER, lora(100.0), replies)
    torch.testing.assert_close(after.tensors["m/shared/A"], torch.full((1, 2), mean))
    torch.testing.assert_close(after.tensors["m/shared/B"], torch.full((2, 1), -mean))


def test_all_clients_are_sent_the_same_lora_that_begins_as_the_bare_base() -> None:
    method = FedIT(rank=3)
    state = method.init(SERVER)
    assert state.tensors["m/shared/A"].shape == (3, 2)
    assert not state.tensors["m/shared/B"].any()
    assert all(method.message(state, info) is state for info in INFOS)


def states(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("checkpoints/*.safetensors")}


def test_ft_is_the_same_training(runs: Any) -> None:
    assert METHODS["fedit"].evaluates == "post_aggregation"
    assert METHODS["fedit_ft"].evaluates == "pre_aggregation"
    plain, ft = runs("fedit"), runs("fedit_ft")
    assert states(plain) == states(ft)
    assert len(states(plain)) == 2
    losses = [
        [line["loss"] for line in map(json.loads, (run / "metrics.jsonl").open()) if line["split"] == "train"]
        for run in (plain, ft)
    ]
    assert losses[0] == losses[1]
    assert summary(plain)["rows"]["fedit"]["clients"] != summary(ft)["rows"]["fedit_ft"]["clients"]


def summary(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return result


def test_one_run_gives_both_rows(runs: Any) -> None:
    both = runs("fedit", "evaluation.pre_aggregation=true")
    rows = summary(both)["rows"]
    assert rows["fedit"] == summary(runs("fedit"))["rows"]["fedit"]
    assert rows["fedit_ft"] == summary(runs("fedit_ft"))["rows"]["fedit_ft"]
    assert states(both) == states(runs("fedit"))
    for client in ("chat", "entail", "mood", "plain"):
        shared, alone = both / "clients" / client, runs("fedit_ft") / "clients" / client
        file = "adapter_model.safetensors"
        assert (shared / "adapter-fedit_ft" / file).read_bytes() == (alone / "adapter" / file).read_bytes()
        assert (shared / "adapter" / file).read_bytes() == (
            runs("fedit") / "clients" / client / "adapter" / file
        ).read_bytes()


def test_all_clients_of_fedit_end_with_one_model(runs: Any) -> None:
    saved = {path.read_bytes() for path in runs("fedit").glob("clients/*/adapter/adapter_model.safetensors")}
    own = {path.read_bytes() for path in runs("fedit_ft").glob("clients/*/adapter/adapter_model.safetensors")}
    assert len(saved) == 1
    assert len(own) == 4


def test_messages_that_carry_the_aggregate_are_counted_as_evaluation_traffic(runs: Any, facts: Any) -> None:
    down = {line["bytes_down"] for line in facts(runs("fedit")) if line["split"] == "validation" and line["round"] >= 0}
    assert len(down) == 1
    assert min(down) > 1000
    assert {
        line["bytes_down"] for line in facts(runs("fedit_ft")) if line["split"] == "validation" and line["round"] >= 0
    } == {0}
