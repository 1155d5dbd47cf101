from typing import Any

import pytest

from fedamole.data.layouts import arrange, from_messages
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
        ([{"role": "assistant", "content": "x"}], "no assistant turn that answers another"),
    ],
)
def test_unreadable_messages_name_the_row(messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_messages(messages, "f, row 3")
