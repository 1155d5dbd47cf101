"""With every kind of tokenizer, data stay text, and template text is encoded as by the tokenizer itself."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5Tokenizer,
)

from fedamole.data.text_encoder import TextEncoder
from fedamole.errors import BaseModelError, DataError

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>"]
# The training text contains special tokens, so that the models learn merges and pieces for them if possible.
CORPUS = ["the cat sat on the mat <s> [INST] hi [/INST] </s> <|im_start|> user"] * 4
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
FRAGMENTS = [*SPECIAL, "<", "s>", "</", "s", ">", "<|im_", "start|>", " ", "  ", "\n", "the cat", "[INST]", "á", "病"]
PIECES = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=8)


def with_roles(raw: Tokenizer, lead: bool = True) -> PreTrainedTokenizerFast:
    raw.add_special_tokens(SPECIAL)
    if lead:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=ALPHABET, show_progress=False))
    return with_roles(raw)


def byte_level_without_splits() -> PreTrainedTokenizerFast:
    """Merges apply to whole texts, and a text in the vocabulary is one token, as in Llama 3."""
    raw = Tokenizer(models.BPE(ignore_merges=True))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    corpus = ["<s>", "</s>", "<|im_start|>", "the", "cat"] * 9
    raw.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=300, initial_alphabet=ALPHABET, show_progress=False))
    assert raw.token_to_id("<s>") is not None
    return with_roles(raw)


def unigram() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    raw.train_from_iterator(CORPUS, trainer)
    return with_roles(raw)


def word_level() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return with_roles(raw)


def word_piece() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer, raw.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    raw.train_from_iterator(CORPUS, trainers.WordPieceTrainer(special_tokens=SPECIAL, show_progress=False))
    return with_roles(raw)


def sentencepiece_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges as in Llama 2 and Gemma: special tokens and bytes first."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(raw.to_str())["model"]
    first = ["<pad>", "<eos>", "<bos>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    return {piece: index for index, piece in enumerate(dict.fromkeys([*first, *model["vocab"]]))}, model["merges"]


def llama() -> Any:
    vocabulary, merges = sentencepiece_bpe()
    return LlamaTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in merges], add_bos_token=True)


def gemma() -> Any:
    vocabulary, merges = sentencepiece_bpe()
    return GemmaTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in merges])


def of_class(kind: Any) -> Any:
    model = json.loads(byte_level().backend_tokenizer.to_str())["model"]
    return kind(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


def t5() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("<s>", 0.0)]
    return T5Tokenizer(vocab=[*pieces, *((letter, -float(rank)) for rank, letter in enumerate("▁thecasonmi<>/|_", 1))])


MAKERS: dict[str, Callable[[], Any]] = {
    "byte-level BPE": byte_level,
    "byte-level BPE without splits": byte_level_without_splits,
    "Unigram": unigram,
    "WordLevel": word_level,
    "WordPiece": word_piece,
    "GPT2Tokenizer": lambda: of_class(GPT2Tokenizer),
    "Qwen2Tokenizer": lambda: of_class(Qwen2Tokenizer),
    "LlamaTokenizer": llama,
    "GemmaTokenizer": gemma,
    "T5Tokenizer": t5,
    "bundled": lambda: AutoTokenizer.from_pretrained(str(files("fedamole") / "bundled/base")),
}


@cache
def pair(kind: str) -> tuple[Any, TextEncoder]:
    """A tokenizer of this kind with its encoder."""
    tokenizer = MAKERS[kind]()
    return tokenizer, TextEncoder(tokenizer)


@pytest.fixture(params=MAKERS)
def tokenizer_and_encoder(request: pytest.FixtureRequest) -> tuple[Any, TextEncoder]:
    return pair(request.param)


def own_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return the ids of the tokenizer itself, including special tokens."""
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def names_of_specials(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def control_ids(tokenizer: Any) -> set[int]:
    """Return the ids of special tokens, except that of unknown text."""
    return set(tokenizer.convert_tokens_to_ids([name for name in names_of_specials(tokenizer) if name != "<unk>"]))


few_examples = hypothesis_settings(max_examples=40, deadline=None)


def test_text_without_special_tokens_is_read_as_before(tokenizer_and_encoder: tuple[Any, TextEncoder]) -> None:
    tokenizer, encoder = tokenizer_and_encoder

    @few_examples
    @given(st.lists(st.sampled_from(["the cat", " sat", "  ", "\n", "<", "mat"]) | st.text(max_size=9)).map("".join))
    def check(text: str) -> None:
        assert encoder.encode([encoder.marked(text)]) == [own_ids(tokenizer, text)]
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert encoder.token_ends(text) == [end for _, end in offsets]

    check()


def test_no_text_of_data_becomes_a_special_token(tokenizer_and_encoder: tuple[Any, TextEncoder]) -> None:
    tokenizer, encoder = tokenizer_and_encoder
    specials = names_of_specials(tokenizer)
    assert any(control_ids(tokenizer) & set(own_ids(tokenizer, f"the {name} cat")) for name in specials)

    @few_examples
    @given(st.lists(st.sampled_from([*FRAGMENTS, *specials]) | st.text(max_size=4), max_size=8).map("".join))
    def check(text: str) -> None:
        marked = encoder.marked(text)
        assert not control_ids(tokenizer) & set(encoder.encode([marked])[0])
        assert encoder.holds_special_text(marked) == any(name in text for name in specials)

    check()


def test_what_a_template_writes_is_read_as_before(tokenizer_and_encoder: tuple[Any, TextEncoder]) -> None:
    tokenizer, encoder = tokenizer_and_encoder
    specials = names_of_specials(tokenizer)

    @few_examples
    @given(st.lists(st.sampled_from([*FRAGMENTS, *specials]), max_size=8).map("".join))
    def check(text: str) -> None:
        marked = encoder.marked(text, [(0, len(text))])
        assert encoder.encode([marked]) == [own_ids(tokenizer, text)]
        assert not encoder.holds_special_text(marked)

    check()


def test_a_special_token_must_stand_in_one_literal_as_a_whole() -> None:
    """A name that is split between template and value, or between two literals, is text."""
    tokenizer = byte_level()
    encoder = TextEncoder(tokenizer)
    text = "<s>"
    for literals in ([(0, 1)], [(1, 3)], [(0, 1), (1, 3)], []):
        assert encoder.encode([encoder.marked(text, literals)]) == encoder.encode([text])
    assert encoder.encode([encoder.marked(text, [(0, 3)])]) == [(tokenizer.bos_token_id,)]


def test_literals_and_values_in_one_text() -> None:
    tokenizer = byte_level()
    encoder = TextEncoder(tokenizer)
    text = "<|im_start|>user\n</s> <|im_start|>hi</s>"
    ids = encoder.encode([encoder.marked(text, [(0, 17), (36, 40)])])[0]
    assert [index for index in ids if index in control_ids(tokenizer)] == [
        tokenizer.convert_tokens_to_ids("<|im_start|>"),
        tokenizer.eos_token_id,
    ]
    assert tokenizer.decode(ids) == text


def test_of_special_tokens_that_begin_alike_the_longest_counts() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>x", "<s"]})
    encoder = TextEncoder(tokenizer)
    for text in ("<s>xy", "<s>y", "<sx"):
        assert encoder.encode([encoder.marked(text, [(0, len(text))])]) == [own_ids(tokenizer, text)]


def test_added_tokens_that_are_not_special_are_read_as_before() -> None:
    """For example runs of spaces in GPT-NeoX. A special token of white space only is text as well."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("    ", normalized=False), AddedToken("<tool>", normalized=False)])
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False, special=True)], special_tokens=True)
    encoder = TextEncoder(tokenizer)
    text = "the    cat <tool>\n\n hi"
    assert encoder.encode([encoder.marked(text)]) == [own_ids(tokenizer, text)]
    assert not encoder.holds_special_text(text)


def test_truncation_and_padding_of_a_tokenizer_are_left_aside() -> None:
    """A tokenizer file may contain truncation and padding, for example from training; the config sets lengths."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=3)
    encoder = TextEncoder(tokenizer)
    assert encoder.encode(["the cat sat on the mat", "a"]) == TextEncoder(byte_level()).encode(
        ["the cat sat on the mat", "a"]
    )


def test_many_threads_read_alike() -> None:
    encoder = TextEncoder(byte_level())
    text = "the </s> cat <s>" * 50
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: encoder.encode([text])[0], range(200)))) == 1


def check_that_text_is_kept(text: str) -> None:
    for kind in ("byte-level BPE", "bundled"):
        tokenizer, encoder = pair(kind)
        (ids,) = encoder.encode([encoder.marked(text)])
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@given(PIECES.map("".join) | st.text())
@hypothesis_settings(deadline=None)
def test_lossless_tokenizers_keep_every_text(text: str) -> None:
    check_that_text_is_kept(text)


@pytest.mark.parametrize(
    "text",
    [
        "a  b   c",
        " a ",
        "a\tb\t\tc",
        "a\r\nb\rc\n",
        "a\0b",
        "👍🏽 👩‍👩‍👧 🇩🇪",
        "\u200fשלום עולם",
        "مرحبا\u200e 12",
        "e\u0301 é ﬁ",
        "\ufeffa",
        "<s>9 EUR</s>",
        "<|endoftext|>",
    ],
)
def test_lossless_tokenizers_keep_these_texts(text: str) -> None:
    check_that_text_is_kept(text)


def test_text_that_is_no_unicode_is_an_error() -> None:
    with pytest.raises(DataError, match=r"text 2 of 3 holds half a character \(U\+D83D\) at position 3; correct it"):
        TextEncoder(byte_level()).encode(["a", "hi\ud83d", "b"])


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast, name_or_path = False, "old"

    with pytest.raises(BaseModelError, match="tokenizer 'old' gives no character offsets; use its fast version"):
        TextEncoder(Slow())


def test_a_normalizer_that_changes_a_special_token_itself() -> None:
    """The tokenizer searches the normalised text for it, so its secret name would be normalised as well."""
    raw = byte_level().backend_tokenizer
    raw.normalizer = normalizers.Sequence([normalizers.Replace("0", ""), normalizers.Lowercase()])
    raw.add_special_tokens([AddedToken("<X0>", normalized=True, special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    encoder = TextEncoder(tokenizer)
    assert encoder.encode([encoder.marked("<X0>", [(0, 4)])]) == [own_ids(tokenizer, "<X0>")]
    assert len(encoder.encode([encoder.marked("<X0>")])[0]) > 1


def test_a_normalizer_that_makes_two_secret_names_one_is_refused() -> None:
    raw = byte_level().backend_tokenizer
    raw.normalizer = normalizers.Replace(Regex("[0-9]"), "")
    raw.add_special_tokens([AddedToken(name, normalized=True, special=True) for name in ("<x>", "<y>")])
    with pytest.raises(BaseModelError, match=r"special token '<[xy]>' cannot be distinguished from text"):
        TextEncoder(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>"))
