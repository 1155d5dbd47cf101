"""Prompt and classes of synthetic examples: the template's text stays, the columns become virtual tokens."""

import copy
from typing import Any

import pytest
import torch

from fedamole.data.examples import Example, Literals
from fedamole.experiment import prepare
from fedamole.synthesis.outline import ClientOutline, ExampleSizes, literal_pieces

SIZES = ExampleSizes(2, 4, 10, 64, 16, 2)


@pytest.mark.parametrize(
    ("example", "pieces"),
    [
        (Example("Q: why?", "", "", "a", literals=Literals(((0, 3),))), ("Q: ", "")),
        (Example("Q: why?\nA:", "", "", "a", literals=Literals(((0, 3), (7, 10)))), ("Q: ", "\nA:")),
        (Example("I: x\n", "text", "\nA:", "a", literals=Literals(((0, 3), (4, 5)), ((0, 3),))), ("I: ", "\n", "\nA:")),
        (Example("all of it is data", "", "", "a"), ("", "")),
        (Example("always this", "", "", "a", literals=Literals(((0, 11),))), ("always this",)),
    ],
)
def test_literal_pieces_by_hand(example: Example, pieces: tuple[str, ...]) -> None:
    assert literal_pieces(example) == pieces


@pytest.fixture(scope="module")
def outlines(runs: Any) -> dict[str, ClientOutline]:
    prepared = prepare(runs.load("fedit"))
    base = prepared.base
    return {
        name: ClientOutline(data.train.rows, data.train.examples, base.tokenizer, base.width, 0.5)
        for name, data in prepared.clients.items()
    }


def test_the_prompt_is_the_template_without_values_of_columns(outlines: dict[str, ClientOutline]) -> None:
    """`{premise} Then {hypothesis}` and a line end: two virtual tokens for each column."""
    entail = outlines["entail"]
    prompt = entail.prompt(SIZES)
    assert [it for it in prompt if it < 0] == [-1, -2, -3, -4]
    assert prompt[:2] == (-1, -2)
    text = entail.tokenizer.decode([it for it in prompt if it >= 0])
    assert text == " Then \n"
    assert prompt[-2] == -4
    short = entail.prompt(ExampleSizes(2, 3, 10, 2, 16, 2))
    assert [it for it in short if it < 0] == [-1, -2, -3], "two for one column and one for the other"
    assert short[-1] == prompt[-1]
    assert len(short) == 5, "of the template's text, the last two tokens"
    assert outlines["plain"].prompt(SIZES) == (-1, -2, -3, -4), "without a template all is data"


def test_prompts_by_class_are_those_of_the_training_rows(outlines: dict[str, ClientOutline]) -> None:
    entail = outlines["entail"]
    prompts = entail.class_prompts()
    assert sorted(prompts) == [0, 1, 2]
    assert sum(map(len, prompts.values())) == len(entail.train)
    for row in entail.train:
        assert row.prompt in prompts[entail.class_answers().index(row.answer)]
    assert outlines["plain"].class_prompts() == {}, "free text"


def test_examples_are_of_the_classes_with_most_rows(outlines: dict[str, ClientOutline]) -> None:
    def made(name: str, **sizes: int) -> Any:
        chosen = ExampleSizes(**{**vars(SIZES), **sizes})
        return outlines[name].new_examples(chosen, torch.Generator().manual_seed(3))

    entail = outlines["entail"]
    answers = entail.class_answers()
    counts = [sum(row.answer == answer for row in entail.train) for answer in answers]
    assert len(answers) == 3
    everything = made("entail")
    assert everything.classes == (0, 0, 1, 1, 2, 2)
    assert [everything.answer(i) for i in (0, 2, 4)] == list(answers)
    most = counts.index(max(counts))
    assert made("entail", max_classes=1).classes == (most, most)
    assert len(made("entail", min_class_examples=max(counts) + 1)) == 0
    fitting = {label for label in range(3) if len(answers[label]) <= 3}
    assert 0 < len(fitting) < 3
    assert set(made("entail", max_answer_tokens=3).classes) == fitting
    free = made("chat")
    assert free.classes == (0, 0)
    assert free.answer(0) == (outlines["chat"].tokenizer.eos_token_id,)
    assert outlines["chat"].class_answers() == ()


def test_first_vectors_are_as_large_as_token_embeddings(outlines: dict[str, ClientOutline]) -> None:
    sizes = ExampleSizes(50, 4, 10, 64, 16, 2)
    drawn = outlines["entail"].new_examples(sizes, torch.Generator().manual_seed(3)).vectors
    assert drawn.shape == (150, 4, outlines["entail"].width)
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.02)


CHAT = (
    "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_of_a_chat_the_prompt_is_what_the_chat_template_writes(outlines: dict[str, ClientOutline]) -> None:
    tokenizer = copy.deepcopy(outlines["chat"].tokenizer)
    tokenizer.chat_template = CHAT
    examples = [Example("hello", "", "", "a", turns=(("system", "secret words"),))]
    prompt = ClientOutline([], examples, tokenizer, 8, 0.5).prompt(SIZES)
    begin = prompt.index(-1)
    assert prompt[begin : begin + 4] == (-1, -2, -3, -4)
    assert tokenizer.decode(prompt[:begin]) == "[user]"
    assert tokenizer.decode(prompt[begin + 4 :]) == "<end>[assistant]"
