import pytest

from fedamole.data.examples import Example, Shard
from fedamole.errors import DataError

FREE = Example("p ", "c", " q", "a")
CHOICE = Example("p", "", "", "yes", ("yes", "no"))


def test_the_prompt_is_its_three_parts_in_order() -> None:
    assert FREE.prompt == "p c q"


def test_options_make_the_task() -> None:
    assert Shard("a", (FREE,), (FREE,), (FREE,), (FREE,)).task == "generation"
    assert Shard("a", (CHOICE,), (CHOICE,), (CHOICE,), (CHOICE,)).task == "classification"


def test_a_shard_refuses_an_empty_split_and_mixed_tasks() -> None:
    with pytest.raises(DataError, match=r"client 'a' has an empty split: train 1, embedding 0, validation 1"):
        Shard("a", (FREE,), (), (FREE,), (FREE,))
    with pytest.raises(DataError, match="has examples with options and examples without"):
        Shard("a", (FREE,), (FREE,), (CHOICE,), (FREE,))
