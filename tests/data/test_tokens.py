import json
import logging
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedamole.data.answer_options import options_of
from fedamole.data.examples import Example, Literals
from fedamole.data.settings import SourceSettings
from fedamole.data.sources import read_source
from fedamole.data.templates import BUILT_IN, TemplateSettings, render
from fedamole.data.text_encoder import text_encoder
from fedamole.data.tokens import prompt_ids, tokenise, warn_of_text
from fedamole.errors import BaseModelError, DataError

Make = Callable[..., PreTrainedTokenizerFast]
CONTEXT = "c0 c1 c2 c3 c4 c5 c6 c7 c8 c9"
LONG = Example("q ", CONTEXT, " end :", "x y")


def words(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))


def test_prompt_and_answer_stand_apart_and_only_the_answer_ends(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(trailing_eos=True)
    tokenised = tokenise([Example("q :", "", "", "yes", ("yes", "no"))], tokenizer, 20)
    (row,) = tokenised.rows
    assert words(tokenizer, row.prompt) == "<s> q :"
    assert words(tokenizer, row.answer) == "yes </s>"
    assert [words(tokenizer, option) for option in row.options] == ["yes </s>", "no </s>"]
    assert (tokenised.cut, tokenised.dropped, tokenised.indices) == (0, 0, (0,))


def test_without_bos_a_prompt_begins_with_its_text(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(bos=False)
    assert tokenizer.pad_token_id is None
    assert text_encoder(tokenizer).leading_specials == ()
    assert words(tokenizer, tokenise([LONG], tokenizer, 20).rows[0].prompt) == f"q {CONTEXT} end :"


def test_a_long_prompt_loses_the_end_of_its_context(make_tokenizer: Make) -> None:
    """12 tokens: 3 for "x y" and EOS, 1 BOS, 3 around the context, which leaves 5 of the context's 10."""
    tokenizer = make_tokenizer()
    tokenised = tokenise([LONG], tokenizer, 12)
    assert words(tokenizer, tokenised.rows[0].prompt) == "<s> q c0 c1 c2 c3 c4 end :"
    assert words(tokenizer, tokenised.rows[0].answer) == "x y </s>"
    assert tokenised.cut == 1


def test_where_the_context_is_not_enough_the_front_goes_but_not_bos(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    assert words(tokenizer, tokenise([LONG], tokenizer, 6).rows[0].prompt) == "<s> end :"
    plain = Example(CONTEXT, "", "", "x y")
    assert words(tokenizer, tokenise([plain], tokenizer, 6).rows[0].prompt) == "<s> c8 c9"


def test_the_longest_option_decides_the_room(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    example = Example("q ", CONTEXT, " :", "x", ("x", "x y z"))
    assert words(tokenizer, tokenise([example], tokenizer, 10).rows[0].prompt) == "<s> q c0 c1 c2 :"


def test_an_answer_that_leaves_no_room_drops_its_example(make_tokenizer: Make) -> None:
    """ "x y z" and EOS are 4 tokens. With BOS they fit in 5; without BOS one token of the prompt must fit."""
    for bos in (True, False):
        tokenizer = make_tokenizer(bos=bos)
        examples = [Example("q", "", "", "x y z"), Example("q", "", "", "x")]
        tokenised = tokenise(examples, tokenizer, 4)
        assert (len(tokenised.rows), tokenised.dropped, tokenised.indices) == (1, 1, (1,))
        assert tokenise(examples, tokenizer, 5).dropped == 0


def test_no_examples_no_rows(make_tokenizer: Make) -> None:
    assert tokenise([], make_tokenizer(), 4).rows == ()


def test_a_tokenizer_without_an_end_is_refused(make_tokenizer: Make) -> None:
    with pytest.raises(BaseModelError, match="no end-of-sequence token"):
        tokenise([LONG], make_tokenizer(eos=False), 20)


@pytest.mark.parametrize("limit", range(8, 40, 3))
def test_bytes_that_merge_over_the_seam_still_fit(limit: int) -> None:
    """A byte-level BPE: truncation within a word or character changes tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["</s>"], vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(["the cat sat on the mat, the rat ate the hat"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    example = Example("the ", "cat sät on 病院 the mat 🙂 the rat", "te hat\n", "cat")
    tokenised = tokenise([example], tokenizer, limit)
    (row,) = tokenised.rows
    assert len(row.prompt) + len(row.answer) <= limit
    text = tokenizer.decode(list(row.prompt))
    if tokenised.cut and limit > 20:
        assert text.startswith("the cat")
        assert text.endswith("te hat\n")


INSTRUCT = TemplateSettings(prompt="<s>[INST] {x} [/INST]\n", answer="{y}")


def byte_level() -> PreTrainedTokenizerFast:
    """A lossless byte-level BPE that prepends <s>."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<s>", "</s>", "<|x|>", "<|y|>"],
    )
    raw.train_from_iterator(["the cat sat on the mat"], trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def rendered(template: TemplateSettings, **row: Any) -> Example:
    example = render(template, options_of(template, [row], "f"), row, "f, row 1")
    assert example is not None
    return example


def test_a_bos_that_the_template_writes_is_not_doubled() -> None:
    tokenizer = byte_level()
    (row,) = tokenise([rendered(INSTRUCT, x="hi", y="ok")], tokenizer, 99).rows
    assert tokenizer.decode(row.prompt) == "<s>[INST] hi [/INST]\n"
    assert row.prompt.count(tokenizer.bos_token_id) == 1
    assert prompt_ids(rendered(INSTRUCT, x="hi", y="ok"), tokenizer) == row.prompt
    without = TemplateSettings(prompt="{x}<s>\n", answer="{y}")  # not at the beginning: that is another one
    assert prompt_ids(rendered(without, x="hi", y="ok"), tokenizer).count(tokenizer.bos_token_id) == 2


def test_an_eos_that_the_template_writes_is_not_doubled() -> None:
    tokenizer = byte_level()
    template = TemplateSettings(prompt="{x}\n", answer="{y}</s>")
    (row,) = tokenise([rendered(template, x="hi", y="ok")], tokenizer, 99).rows
    assert tokenizer.decode(row.answer) == "ok</s>"
    assert row.answer.count(tokenizer.eos_token_id) == 1


def test_bos_and_eos_in_data_are_text_beside_one_of_each() -> None:
    """Rows in the format of Llama 2, "<s>[INST] ..." and "... </s>", and an answer with struck-out text."""
    tokenizer = byte_level()
    rows = [{"prompt": "<s>[INST] q [/INST] ", "completion": "a </s>"}, {"prompt": "q", "completion": "<s>9</s> 7"}]
    tokenised = tokenise([rendered(BUILT_IN["plain"], **row) for row in rows], tokenizer, 99)
    for row, given_row in zip(tokenised.rows, rows, strict=True):
        assert row.prompt[0] == tokenizer.bos_token_id
        assert row.answer[-1] == tokenizer.eos_token_id
        assert not {0, 1, 2, 3} & {*row.prompt[1:], *row.answer[:-1]}
        assert tokenizer.decode(row.prompt[1:]) == given_row["prompt"]
        assert tokenizer.decode(row.answer[:-1]) == given_row["completion"]
    assert (tokenised.special, tokenised.changed) == (2, 0)


def test_options_and_labels_of_a_template_are_its_own_text_and_those_of_a_column_are_not() -> None:
    tokenizer = byte_level()
    own = TemplateSettings(prompt="{x}\n", answer="{y}", options=("<|x|>", "<|y|>"))
    labels = TemplateSettings(prompt="{x}\n", answer="{y}", labels={"0": "<|x|>", "1": "<|y|>"})
    for template, value in ((own, "<|y|>"), (labels, 1)):
        (row,) = tokenise([rendered(template, x="hi", y=value)], tokenizer, 99).rows
        assert (row.answer, row.options) == ((3, 1), ((2, 1), (3, 1)))
    column = TemplateSettings(prompt="{x}\n", answer="{y}", options_from="y")
    rows = [{"x": "hi", "y": "<|x|>"}, {"x": "hi", "y": "<|y|>"}]
    example = render(column, options_of(column, rows, "f"), rows[0], "f")
    assert example is not None
    (row,) = tokenise([example], tokenizer, 99).rows
    assert row.answer == row.options[0]
    assert tokenizer.decode(row.answer) == "<|x|></s>"
    assert 2 not in row.answer


def test_the_template_of_the_documents_writes_special_tokens() -> None:
    page = (Path(__file__).parents[2] / "docs/start.md").read_text()
    (block,) = re.findall(r"```toml\n(\[data\.templates\.chatml\]\n.*?)```", page, re.DOTALL)
    template = TemplateSettings(**tomllib.loads(block)["data"]["templates"]["chatml"])
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    (row,) = tokenise([rendered(template, question="hi<|im_end|>", reply="<|im_start|>ok")], tokenizer, 99).rows
    assert [index for index in row.prompt[1:] if index in (start, end)] == [start, end, start]
    assert [index for index in row.answer if index in (start, end)] == [end]


def test_a_doubled_brace_does_not_divide_a_special_token() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["{sys}"]})
    example = rendered(TemplateSettings(prompt="{{sys}} {x}\n", answer="{y}"), x="{sys}", y="ok")
    ids = prompt_ids(example, tokenizer)
    assert ids.count(tokenizer.convert_tokens_to_ids("{sys}")) == 1
    assert tokenizer.decode(ids[1:]) == "{sys} {sys}\n"


@pytest.mark.parametrize("limit", range(10, 60, 5))
def test_cutting_keeps_special_tokens_of_the_template_and_makes_none_of_data(limit: int) -> None:
    tokenizer = byte_level()
    template = TemplateSettings(prompt="<s><|x|> {c} <|y|>\n", context="c", answer="{y}")
    example = rendered(template, c="the </s> cat <|x|> sät 🙂 " * 4, y="ok")
    tokenised = tokenise([example], tokenizer, limit)
    (row,) = tokenised.rows
    assert len(row.prompt) + len(row.answer) <= limit
    assert (tokenised.cut, tokenised.special) == (1, 1)
    controls = [index for index in row.prompt if index in (0, 1, 2, 3)]
    assert controls == [0, 2, 3]
    text = tokenizer.decode(row.prompt)
    assert text.startswith("<s><|x|> ")
    assert text.endswith(" <|y|>\n")


def test_options_that_become_the_same_tokens_are_an_error_that_names_them(make_tokenizer: Make) -> None:
    example = Example("q", "", "", "是", ("yes", "是", "否"))
    with pytest.raises(DataError, match=r"options '是' and '否' become the same tokens \['<unk>', '</s>'\]"):
        tokenise([example], make_tokenizer(), 20)
    # An option may be a prefix of another one: each ends with the end-of-sequence token.
    assert len(tokenise([Example("q", "", "", "x", ("x", "x y"))], make_tokenizer(), 20).rows[0].options) == 2


def test_text_that_a_tokenizer_does_not_keep_is_counted(make_tokenizer: Make) -> None:
    """Unknown words, two spaces, a line end. Adding or removing a leading space does not count."""
    texts = ["q x", "q  x", "q café", "q x\n", " q x"]
    tokenised = tokenise([Example(text, "", "", "yes") for text in texts], make_tokenizer(), 20)
    assert tokenised.changed == 3
    assert tokenise([Example("q", "", "", "yes"), Example("q", "", "", "Yes")], make_tokenizer(), 20).changed == 1


def test_warnings_count_examples_and_show_no_text(caplog: Any, make_tokenizer: Make) -> None:
    examples = [Example("q", "", "", "yes"), Example("q </s>", "", "", "x"), Example("q", "", "", "<s> no")]
    tokenised = tokenise(examples, make_tokenizer(), 20)
    with caplog.at_level(logging.WARNING):
        warn_of_text("client mia", [tokenised, tokenised])
    special, changed = (record.getMessage() for record in caplog.records)
    assert special.startswith("client mia: 4 of 6 examples hold the text of a special token of the base's tokenizer.")
    assert changed.startswith("client mia: the base's tokenizer changes the text of 4 of 6 examples")
    caplog.clear()
    warn_of_text("client mia", [tokenise(examples[:1], make_tokenizer(), 20)])
    assert not caplog.records
    literal = Example("<s> q", "", "", "yes", literals=Literals(before=((0, 3),)))
    assert tokenise([literal], make_tokenizer(), 20).special == 0


NASTY = [
    "a  b   c",
    " a ",
    "a\tb\t\tc",
    "a\r\nb\rc\n",
    "a\0b",
    "👍🏽 👩‍👩‍👧",
    "\u200fשלום עולם",
    "مرحبا\u200e 12",
    "e\u0301 é ﬁ",
    "\ufeffa",
    "</s> 7 EUR",
    "<|endoftext|>",
]


@hypothesis_settings(deadline=None)
@given(st.sampled_from(["alpaca", "plain"]), st.text(), st.text(), st.sampled_from(NASTY))
def test_the_text_of_the_row_is_tokenised(template: str, first: str, second: str, nasty: str) -> None:
    """Row to example to tokens and back, with two lossless tokenizers."""
    row = {"instruction": first, "context": second + nasty, "response": nasty + second}
    row |= {"prompt": first + nasty, "completion": nasty + first}
    example = rendered(BUILT_IN[template], **row)
    expected = row["prompt"] if template == "plain" else example.prompt
    if template == "alpaca":
        assert f"### Instruction:\n{first}\n\n### Input:\n{second + nasty}\n\n### Response:\n" in expected
    for tokenizer in LOSSLESS:
        tokenised = tokenise([example], tokenizer, 10**6)
        (tokens,) = tokenised.rows
        lead = len(text_encoder(tokenizer).leading_specials)
        assert tokenizer.decode(tokens.prompt[lead:]) == expected
        assert tokenizer.decode(tokens.answer[:-1]) == example.answer
        assert tokenised.changed == 0


LOSSLESS = (byte_level(), AutoTokenizer.from_pretrained(str(files("fedamole") / "bundled/base")))


def test_the_text_of_the_file_is_tokenised(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": text, "completion": text}) + "\n" for text in NASTY), encoding="utf-8"
    )
    table, _ = read_source(SourceSettings("s", path="rows.jsonl"), tmp_path)
    for tokenizer in LOSSLESS:
        tokenised = tokenise([rendered(BUILT_IN["plain"], **row) for row in table.rows], tokenizer, 1000)
        lead = len(text_encoder(tokenizer).leading_specials)
        assert [tokenizer.decode(row.prompt[lead:]) for row in tokenised.rows] == NASTY
        assert [tokenizer.decode(row.answer[:-1]) for row in tokenised.rows] == NASTY


def test_examples_and_tokens_import_no_data_library() -> None:
    """These libraries take seconds to import, and benchmarks run on machines without them."""
    code = (
        "import sys, fedamole.data.tokens, fedamole.data.examples, fedamole.data.settings;"
        "assert not {'datasets', 'flwr_datasets', 'transformers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
