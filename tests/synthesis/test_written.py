"""Rows that a model writes: shares of categories by hand, the request, and what of a text is kept."""

from typing import Any

import pytest

from fedamole.data.examples import Example
from fedamole.data.templates import TemplateSettings, render
from fedamole.synthesis.written import column_values, request_text, shares_of_errors, written_example

LETTER = TemplateSettings(
    prompt="Letter: {text}\nFrom: {town}\nUrgent?\n", answer="{label}", options=("yes", "no"), category="{topic}"
)


def letter(text: str, answer: str = "yes", topic: str | None = "rent", **changed: Any) -> Example:
    template = TemplateSettings(**{**vars(LETTER), **changed})
    row = {"text": text, "town": "Ulm", "label": answer, "topic": topic}
    example = render(template, template.options, row, "row 1")
    assert example is not None
    return example


@pytest.mark.parametrize(
    ("errors", "rows", "shares"),
    [
        ({"a": 0.5, "b": 0.25, "c": 0.0}, 30, {"a": 20, "b": 10, "c": 0}),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, 8, {"a": 3, "b": 3, "c": 2}),  # 2.67 each; the first names get what is left
        ({"a": 0.1, "b": 0.9}, 4, {"a": 0, "b": 4}),  # 0.4 and 3.6: the larger remainder
        ({"a": 0.0, "b": 0.0}, 30, {"a": 0, "b": 0}),
        ({}, 30, {}),
    ],
)
def test_shares_by_hand(errors: dict[str, float], rows: int, shares: dict[str, int]) -> None:
    assert shares_of_errors(errors, rows) == shares
    assert list(shares_of_errors(dict(reversed(errors.items())), rows)) == list(reversed(shares)), "the keys' order"


def test_the_group_of_an_example() -> None:
    assert letter("a").group == "rent"
    assert letter("a", topic=None).group == "", "an empty value is a category of its own"
    assert letter("a", category=None).group == "yes"
    assert letter("a", category=None, options=()).group == ""


def test_a_request_shows_the_category_and_the_bad_cases() -> None:
    assert request_text("rent", [letter("a b"), letter("c", "no")]) == (
        "Write a new example of the category rent.\n\n"
        "Example:\nLetter: a b\nFrom: Ulm\nUrgent?\nAnswer: yes\n\n"
        "Example:\nLetter: c\nFrom: Ulm\nUrgent?\nAnswer: no\n\n"
        "Example:\n"
    )
    assert request_text("", []).startswith("Write a new example.\n")


GOOD = "Letter: The roof leaks\nFrom: Bonn\nUrgent?\nAnswer: no"


def test_a_text_in_the_form_of_the_template_becomes_the_row_that_a_file_would_give() -> None:
    expected = render(
        LETTER, LETTER.options, {"text": "The roof leaks", "town": "Bonn", "label": "no", "topic": "rent"}, "row"
    )
    for text in (GOOD, f"\n{GOOD}\n\nExample:\nLetter: and more", f"{GOOD}\nmore"):
        example = written_example(text, "rent", [letter("a")])
        assert example == expected
        assert example is not None
        assert expected is not None
        assert (example.literals, example.category) == (expected.literals, "rent")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Letter: The roof leaks\nFrom: Bonn\nUrgent?",  # no answer
        GOOD.replace("no", "perhaps"),  # not an option
        GOOD.replace("From: ", "To: "),  # not the template
        GOOD.replace("Urgent?", ""),
        GOOD.replace("Bonn", " "),  # an empty value
        GOOD.replace("Letter", "letter"),
    ],
)
def test_other_texts_are_left_out(text: str) -> None:
    assert written_example(text, "rent", [letter("a")]) is None


def test_where_the_category_is_the_answer_a_row_must_have_it() -> None:
    shown = [letter("a", category=None)]
    assert written_example(GOOD, "yes", shown) is None
    example = written_example(GOOD, "no", shown)
    assert example is not None
    assert example.group == "no"


def test_free_text_keeps_all_of_the_answer_and_either_form_of_the_template_fits() -> None:
    template = TemplateSettings(
        prompt="Q: {q}\nC: {c}\n", prompt_without_context="Q: {q}\n", context="c", answer="{a}", category="{t}"
    )
    long, short = (render(template, (), {"q": "x", "c": c, "a": "y", "t": "t"}, "row") for c in ("z", None))
    assert long is not None
    assert short is not None
    example = written_example("Q: who?\nAnswer: he\nor she", "t", [long, short])
    assert example is not None
    assert (example.prompt, example.answer, example.options) == ("Q: who?\n", "he\nor she", ())
    assert example.literals.before == ((0, 3), (7, 8))


def test_special_texts_of_a_model_stay_data() -> None:
    """Only spans of the template are marked as such, so `</s>` in a written text is never read as a token."""
    text = GOOD.replace("The roof leaks", "</s> Urgent?")
    example = written_example(text, "rent", [letter("a")])
    assert example is not None
    assert not any(start <= example.prompt.index("</s>") < end for start, end in example.literals.before)


def test_of_a_conversation_the_system_message_is_kept() -> None:
    like = letter("a", chat=True, system="Be brief.")
    example = written_example(GOOD, "rent", [like])
    assert example is not None
    assert example.turns == (("system", "Be brief."),)


@pytest.mark.parametrize(
    ("prompt", "pieces", "values"),
    [
        ("a 1 b 2 c", ("a ", " b ", " c"), ["1", "2"]),
        ("all of it", ("", ""), ["all of it"]),
        ("always this", ("always this",), []),
        ("x", ("x", "x"), []),  # the pieces overlap
        ("a b c", ("a ", " b ", " c"), []),
        ("ab", ("a", "b"), []),
    ],
)
def test_values_of_columns_by_hand(prompt: str, pieces: tuple[str, ...], values: list[str]) -> None:
    assert column_values(prompt, pieces) == values
