import tomllib
from dataclasses import replace
from typing import Any

import pytest

from fedamole.data.answer_options import options_of
from fedamole.data.templates import BUILT_IN, TemplateSettings, choose, render
from fedamole.errors import ConfigError, DataError


def example(name: str, row: dict[str, Any], others: tuple[dict[str, Any], ...] = ()) -> Any:
    template = choose(name, {}, row, "f")
    return render(template, options_of(template, [row, *others], "f"), row, "f, row 1")


def test_alpaca_with_a_context_that_alone_may_be_cut() -> None:
    rendered = example("alpaca", {"instruction": "Sum up.", "context": "Long text.", "response": "Short."})
    assert rendered.context == "Long text."
    assert rendered.before.endswith("### Instruction:\nSum up.\n\n### Input:\n")
    assert rendered.after == "\n\n### Response:\n"
    assert (rendered.answer, rendered.options) == ("Short.", ())


@pytest.mark.parametrize("empty", ["", " ", None])
def test_alpaca_without_context_has_no_input_heading(empty: str | None) -> None:
    rendered = example("alpaca", {"instruction": "Run.", "context": empty, "response": "Done."})
    assert "### Input" not in rendered.prompt
    assert rendered.context == ""
    assert rendered.prompt.endswith("### Instruction:\nRun.\n\n### Response:\n")


@pytest.mark.parametrize(
    ("label", "answer"), [(0, "Yes"), (1, "Maybe"), (2, "No"), ("2", "No"), ("contradiction", "No")]
)
def test_snli(label: int | str, answer: str) -> None:
    rendered = example("snli", {"premise": "A man runs.", "hypothesis": "He sleeps.", "label": label})
    assert (rendered.answer, rendered.options) == (answer, ("Yes", "Maybe", "No"))
    assert rendered.prompt == "Premise: A man runs.\nHypothesis: He sleeps.\nDoes the premise imply it?\nAnswer:\n"


def test_snli_pairs_without_a_gold_label_have_no_example() -> None:
    assert example("snli", {"premise": "p", "hypothesis": "h", "label": -1}) is None


def test_banking77_takes_its_options_from_all_rows() -> None:
    others = ({"text": "u", "label_text": "b"}, {"text": "v", "label_text": "a"})
    rendered = example("banking77", {"text": "t", "label_text": "c"}, others)
    assert (rendered.answer, rendered.options) == ("c", ("a", "b", "c"))


def test_pubmedqa_cuts_only_the_abstract() -> None:
    rendered = example("pubmedqa", {"question": "Does it?", "context": "We saw.", "label_text": "maybe"})
    assert (rendered.before, rendered.context) == ("Abstract: ", "We saw.")
    assert rendered.after == "\n\nQuestion: Does it?\nAnswer with yes, no or maybe.\nAnswer:\n"
    assert (rendered.answer, rendered.options) == ("maybe", ("yes", "no", "maybe"))


def test_the_plain_template_changes_nothing() -> None:
    rendered = example("plain", {"prompt": "1 + 1 = ", "completion": "2"})
    assert (rendered.prompt, rendered.answer) == ("1 + 1 = ", "2")


def test_classification_falls_back_to_the_bare_label() -> None:
    rendered = example("classification", {"text": "t", "label": 3}, ({"text": "u", "label": 1},))
    assert (rendered.answer, rendered.options) == ("3", ("1", "3"))


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (("premise", "hypothesis", "label"), "snli"),
        (("instruction", "context", "response", "category"), "alpaca"),
        (("prompt", "completion"), "plain"),
        (("text", "label", "label_text"), "classification"),
    ],
)
def test_auto_goes_by_the_columns(columns: tuple[str, ...], name: str) -> None:
    assert choose("auto", {}, columns, "f") == BUILT_IN[name]


def test_auto_that_finds_nothing_lists_columns_and_templates() -> None:
    with pytest.raises(
        DataError, match=r"f: no template fits the columns a, b; rename them .*Known are instruction, context"
    ):
        choose("auto", {}, ("a", "b"), "f")


def test_a_missing_column_is_named_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no column 'premise' \(did you mean 'premises'\?\); its columns are hyp"):
        choose("snli", {}, ("premises", "hypothesis", "label"), "f")


def test_a_label_outside_the_options_names_row_value_and_options() -> None:
    with pytest.raises(DataError, match=r"f, row 1: the label 'perhaps' is outside .* \['yes', 'no', 'maybe'\]"):
        example("pubmedqa", {"question": "q", "context": "c", "label_text": "perhaps"})
    with pytest.raises(DataError, match="f, row 1: the label '7' is outside the template's labels"):
        example("snli", {"premise": "p", "hypothesis": "h", "label": 7})


def test_an_empty_prompt_column_is_an_error_and_an_empty_answer_no_example() -> None:
    with pytest.raises(DataError, match="f, row 1: column 'prompt' is empty"):
        example("plain", {"prompt": None, "completion": "x"})
    assert example("plain", {"prompt": "p", "completion": None}) is None
    assert example("plain", {"prompt": "p", "completion": " "}) is None


def test_a_list_is_no_text() -> None:
    with pytest.raises(DataError, match=r"column 'prompt' contains a list or an object; a template requires text"):
        example("plain", {"prompt": ["p"], "completion": "x"})


def test_braces_in_the_data_stay_plain_text() -> None:
    row = {"instruction": "{response} {0} {{", "context": "{instruction}", "response": "}{"}
    rendered = example("alpaca", row)
    assert "### Instruction:\n{response} {0} {{\n\n### Input:\n{instruction}\n" in rendered.prompt
    assert rendered.answer == "}{"


def test_an_own_template_with_labels_and_literal_braces() -> None:
    own = TemplateSettings(prompt="{{Q}} {q}\n", answer="{a}", labels={"1": "Yes", "0": "No"})
    template = choose("mine", {"mine": own}, ("q", "a"), "f")
    rendered = render(template, options_of(template, [], "f"), {"q": "Really?", "a": 1}, "f")
    assert rendered is not None
    assert (rendered.prompt, rendered.answer, rendered.options) == ("{Q} Really?\n", "Yes", ("Yes", "No"))


def test_a_category_is_text_of_a_row_and_not_compared() -> None:
    own = TemplateSettings(prompt="{q}\n", answer="{a}", category="{kind}: {part} ")
    with pytest.raises(DataError, match="f: there is no column 'part'"):
        choose("mine", {"mine": own}, ("q", "a", "kind"), "f")
    template = choose("mine", {"mine": own}, ("q", "a", "kind", "part"), "f")
    row = {"q": "Why?", "a": "So", "kind": "law", "part": 3}
    first, other, without = (
        render(chosen, (), values, "f")
        for chosen, values in ((template, row), (template, {**row, "part": None}), (replace(own, category=None), row))
    )
    assert first is not None
    assert other is not None
    assert without is not None
    assert (first.category, other.category, without.category) == ("law: 3", "law:", None)
    assert first == other == without, "rows of two categories may be duplicates"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "{q!r}", "answer": "{a}"}, "without format or conversion"),
        ({"prompt": "{q", "answer": "{a}"}, "write literal braces as"),
        ({"prompt": "{q}", "answer": "Yes"}, "names no column"),
        ({"prompt": "{q}", "answer": "{a}", "category": "all"}, r"category = 'all': it names no column"),
        ({"prompt": "{q}", "answer": "{a}", "category": "{}"}, "must be written as"),
        ({"prompt": "{q}", "answer": "{a}", "context": "c"}, "exactly once"),
        ({"prompt": "{q}", "answer": "{a}", "prompt_without_context": "x"}, "requires context"),
        ({"prompt": "{c}", "answer": "{a}", "context": "c", "prompt_without_context": "{c}"}, "must not contain"),
        ({"prompt": "{q}", "answer": "{a}", "options": ("x",)}, "at least two"),
        ({"prompt": "{q}", "answer": "{a}", "options": ("x", "y"), "options_from": "a"}, "not both"),
        ({"prompt": "{q}", "answer": "{a}", "options": ("x", "y"), "labels": {"1": "z"}}, r"\['x', 'y'\]"),
    ],
)
def test_templates_refuse(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TemplateSettings(**given)


def test_options_need_two_values() -> None:
    with pytest.raises(DataError, match=r"column 'label_text' has only the values \['a'\]"):
        options_of(BUILT_IN["banking77"], [{"label_text": "a"}, {"label_text": None}], "f")


def test_labels_that_differ_by_white_space_are_one_option(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "t", "label_text": label} for label in ("yes", "yes ", "\tyes", "no", " no", " maybe", " ")]
    template = BUILT_IN["classification"]
    options = options_of(template, rows, "f")
    assert options == (" maybe", "no", "yes"), "a label that is always written in one way stays as it is"
    assert [record.getMessage() for record in caplog.records] == [
        "f: 3 of 7 labels have white space around them, which is removed; for example 'yes '"
    ]
    examples = [render(template, options, row, "f") for row in rows]
    answers = [None if example is None else example.answer for example in examples]
    assert answers == ["yes", "yes", "yes", "no", "no", " maybe", None]


def test_white_space_around_a_label_of_a_fixed_list(caplog: pytest.LogCaptureFixture) -> None:
    row = {"premise": "p", "hypothesis": "h", "label": "neutral "}
    assert example("snli", row).answer == "Maybe"
    assert "1 of 1 labels have white space" in caplog.text
    assert example("pubmedqa", {"question": "q", "context": "c", "label_text": " no"}).answer == "no"


def test_errors_show_the_beginning_of_a_long_label_alone() -> None:
    with pytest.raises(DataError, match=r"the label 'long long.* \.\.\. is outside") as error:
        example("pubmedqa", {"question": "q", "context": "c", "label_text": "long " * 5000})
    assert len(str(error.value)) < 300


def test_errors_list_a_few_columns_alone() -> None:
    with pytest.raises(DataError, match=r"no template fits the columns c0000, .* and 980 more; rename") as error:
        choose("auto", {}, [f"c{at:04}" + "x" * at for at in range(1000)], "f")
    assert len(str(error.value)) < 1500
    with pytest.raises(DataError, match="and 980 more"):
        choose("snli", {}, [f"c{at:04}" for at in range(1000)], "f")


@pytest.mark.parametrize("beside", ["prompt", "completion"])
def test_messages_beside_another_column_names_both_remedies(beside: str) -> None:
    with pytest.raises(DataError) as caught:
        choose("auto", {}, (beside, "prompt_id", "messages"), "f")
    message = str(caught.value)
    assert message.startswith(f"f: both of the columns messages and {beside} could")
    assert 'set template = "messages"' in message
    assert f'columns = {{{beside} = ""}}' in message
    assert f"--template messages or --column {beside}=" in message


def test_the_template_messages_reads_what_was_made_of_messages() -> None:
    assert choose("messages", {}, ("prompt", "completion", "messages"), "f") == BUILT_IN["plain"]


def test_a_single_label_shows_the_template_that_lists_all_answers() -> None:
    """The table in the error is TOML of the same template, once the other answers are added."""
    label = 'no "way"\n\x7f'
    template = replace(BUILT_IN["pubmedqa"], options=(), options_from="label_text")
    with pytest.raises(DataError) as caught:
        options_of(template, [{"label_text": label}, {"label_text": None}], "f")
    message = str(caught.value)
    assert "in a deployment, the coordinator's" in message
    assert "--template task for a client's own file" in message
    table = message.partition("under [data.templates], ")[2].partition(". Then use it")[0]
    assert table.endswith(", ...] }"), "as it stands it is no TOML, so that nobody forgets the other answers"
    table_settings = tomllib.loads(table.replace("...", '"yes"'))["task"]
    suggested = TemplateSettings(**{**table_settings, "options": tuple(table_settings["options"])})
    assert suggested == replace(template, options=(label, "yes"), options_from=None)
