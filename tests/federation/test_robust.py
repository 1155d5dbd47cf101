"""Clipping, median and trimmed mean by hand, and which methods may have them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fedamole.config import to_config
from fedamole.errors import ConfigError
from fedamole.federation.robust import HISTORY, Robust, group_of, median, trimmed_mean
from fedamole.methods import METHODS
from fedamole.methods.shared.averaging import mean_by_key


@dataclass(frozen=True)
class Part:
    rows: Mapping[str, Tensor]


@dataclass(frozen=True)
class Lora:
    tensors: Mapping[str, Tensor]
    part: Part = field(default_factory=lambda: Part({}))
    rank: int = 1


A, B = "m/shared/A", "m/shared/B"
SENT = Lora({A: torch.tensor([1.0, 1.0]), B: torch.tensor([0.0, 0.0])})


def reply(a: float, b: float = 1.0) -> Lora:
    """Changes A by a and B by b in every number."""
    return Lora({A: SENT.tensors[A] + a, B: SENT.tensors[B] + b}, rank=7)


def sent(replies: Mapping[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(replies, SENT)


def clip(factor: float = 2.0) -> Robust:
    return Robust("clipped", factor, ())


def test_a_change_is_clipped_at_a_multiple_of_the_others_median() -> None:
    """Changes of A by 1, 2, 3 and -30: the others' median is 2 for the last, so it may be 4, by a factor 4 / 30."""
    replies = {"a": reply(1), "b": reply(2), "c": reply(3), "d": reply(-30)}
    clipped, factors = clip()(5, sent(replies), replies)
    assert factors == {"d": {"tensors/shared/A": pytest.approx(4 / 30)}}
    assert clipped["d"].tensors[A].tolist() == [1 - 4, 1 - 4]
    assert clipped["d"].tensors[B] is replies["d"].tensors[B], "a group that is not above its bound stays as it is"
    assert clipped["d"].rank == 7
    for name in "abc":
        assert clipped[name] is replies[name]


def test_tensors_that_were_not_sent_count_by_their_own_norm() -> None:
    """Mean embeddings: nothing was sent under their keys. Two rows of one kind are one group."""

    def of(x: float) -> Lora:
        rows = {"m/expert-01": torch.tensor([x, x]), "n/expert-12": torch.tensor([x, -x])}
        return Lora(SENT.tensors, Part(rows))

    replies = {"a": of(1), "b": of(1), "c": of(8)}
    clipped, factors = clip()(0, sent(replies), replies)
    assert factors == {"c": {"part.rows/expert (value)": 0.25}}
    assert clipped["c"].part.rows["n/expert-12"].tolist() == [2, -2]


def test_sizes_do_not_depend_on_how_many_numbers_a_client_has() -> None:
    """A client with nine experts, another with one, and one that has dropped the second of two ranks."""
    many = {f"m/expert-{i:02d}/A": torch.zeros(2, 2) for i in range(9)}
    messages = {"a": Lora(many), "b": Lora({"m/expert-00/A": torch.zeros(2, 2)}), "c": Lora(dict([*many.items()][:2]))}
    replies = {
        "a": Lora({key: tensor + 1 for key, tensor in many.items()}),
        "b": Lora({"m/expert-00/A": torch.ones(1, 2)}),
        "c": Lora({key: tensor + 1 for key, tensor in messages["c"].tensors.items()}),
    }
    robust = clip(1.0)
    assert robust(0, messages, replies)[1] == {}
    assert robust.history == [{"tensors/expert/A": {"a": 1.0, "b": 1.0, "c": 1.0}}]


def test_earlier_rounds_count_and_a_clients_own_do_not() -> None:
    """d doubles its change each round, so as to raise its bound slowly; that stays at 2 x the median of 1, 1, 1."""
    robust = clip()
    for round_ in range(HISTORY + 3):
        replies = {"a": reply(1), "b": reply(1), "c": reply(1), "d": reply(2.0**round_)}
        clipped, factors = robust(round_, sent(replies), replies)
        assert list(factors) == (["d"] if round_ > 1 else [])
        assert float(clipped["d"].tensors[A][0]) == pytest.approx(1 + min(2.0**round_, 2.0))
    assert len(robust.history) == HISTORY - 1
    # Alone with one other client it is held to what was usual, with medians 1 of the rounds before.
    replies = {"a": reply(1), "d": reply(8)}
    assert robust(20, sent(replies), replies)[1] == {"d": {"tensors/shared/A": 0.25}}


def test_a_client_that_sends_back_what_it_got_does_not_clip_the_others() -> None:
    replies = {"a": reply(1), "b": reply(1.5), "z": reply(0, 0)}
    for _ in range(4):
        assert clip(4.0)(0, sent(replies), replies)[1] == {}
    # Where most changes are 0, nothing is known of what is usual.
    replies = {"a": reply(0, 1), "b": reply(0, 1), "c": reply(5, 1)}
    assert clip(4.0)(0, sent(replies), replies)[1] == {}


def test_with_two_clients_nothing_is_clipped_and_one_warning_says_so(caplog: Any) -> None:
    robust = clip()
    replies = {"a": reply(1), "d": reply(9000)}
    with caplog.at_level(logging.WARNING):
        for round_ in range(3):
            clipped, factors = robust(round_, sent(replies), replies)
            assert (clipped, factors) == (replies, {})
    assert caplog.text.count("their changes cannot be compared") == 1


def test_history_is_all_that_a_resumed_run_needs() -> None:
    first, second = clip(), clip()
    replies = {"a": reply(1), "b": reply(1.25), "d": reply(77)}
    first(0, sent(replies), replies)
    second.history = first.history
    assert first.history[0]["tensors/shared/A"]["d"] == 2.25, "what was clipped is remembered as it was let through"
    replies = {"a": reply(0.5), "b": reply(0.3), "d": reply(3)}
    result, other = (robust(1, sent(replies), replies) for robust in (first, second))
    assert result[1] == other[1] != {}
    assert torch.equal(result[0]["d"].tensors[A], other[0]["d"].tensors[A])


def test_groups() -> None:
    assert group_of("tensors:layers.3.q_proj/expert-07/A") == "tensors/expert/A"
    assert group_of("tensors:cluster-0/layers.3.q_proj/shared/B") == "tensors/shared/B"
    assert group_of("tensors:layers.3.q_proj/router/W") == "tensors/router/W"
    assert group_of("token_embedding:layers.3.q_proj") == "token_embedding"
    assert group_of("expert_embeddings:layers.3.q_proj/expert-07") == "expert_embeddings/expert"


VALUES = torch.tensor([[5.0, 1.0], [1.0, 2.0], [-900.0, 3.0], [2.0, 800.0]])


def test_median_and_trimmed_mean_by_hand() -> None:
    assert median(VALUES).tolist() == [1.5, 2.5]
    assert median(VALUES[:3]).tolist() == [1.0, 2.0]
    assert trimmed_mean(VALUES).tolist() == [1.5, 2.5]
    ten = torch.arange(10.0, dtype=torch.float64)[:, None] ** 2
    assert trimmed_mean(ten).tolist() == [sum(x * x for x in range(2, 8)) / 6]


@pytest.mark.parametrize(("aggregation", "expected"), [("median", [2.0, 2.0]), ("trimmed", [2.0, 2.0])])
def test_the_methods_own_mean_gives_it(aggregation: str, expected: list[float], caplog: Any) -> None:
    """x has three holders, y only two: there the mean stays, which is said once. Other fields are left alone."""

    def of(x: list[float], y: float | None = None) -> Lora:
        tensors = {"m/x": torch.tensor(x), **({} if y is None else {"m/y": torch.tensor([y])})}
        return Lora(tensors, Part({"m": torch.tensor(x)}))

    robust = Robust(aggregation, 4.0, ("tensors",))  # type: ignore[arg-type]
    replies = {"a": of([1.0, 2.0], 4.0), "b": of([2.0, 1.0]), "c": of([90.0, 7.0], 8.0)}
    for _ in range(2):
        result, factors = robust(3, sent(replies), replies)
    assert factors == {}
    after = mean_by_key({name: result[name].tensors for name in result}, dict.fromkeys("abc", 1.0), {})
    assert after["m/x"].tolist() == expected
    assert after["m/y"].tolist() == [6.0]
    assert result["c"].part.rows["m"].tolist() == [90.0, 7.0]
    assert caplog.text.count("1 of 2 tensors came from fewer than 3 clients") == 1


BY_KEY = {
    "fedit",
    "fedprox",
    "ffa_lora",
    "fedsvd",
    "fedprompt",
    "fedptuning",
    "fdlora",
    "fedsa_lora",
    "feddat",
    "feddpa",
    "data_engine",
    "steerable",
    "ditto",
    "fedrep",
}


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"fedamole"}))
@pytest.mark.parametrize("aggregation", ["median", "trimmed"])
def test_only_methods_that_average_by_key_may_have_a_median(name: str, aggregation: str) -> None:
    tables: dict[str, Any] = {
        "method": {"name": name},
        "federation": {"aggregation": aggregation},
        "deployment": {"clients": ["a", "b"]},
    }
    if name.removesuffix("_ft") in BY_KEY:
        assert to_config(tables).federation.aggregation == aggregation
        tables["method"]["weighting"] = "examples"
        with pytest.raises(ConfigError, match="counts all clients alike"):
            to_config(tables)
        return
    with pytest.raises(ConfigError, match=f"{name} does not average tensors by key alone"):
        to_config(tables)


def test_a_factor_below_one_is_refused() -> None:
    tables = {"federation": {"clip_factor": 0.9}, "deployment": {"clients": ["a", "b"]}}
    with pytest.raises(ConfigError, match=r"federation.clip_factor = 0.9: must be at least 1"):
        to_config(tables)
