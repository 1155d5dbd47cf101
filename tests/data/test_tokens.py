import subprocess
import sys
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fedamole.data.examples import Example
from fedamole.data.text_encoder import text_encoder
from fedamole.data.tokens import tokenise
from fedamole.errors import BaseModelError

Make = Callable[..., PreTrainedTokenizerFast]
CONTEXT = "c0 c1 c2 c3 c4 c5 c6 c7 c8 c9"
LONG = Example("q ", CONTEXT, " end :", "x y")


def words(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))


def test_prompt_and_answer_stand_apart_and_only_the_answer_ends(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(trailing_eos=True)
    found = tokenise([Example("q :", "", "", "yes", ("yes", "no"))], tokenizer, 20)
    (row,) = found.rows
    assert words(tokenizer, row.prompt) == "<s> q :"
    assert words(tokenizer, row.answer) == "yes </s>"
    assert [words(tokenizer, option) for option in row.options] == ["yes </s>", "no </s>"]
    assert (found.cut, found.dropped, found.places) == (0, 0, (0,))


def test_without_bos_a_prompt_begins_with_its_text(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(bos=False)
    assert tokenizer.pad_token_id is None
    assert text_encoder(tokenizer).leading_specials == ()
    assert words(tokenizer, tokenise([LONG], tokenizer, 20).rows[0].prompt) == f"q {CONTEXT} end :"


def test_a_long_prompt_loses_the_end_of_its_context(make_tokenizer: Make) -> None:
    """12 tokens: 3 for "x y" and its end, 1 BOS, 3 around the context; 5 stay of the context's 10."""
    tokenizer = make_tokenizer()
    found = tokenise([LONG], tokenizer, 12)
    assert words(tokenizer, found.rows[0].prompt) == "<s> q c0 c1 c2 c3 c4 end :"
    assert words(tokenizer, found.rows[0].answer) == "x y </s>"
    assert found.cut == 1


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
    """ "x y z" and its end are 4 tokens; with BOS they fit in 5, without BOS one token of the prompt must fit."""
    for bos in (True, False):
        tokenizer = make_tokenizer(bos=bos)
        examples = [Example("q", "", "", "x y z"), Example("q", "", "", "x")]
        found = tokenise(examples, tokenizer, 4)
        assert (len(found.rows), found.dropped, found.places) == (1, 1, (1,))
        assert tokenise(examples, tokenizer, 5).dropped == 0


def test_no_examples_no_rows(make_tokenizer: Make) -> None:
    assert tokenise([], make_tokenizer(), 4).rows == ()


def test_a_tokenizer_without_an_end_is_refused(make_tokenizer: Make) -> None:
    with pytest.raises(BaseModelError, match="no end-of-sequence token"):
        tokenise([LONG], make_tokenizer(eos=False), 20)


@pytest.mark.parametrize("limit", range(8, 40, 3))
def test_bytes_that_merge_over_the_seam_still_fit(limit: int) -> None:
    """A byte-level BPE, where a cut inside a word or a character makes other tokens than the ones counted."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["</s>"], vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(["the cat sat on the mat, the rat ate the hat"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    example = Example("the ", "cat sät on 病院 the mat 🙂 the rat", "te hat\n", "cat")
    found = tokenise([example], tokenizer, limit)
    (row,) = found.rows
    assert len(row.prompt) + len(row.answer) <= limit
    text = tokenizer.decode(list(row.prompt))
    if found.cut and limit > 20:
        assert text.startswith("the cat")
        assert text.endswith("te hat\n")


def test_examples_and_tokens_import_no_data_library() -> None:
    """They serve benchmarks on machines without these, which also take seconds to import."""
    code = (
        "import sys, fedamole.data.tokens, fedamole.data.examples, fedamole.data.settings;"
        "assert not {'datasets', 'flwr_datasets', 'transformers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
