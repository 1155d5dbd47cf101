"""Column layouts of instruction data, brought to two: instruction/context/response and prompt/completion."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedamole.errors import DataError
from fedamole.received.names import cut

Row = dict[str, Any]
MOST_NAMES = 20
"""Columns that an error lists; a file of a wrong shape may have its data where the names belong."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number of a JSON file, kept as the file writes it: `1`, `1.10` and `1e5` do not become other numbers."""

    literal: str

    def __str__(self) -> str:
        return self.literal


def shortened(value: object, most: int = 60) -> str:
    """Return a label or a name for an error's text: as Python writes it, cut to `most` characters."""
    return cut(repr(str(value)), most)


def listed(columns: Iterable[str]) -> str:
    """Return the sorted names of columns for an error's text: each shortened, at most MOST_NAMES of them."""
    names = sorted(columns)
    shown = [cut(name, 40) for name in names[:MOST_NAMES]]
    return ", ".join(shown) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


ROLE_HEADINGS = {"system": "System", "user": "User", "assistant": "Assistant"}


def missing_column(column: str, columns: Iterable[str], where: str) -> DataError:
    """The error for a column that a file does not have: names the file, its columns and the nearest name."""
    present = list(columns)
    near = difflib.get_close_matches(column, present, n=1, cutoff=0.5)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    return DataError(
        f"{where}: there is no column {column!r}{guess}; its columns are {listed(present)}. "
        f'Name the right one, or rename with columns = {{{column} = "..."}} in this [[data.source]]'
    )


def arrange(rows: Sequence[Row], columns: Mapping[str, str], where: str, template: str = "auto") -> tuple[Row, ...]:
    """Rows with the columns that templates know.

    `columns` names for each new column the file's own one, which stays beside it; an empty text drops the column.
    Then `messages` become prompt/completion, unless there is a column prompt or completion; the template "messages"
    uses `messages` in any case. Instruction/input/output become instruction/context/response, unless these are there.
    Raises DataError for a column to rename, drop or use that is not there and for unreadable messages.
    """
    have = set(rows[0])
    renamed = {new: old for new, old in columns.items() if old}
    dropped = set(columns) - set(renamed)
    for column in (*renamed.values(), *dropped):
        if column not in have:
            raise missing_column(column, have, where)
    have = have - dropped | set(renamed)
    if not have:
        raise DataError(f"{where}: columns drops every column of the file; keep those that the template needs")
    if template == "messages" and "messages" not in have:
        raise missing_column("messages", have, where)
    arranged = [
        {
            **{column: value for column, value in row.items() if column not in dropped},
            **{new: row[old] for new, old in renamed.items()},
        }
        for row in rows
    ]
    if template == "messages" or ("messages" in have and not {"prompt", "completion"} & have):
        for number, row in enumerate(arranged, start=1):
            row["prompt"], row["completion"] = from_messages(row["messages"], f"{where}, row {number}")
    if "instruction" in have and "output" in have and "response" not in have:
        for row in arranged:
            row["response"] = row["output"]
        have.add("response")
    if "instruction" in have and "response" in have and "context" not in have:
        for row in arranged:
            row["context"] = row.get("input", "")
    return tuple(arranged)


def from_messages(messages: Any, where: str) -> tuple[str, str]:
    """Prompt and answer of a conversation: the last assistant turn answers, what follows is left out.

    `messages` is a list of {role, content} with roles system, user and assistant. Raises DataError, with
    `where`, for anything else and for a conversation without an assistant turn after another one.
    """
    turns: list[tuple[str, str]] = []
    for turn in messages if isinstance(messages, list) else [messages]:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise DataError(
                f"{where}: messages is not a list of turns; each turn must be {{role, content}} with text in both"
            )
        if turn.get("role") not in ROLE_HEADINGS:
            role = shortened(turn.get("role"))
            raise DataError(f"{where}: messages has the role {role}; known are {', '.join(ROLE_HEADINGS)}")
        turns.append((turn["role"], turn["content"]))
    last = max((at for at, (role, _) in enumerate(turns) if role == "assistant"), default=0)
    if last == 0:
        raise DataError(f"{where}: messages has no assistant turn that answers another; remove the row")
    return conversation_prompt(turns[:last]), turns[last][1]


def conversation_prompt(turns: Sequence[tuple[str, str]]) -> str:
    """A conversation in a plain layout, ending where the assistant speaks; `turns` are (role, content).

    The one place that lays out a conversation: a base with a chat template of its own would be served from
    here.
    """
    told = "".join(f"### {ROLE_HEADINGS[role]}:\n{content}\n\n" for role, content in turns)
    return told + f"### {ROLE_HEADINGS['assistant']}:\n"
