"""A conversation: laid out as in training, remembered while there is room, and ended cleanly."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedamole.data.layouts import conversation_prompt
from fedamole.data.tokens import prompt_ids
from fedamole.errors import DataError
from fedamole.evaluation.generation import generate_answers
from fedamole.model.bank import Bank
from fedamole.personal.chat import Chat, run_chat
from fedamole.personal.generate import raw_prompt
from fedamole.personal.saved_models import find_model, open_bank
from fedamole.terminal import printable
from tests.conftest import heeding_interrupts


def loaded(run: Path, client: str = "chat") -> Bank:
    bank, adapters = open_bank([find_model(run, client)], "cpu")
    bank.load(adapters)
    return bank


@pytest.fixture(scope="module")
def bank(runs: Any) -> Bank:
    return loaded(runs("fedamole"))


def answer(bank: Bank, turns: list[tuple[str, str]], tokens: int) -> str:
    """What evaluation generates after these turns."""
    ids = prompt_ids(raw_prompt(conversation_prompt(turns)), bank.base.tokenizer)
    return generate_answers(bank, [[ids]], tokens, 8192)[0][0]


@pytest.mark.parametrize("method", ["fedamole", "feddpa", "fedprompt"])
def test_answers_are_those_of_evaluation(method: str, runs: Any) -> None:
    """The first long enough for FedDPA's weights by instance to decide some of its words; then two in a row."""
    bank, messages = loaded(runs(method), "entail"), list[str]()
    Chat(bank, 16).answer("the last pie is bad, says Gus", messages.append)
    assert "".join(messages).strip() == answer(bank, [("user", "the last pie is bad, says Gus")], 16)
    chat = Chat(bank, 4, "Be brief.")
    chat.answer("who?", lambda _: None)
    chat.answer("and now?", lambda _: None)
    turns = [("system", "Be brief."), ("user", "who?")]
    for text in ("and now?", ""):
        turns += [("assistant", answer(bank, turns, 4)), ("user", text)]
    assert chat.turns == turns[1:-1]


def test_special_tokens_in_a_message_are_text(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """`<end>` in what is said, by user or assistant, reaches the model letter by letter."""
    chat, seen = Chat(bank, 2, "Be <pad>."), list[tuple[int, ...]]()
    chat.turns = [("user", "a<end>"), ("assistant", "b<end>")]
    monkeypatch.setattr(chat, "_generate", lambda ids, arguments: seen.append(ids))
    chat.answer("c<end>", lambda _: None)
    (ids,) = seen
    assert not {bank.base.tokenizer.eos_token_id, bank.base.pad_id} & set(ids)
    turns = [("system", "Be <pad>."), ("user", "a<end>"), ("assistant", "b<end>"), ("user", "c<end>")]
    assert bank.base.tokenizer.decode(ids) == conversation_prompt(turns)


def test_half_a_character_is_refused_and_the_conversation_continues(bank: Bank) -> None:
    notes, texts = list[str](), iter(["hi \udc80", "/quit"])
    run_chat(Chat(bank, 2), lambda: next(texts), lambda _: None, notes.append)
    assert notes == ["text 1 of 1 holds half a character (U+DC80) at position 14; correct it"]


def test_an_answer_comes_in_words(bank: Bank) -> None:
    messages: list[str] = []
    Chat(bank, 24).answer("day 3: who has a blue hat?", messages.append)
    assert len(messages) > 1
    assert messages[0] == messages[0].lstrip()


def test_the_oldest_turns_are_forgotten(bank: Bank) -> None:
    """128 positions: three turns fit beside an answer of 4 tokens, later ones push the first out; never the system."""
    chat, forgotten = Chat(bank, 4, "Be kind."), 0
    for number in range(8):
        forgotten += chat.answer(f"day {number}: who?", lambda _: None)
        prompt = conversation_prompt([("system", "Be kind."), *chat.turns[:-1]])
        assert len(prompt_ids(raw_prompt(prompt), bank.base.tokenizer)) <= 124
        assert chat.turns[0][0] == "user"
        assert chat.turns[-2] == ("user", f"day {number}: who?")
    assert forgotten > 0
    assert len(chat.turns) == 16 - forgotten


def test_a_message_that_is_too_long(bank: Bank) -> None:
    chat = Chat(bank, 4)
    chat.answer("who?", lambda _: None)
    before = list(chat.turns)
    with pytest.raises(DataError, match=r"tokens in a prompt, and only 124 fit: shorten it"):
        chat.answer("a blue hat " * 90, lambda _: None)
    assert chat.turns == before


def test_new_begins_anew_and_quit_ends(bank: Bank) -> None:
    chat, messages, noted = Chat(bank, 4), list[str](), list[str]()
    inputs: Iterator[str] = iter(["who?", "", "/new", "who?", "x" * 400, "/quit", "never"])
    run_chat(chat, lambda: next(inputs), messages.append, noted.append)
    first, second = "".join(messages).splitlines()
    assert first == second
    assert noted[0] == "a new conversation"
    assert "shorten it" in noted[1]
    assert next(inputs) == "never"


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_the_end_of_the_input_and_an_interrupt_end_it(end: type[BaseException], bank: Bank) -> None:
    def ask() -> str:
        raise end

    run_chat(Chat(bank, 4), ask, lambda _: None, lambda _: None)


def test_an_interrupt_ends_an_answer(bank: Bank) -> None:
    def say(text: str) -> None:
        raise KeyboardInterrupt

    chat = Chat(bank, 24)
    run_chat(chat, lambda: "day 3: who has a blue hat?", say, lambda _: None)
    assert chat.turns == []


def test_through_a_pipe(fedamole: Any, runs: Any, bank: Bank, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("who?\n\nand now?\n"))
    result = fedamole("chat", runs("fedamole"), "--client", "chat")
    assert result.code == 0, result.err
    first = answer(bank, [("user", "who?")], 4)
    second = answer(bank, [("user", "who?"), ("assistant", first), ("user", "and now?")], 4)
    assert [line.strip() for line in result.out.splitlines()] == [printable(first), printable(second)]


def test_an_interrupt_on_a_terminal(runs: Any) -> None:
    """The command on a terminal of its own, interrupted when it asks the user."""
    outer, inner = pty.openpty()
    arguments = [sys.executable, "-m", "fedamole", "chat", str(runs("fedamole")), "--client", "chat"]
    process = subprocess.Popen(
        arguments, stdin=inner, stdout=inner, stderr=inner, start_new_session=True, preexec_fn=heeding_interrupts
    )
    os.close(inner)
    screen, end = b"", time.monotonic() + 100
    try:
        while process.poll() is None and time.monotonic() < end:
            if select.select([outer], [], [], 0.5)[0]:
                try:
                    screen += os.read(outer, 4096)
                except OSError:  # the terminal is closed with the process
                    break
            elif screen.endswith(b"you>\x1b[0m "):  # again where need be: just before it waits for keys one is missed
                process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0, screen
    finally:
        process.kill()
        os.close(outer)
    assert b"chat's model" in screen
    assert b"Traceback" not in screen
