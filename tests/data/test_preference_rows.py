"""Preference pairs as data: two answers to a prompt, their errors, splits, hashes and tokens."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedamole.data.examples import Example, Literals
from fedamole.data.label_noise import with_label_noise
from fedamole.data.manifest import load_federation
from fedamole.data.settings import DataSettings, SourceSettings
from fedamole.data.templates import BUILT_IN, TemplateSettings, choose, render
from fedamole.data.tokens import tokenise
from fedamole.deployment.security.policy import read_columns
from fedamole.errors import ConfigError, DataError

TEMPLATE = TemplateSettings(prompt="{q}\n", answer="A: {good}", rejected="B: {bad}")
ROWS = [{"prompt": f"q {index}", "chosen": f"yes {index}", "rejected": f"no {index}"} for index in range(60)]


def rendered(template: TemplateSettings, row: dict[str, Any]) -> Example:
    example = render(template, (), row, "f, row 1")
    assert example is not None
    return example


def test_a_pair_has_both_answers_and_the_text_of_the_template() -> None:
    example = rendered(TEMPLATE, {"q": "why", "good": "x", "bad": "y"})
    assert (example.prompt, example.answer, example.rejected) == ("why\n", "A: x", "B: y")
    assert (example.task, example.options) == ("preference", ())
    assert (example.literals.answer, example.literals.rejected) == (((0, 3),), ((0, 3),))


def test_the_built_in_template_is_chosen_by_its_columns() -> None:
    assert choose("auto", {}, ("prompt", "chosen", "rejected"), "f") == BUILT_IN["preference"]
    assert choose("chat", {}, ("prompt", "chosen", "rejected"), "f").rejected == "{rejected}"
    with pytest.raises(DataError, match=r"there is no column 'rejected' \(did you mean 'reject'"):
        choose("preference", {}, ("prompt", "chosen", "reject"), "f")


@pytest.mark.parametrize("given", [{"options": ("x", "y")}, {"options_from": "a"}, {"labels": {"1": "a", "2": "b"}}])
def test_answers_in_pairs_have_no_options(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"rejected = '{b}': answers in pairs have no options; set either"):
        TemplateSettings(prompt="{q}", answer="{a}", rejected="{b}", **given)


def test_a_rejected_answer_of_the_template_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rejected = 'No': it names no column; write one as"):
        TemplateSettings(prompt="{q}", answer="{a}", rejected="No")


@pytest.mark.parametrize("bad", [None, "", " \n"])
def test_a_pair_without_a_rejected_answer_names_its_row(bad: str | None) -> None:
    with pytest.raises(DataError, match="f, row 1: the pair has no rejected answer; fill in its column or remove"):
        rendered(BUILT_IN["preference"], {"prompt": "p", "chosen": "c", "rejected": bad})


def test_equal_answers_are_refused_and_a_missing_chosen_answer_is_no_example() -> None:
    with pytest.raises(DataError, match="f, row 1: both answers of the pair are 'same'; correct or remove the row"):
        rendered(BUILT_IN["preference"], {"prompt": "p", "chosen": "same", "rejected": "same "})
    assert render(BUILT_IN["preference"], (), {"prompt": "p", "chosen": None, "rejected": "r"}, "f") is None


def test_a_policy_sees_the_column_of_the_rejected_answer() -> None:
    assert read_columns(TEMPLATE) == {"q", "good", "bad"}


def test_pairs_are_split_capped_and_hashed(write: Callable[..., str], tmp_path: Path) -> None:
    """The same manifest reproduces them; another rejected answer is another example."""
    path = write("pairs.jsonl", ROWS)
    settings = DataSettings((SourceSettings("pairs", path=path),), test_cap_classification=3, test_cap_generation=1)
    federation = load_federation(settings, tmp_path)
    (shard,) = federation.shards
    assert shard.task == "preference"
    assert len(shard.test) == 3, "pairs have the cap of answers that are scored by likelihood"
    assert all((example.rejected or "").startswith("no ") for example in shard.train)
    assert load_federation(settings, tmp_path, federation.manifest).shards == federation.shards
    template = replace(BUILT_IN["preference"], rejected="not {rejected}")
    changed = replace(settings, source=(replace(settings.source[0], template="own"),), templates={"own": template})
    with pytest.raises(DataError, match="the hash of its examples does not match"):
        load_federation(changed, tmp_path, federation.manifest)


def test_the_same_prompt_and_chosen_answer_stay_in_one_split(write: Callable[..., str], tmp_path: Path) -> None:
    rows = [{**row, "rejected": f"{row['rejected']} {copy}"} for row in ROWS[:30] for copy in range(2)]
    settings = DataSettings((SourceSettings("pairs", path=write("pairs.jsonl", rows)),))
    (shard,) = load_federation(settings, tmp_path).shards
    splits = (shard.train, shard.embedding, shard.validation, shard.test)
    prompts = [prompt for part in splits for prompt in {example.prompt for example in part}]
    assert len(prompts) == len(set(prompts)) == 30


def test_label_noise_exchanges_the_answers_of_a_pair() -> None:
    example = Example("p", "", "", "c", literals=Literals(answer=((0, 1),)), rejected="r")
    (noisy,) = with_label_noise({"train": (example,), "embedding": (example,)}, 1.0, 0, "a")["train"]
    assert (noisy.answer, noisy.rejected) == ("r", "c")
    assert (noisy.literals.answer, noisy.literals.rejected) == ((), ((0, 1),))


def test_both_answers_end_as_an_answer_does_and_count_for_the_length(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    examples = [
        Example("", "c0 c1 c2 c3", "\n", "yes", rejected="no x y z"),
        Example("", "q", "\n", "yes", rejected=" ".join("xyz" * 5)),
    ]
    tokens = tokenise(examples, tokenizer, 9)
    (row,) = tokens.rows
    end = tokenizer.eos_token_id
    assert (row.answer[-1], row.rejected[-1]) == (end, end)
    assert tokenizer.decode(row.rejected[:-1]) == "no x y z"
    assert len(row.prompt) + len(row.rejected) == 9, "the longer answer decides how much of the context is cut"
    assert (tokens.cut, tokens.dropped) == (1, 1)


def test_answers_that_become_the_same_tokens_are_refused(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="the two answers of a pair, 'foo' and 'bar', become the same tokens"):
        tokenise([Example("q", "", "\n", "foo", rejected="bar")], make_tokenizer(), 20)
