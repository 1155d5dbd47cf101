from typing import Any

import pytest

from fedamole.data.layouts import arrange, conversation_prompt, from_messages
from fedamole.errors import DataError


def test_input_and_output_become_context_and_response() -> None:
    (row,) = arrange([{"instruction": "i", "input": "c", "output": "r"}], {}, "f")
    assert (row["instruction"], row["context"], row["response"]) == ("i", "c", "r")


def test_instruction_data_without_a_context_column_get_an_empty_one() -> None:
    (row,) = arrange([{"instruction": "i", "response": "r"}], {}, "f")
    assert row["context"] == ""


def test_renaming_keeps_the_files_own_column() -> None:
    (row,) = arrange([{"question": "q", "answer": "a"}], {"instruction": "question", "response": "answer"}, "f")
    assert row == {"question": "q", "answer": "a", "instruction": "q", "response": "a", "context": ""}


def test_renaming_a_missing_column_names_the_file_and_the_nearest() -> None:
    with pytest.raises(DataError, match=r"file.csv: there is no column 'qestion' \(did you mean 'question'\?\)"):
        arrange([{"question": "q"}], {"instruction": "qestion"}, "file.csv")


def test_the_last_assistant_turn_is_the_answer() -> None:
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "So long")]
    (row,) = arrange([{"messages": [{"role": r, "content": c} for r, c in [*turns, ("user", "?")]]}], {}, "f")
    assert row["prompt"] == (
        "### System:\nBe kind.\n\n### User:\nHi\n\n### Assistant:\nHello\n\n### User:\nBye\n\n### Assistant:\n"
    )
    assert row["completion"] == "So long"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "row 3: messages is not a list of turns"),
        ([{"role": "user"}], "each turn must be"),
        ([{"role": "robot", "content": "x"}], "role 'robot'; known are system, user, assistant"),
        ([{"role": "user", "content": "x"}], "no assistant turn"),
        ([{"role": "assistant", "content": "x"}], "no assistant turn after another turn"),
    ],
)
def test_unreadable_messages_name_the_row(messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_messages(messages, "f, row 3")


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


BESIDE = {"prompt": "raw", "prompt_id": "7", "messages": talk("Hi", "Hello")}
"""A common format of chat data on the Hub."""


def test_an_empty_old_name_drops_a_column() -> None:
    (row,) = arrange([BESIDE], {"prompt": "", "prompt_id": ""}, "f")
    prompt = conversation_prompt([("user", "Hi")])
    assert row == {"messages": BESIDE["messages"], "prompt": prompt, "completion": "Hello"}


def test_a_dropped_column_may_be_renamed_and_a_drop_comes_before_the_layouts() -> None:
    row = {"instruction": "i", "input": "c", "output": "r"}
    assert arrange([row], {"input": ""}, "f")[0]["context"] == ""
    (moved,) = arrange([row], {"question": "instruction", "instruction": ""}, "f")
    assert moved == {"question": "i", "input": "c", "output": "r"}


def test_a_column_to_drop_must_be_there_and_one_must_stay() -> None:
    with pytest.raises(DataError, match=r"f: there is no column 'promt' \(did you mean 'prompt'\?\)"):
        arrange([BESIDE], {"promt": ""}, "f")
    with pytest.raises(DataError, match="f: columns drops all columns of the file"):
        arrange([{"a": 1}], {"a": ""}, "f")


def test_the_template_messages_uses_messages_beside_any_column() -> None:
    (row,) = arrange([{**BESIDE, "completion": "raw too"}], {}, "f", "messages")
    assert (row["prompt"], row["completion"]) == (conversation_prompt([("user", "Hi")]), "Hello")
    (renamed,) = arrange([{"prompt": "raw", "chat": talk("Hi", "Ho")}], {"messages": "chat"}, "f", "messages")
    assert renamed["completion"] == "Ho"
    with pytest.raises(DataError, match="f: there is no column 'messages'"):
        arrange([{"prompt": "p", "completion": "c"}], {}, "f", "messages")


def test_without_the_template_a_prompt_beside_messages_stays_as_it_is() -> None:
    assert arrange([BESIDE], {}, "f") == (BESIDE,)
