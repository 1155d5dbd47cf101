"""Small files and real tokenizers, created by the tests; nothing is downloaded."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Sequence[dict[str, Any]]], str]:
    """Write rows as JSON Lines (gzip if the name ends in .gz); return the file's name, relative to tmp_path."""

    def writer(name: str, rows: Sequence[dict[str, Any]]) -> str:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        return name

    return writer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A tokenizer of whole words and punctuation marks, with or without BOS and EOS, never with padding."""

    def maker(bos: bool = True, eos: bool = True, trailing_eos: bool = False) -> PreTrainedTokenizerFast:
        raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.WhitespaceSplit()]
        )
        words = "a q c0 c1 c2 c3 c4 c5 c6 c7 c8 c9 end : yes no x y z answer"
        special = ["<unk>", "<s>", "</s>"]
        raw.train_from_iterator([words], trainers.WordLevelTrainer(special_tokens=special, vocab_size=60))
        if bos or trailing_eos:
            raw.post_processor = processors.TemplateProcessing(
                single=("<s> " if bos else "") + "$A" + (" </s>" if trailing_eos else ""),
                special_tokens=[("<s>", 1), ("</s>", 2)],
            )
        names = {"unk_token": "<unk>"} | ({"bos_token": "<s>"} if bos else {})
        return PreTrainedTokenizerFast(tokenizer_object=raw, **names, **({"eos_token": "</s>"} if eos else {}))

    return maker
