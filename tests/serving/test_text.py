"""Streamed text, compared with a naive matcher that searches the whole text again for each character."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedamole.serving.streaming_text import MAX_PENDING_TOKENS, StopMatcher, StreamingText

from ..model.conftest import write_tokenizer


def naive(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Where an answer ends, by the definition."""
    for end in range(1, len(text) + 1):
        completed = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if completed:
            return text[: end - max(completed)].strip(), True
    return text.strip(), False


def certain(text: str, stops: Sequence[str]) -> str:
    """What may be shown of a text that goes on."""
    begun = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
    return text[: len(text) - max(begun, default=0)].strip()


LETTERS = "ab\n"


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text(LETTERS, max_size=5), max_size=20),
    st.one_of(
        st.lists(st.text(LETTERS, min_size=1, max_size=6), max_size=4),
        st.lists(st.text("ab", min_size=4, max_size=7), min_size=1, max_size=2),
    ),
)
@example(["a", "aa", "b"], ["aab"])
def test_stop_strings_are_found_as_by_a_naive_matcher(tokens: list[str], stops: list[str]) -> None:
    """Tokens of any length, and stop strings that overlap, contain each other and themselves."""
    streaming, shown = StreamingText(lambda ids: "".join(tokens[index] for index in ids), stops), ""
    for size in range(1, len(tokens) + 1):
        text = "".join(tokens[:size])
        chunk, stopped = streaming.update(range(size), size == len(tokens))
        shown += chunk
        assert stopped == naive(text, stops)[1]
        if stopped or size == len(tokens):
            assert shown == naive(text, stops)[0]
            return
        assert shown == certain(text, stops), "no more and no less is held back than may still change"


def streamed(complete: str, stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    """The text so far of a text that is fed byte by byte, and whether a stop string ended it."""
    content, text = complete.encode(), ""
    streaming = StreamingText(lambda ids: bytes(ids).decode(errors="replace"), stop)
    for size in range(1, len(content) + 1):
        chunk, stopped = streaming.update(list(content[:size]), size == len(content))
        text += chunk
        assert text == streaming.emitted
        if stopped:
            return text, True
    return text, False


def test_pieces_join_to_the_stripped_text() -> None:
    for text in ("  two  words\n\n", "naïve – ☃ 日本", "\n", "a\n b", "end \ufffd"):
        assert streamed(text) == (text.strip(), False)


def test_a_stop_string_is_never_shown_not_even_its_beginning() -> None:
    assert streamed("one\n\ntwo", ("\n\n",)) == ("one", True)
    assert streamed("one END\nEN two", ("ENDE", "EN t")) == ("one END", True)
    assert streamed("one EN", ("END",)) == ("one EN", False)
    assert streamed("ababac and more", ("abac",)) == ("ab", True)
    assert streamed("ein ☃ und", ("☃",)) == ("ein", True)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from transformers import AutoTokenizer

    loaded = {}
    writers: dict[str, Callable[[Path], object]] = {"bytes": write_tokenizer, "spaces": spaces}
    for name, write in writers.items():
        folder = tmp_path_factory.mktemp(name)
        write(folder)
        loaded[name] = AutoTokenizer.from_pretrained(folder)
    return loaded


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_pieces_join_to_what_a_tokenizer_decodes(tokenizers: dict[str, Any], data: st.DataObject) -> None:
    """Bytes that are no characters, special tokens that are left out, and a tokenizer that drops a first space."""
    tokenizer = tokenizers[data.draw(st.sampled_from(["bytes", "spaces"]))]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=MAX_PENDING_TOKENS))

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(part, skip_special_tokens=True))

    streaming = StreamingText(decode)
    pieces = [streaming.update(ids[: size + 1], size + 1 == len(ids))[0] for size in range(len(ids))]
    assert "".join(pieces) == decode(ids).strip()


def spaces(folder: Path) -> None:
    """Words with a mark for the space before them, which is dropped at the beginning of a text, as Llama's."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(("<end>", "<unk>", "▁", "▁a", "▁cat", "s", "▁▁", ".", "\n"))}
    raw = Tokenizer(models.WordLevel(words, "<unk>"))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>").save_pretrained(folder)


def test_the_work_is_linear_in_the_text() -> None:
    """Every token is decoded a few times, and every character looked at a few times, whatever the stop string is."""
    decoded = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return "a" * len(ids)

    class Counted(list[int]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            Counted.reads += 1
            return super().__getitem__(index)

    streaming, size = StreamingText(decode, ["a" * 200 + "b", "ab" * 100]), 3000
    for matcher in streaming._matchers:
        matcher._fallback = Counted(matcher._fallback)
    for count in range(1, size + 1):
        streaming.update(range(count), False)
    assert decoded <= 4 * size
    assert Counted.reads <= 2 * size


def test_broken_text_is_decoded_in_parts() -> None:
    decoded = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return bytes(ids).decode(errors="replace")

    streaming, size = StreamingText(decode), 3000
    for count in range(1, size + 1):
        streaming.update([0xFF] * count, count == size)
    assert decoded <= 3 * MAX_PENDING_TOKENS * size
    assert streaming.emitted == "\ufffd" * size


def test_a_stop_string_of_one_character_and_of_many_equal_ones() -> None:
    assert StopMatcher("a").feed("a")
    matcher = StopMatcher("aab")
    assert [matcher.feed(char) for char in "aaab"] == [False, False, False, True]


def test_a_space_after_a_token_that_is_left_out_is_kept(tokenizers: dict[str, Any]) -> None:
    ids, streaming = (
        [3, 0, 4],
        StreamingText(lambda part: str(tokenizers["spaces"].decode(part, skip_special_tokens=True))),
    )
    assert [streaming.update(ids[: size + 1], size == 2)[0] for size in range(3)] == ["a", "", " cat"]
