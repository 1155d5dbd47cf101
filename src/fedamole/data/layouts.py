"""Rename the columns of instruction data to the names that templates use.

Common layouts become one of two: instruction/context/response, or prompt/completion.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedamole.errors import DataError
from fedamole.received.names import cut

Row = dict[str, Any]
MAX_LISTED = 20
"""Maximum number of columns that an error lists; in a malformed file the names may be data."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number of a JSON file with the file's literal, so that `1`, `1.10` and `1e5` are reproduced exactly."""

    literal: str

    def __str__(self) -> str:
        return self.literal


def shortened(value: object, max_length: int = 60) -> str:
    """Return the `repr` of a label or name for an error message, truncated to `max_length` characters."""
    return cut(repr(str(value)), max_length)


def listed(columns: Iterable[str]) -> str:
    """Return the sorted column names for an error message: each truncated, at most MAX_LISTED of them."""
    names = sorted(columns)
    shown = [cut(name, 40) for name in names[:MAX_LISTED]]
    return ", ".join(shown) + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")


Turn = tuple[str, str]
"""A turn of a conversation: the role (system, user or assistant) and the text."""


class Conversation(str):
    """The turns of a row with `messages` before its answer, as one text; templates with `chat` read `turns`."""

    turns: tuple[Turn, ...]

    def __new__(cls, turns: Sequence[Turn]) -> "Conversation":
        """Create the text of `conversation_prompt`."""
        self = super().__new__(cls, conversation_prompt(turns))
        self.turns = tuple(turns)
        return self


ROLE_HEADINGS = {"system": "System", "user": "User", "assistant": "Assistant"}


CONVERSATION_END = f"### {ROLE_HEADINGS['assistant']}:\n"
"""The end of a conversation that is rendered without a chat template."""


def missing_column(column: str, columns: Iterable[str], where: str) -> DataError:
    """Return the error for a missing column. It names the file, its columns and the closest name."""
    present = list(columns)
    near = difflib.get_close_matches(column, present, n=1, cutoff=0.5)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    return DataError(
        f"{where}: there is no column {column!r}{guess}; its columns are {listed(present)}. "
        f'Name the right one, or rename with columns = {{{column} = "..."}} in this [[data.source]]'
    )


def arrange(rows: Sequence[Row], columns: Mapping[str, str], where: str, template: str = "auto") -> tuple[Row, ...]:
    """Add the columns that templates use to rows, and drop the ones that `columns` maps to an empty text.

    `columns` maps new names to the file's names; the original columns stay. Then `messages` becomes prompt/completion
    unless one of these columns exists; the templates "messages", "chat" and "chat_turns" use `messages` in any case.
    Instruction/input/output becomes instruction/context/response unless these exist. Raises DataError if a column to
    rename, drop or use is missing, and for malformed messages.
    """
    have = set(rows[0])
    renamed = {new: old for new, old in columns.items() if old}
    dropped = set(columns) - set(renamed)
    for column in (*renamed.values(), *dropped):
        if column not in have:
            raise missing_column(column, have, where)
    have = have - dropped | set(renamed)
    if not have:
        raise DataError(f"{where}: columns drops all columns of the file; keep those that the template needs")
    if template == "messages" and "messages" not in have:
        raise missing_column("messages", have, where)
    arranged = [
        {
            **{column: value for column, value in row.items() if column not in dropped},
            **{new: row[old] for new, old in renamed.items()},
        }
        for row in rows
    ]
    first = template in ("messages", "chat", "chat_turns") or not {"prompt", "completion"} & have
    if "messages" in have and first:
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


def from_messages(messages: Any, where: str) -> tuple[Conversation, str]:
    """Return prompt and answer of a conversation. The last assistant turn is the answer; later turns are left out.

    `messages` is a list of {role, content} with the roles system, user and assistant. Raises DataError, which begins
    with `where`, for anything else, and if no assistant turn follows another turn.
    """
    turns: list[Turn] = []
    for turn in messages if isinstance(messages, list) else [messages]:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise DataError(
                f"{where}: messages is not a list of turns; each turn must be {{role, content}}, both of them strings"
            )
        if turn.get("role") not in ROLE_HEADINGS:
            role = shortened(turn.get("role"))
            raise DataError(f"{where}: messages has the role {role}; known are {', '.join(ROLE_HEADINGS)}")
        turns.append((turn["role"], turn["content"]))
    last = max((index for index, (role, _) in enumerate(turns) if role == "assistant"), default=0)
    if last == 0:
        raise DataError(f"{where}: messages has no assistant turn after another turn; remove the row")
    return Conversation(turns[:last]), turns[last][1]


def conversation_prompt(turns: Sequence[Turn]) -> str:
    """Return a conversation as a prompt for the assistant's next turn; `turns` are (role, content).

    All conversations use this format, except with a template with `chat` (data/chat.py).
    """
    text = "".join(f"### {ROLE_HEADINGS[role]}:\n{content}\n\n" for role, content in turns)
    return text + CONVERSATION_END
