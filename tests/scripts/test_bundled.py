"""The bundled base and task are what the scripts that made them say."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import demo_text  # noqa: E402
import make_demo_task  # noqa: E402
import make_tiny_base  # noqa: E402

TASK_BYTES, BASE_BYTES = 600_000, 2_000_000


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(make_tiny_base.BASE, local_files_only=True)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_base_loads_in_bf16_and_is_small(tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_base.BASE, dtype="auto", local_files_only=True)
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    assert model.config.vocab_size == len(tokenizer)
    assert size(make_tiny_base.BASE) <= BASE_BYTES


@pytest.mark.parametrize(
    "text",
    ["Anna Hill has a fever.", "  two  spaces\tand\r\nlines\n\n", "naïve Größe 你好 🎉 \u200b", "x != y; don't , . !"],
)
def test_tokenizer_gives_any_text_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens(tokenizer: Any) -> None:
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer("a<|endoftext|>")["input_ids"][-1] == tokenizer.eos_token_id


def test_held_out_loss_is_the_stated_one() -> None:
    measured, stated = make_tiny_base.check_base(make_tiny_base.BASE)
    assert measured == pytest.approx(stated, abs=make_tiny_base.TOLERANCE)


def test_task_is_what_its_script_writes(tmp_path: Path) -> None:
    make_demo_task.write_task(tmp_path, seed=0)
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    shipped = {file.name: file.read_bytes() for file in make_demo_task.TASK.iterdir()}
    assert written == shipped
    assert len(shipped) == 2 * len(make_demo_task.CLIENTS) + 2 == 18
    assert size(make_demo_task.TASK) <= TASK_BYTES


@pytest.mark.parametrize("client", make_demo_task.CLIENTS, ids=lambda client: client.name)
def test_rows_of_a_client(client: make_demo_task.DemoClient, tokenizer: Any) -> None:
    files = [make_demo_task.TASK / f"{client.name}{part}.jsonl" for part in ("", ".test")]
    own, test = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert (len(own), len(test)) == (client.rows, make_demo_task.TEST_ROWS)
    rows = own + test
    assert all(tuple(row) == client.columns for row in rows)
    answers = [row[client.columns[-1]] for row in rows]
    if client.options:
        assert set(answers) == set(client.options)
        assert max(answers.count(option) for option in client.options) <= 0.45 * len(rows)
    assert max(len(tokenizer(answer)["input_ids"]) for answer in answers) <= 25
    prompts = ["\n".join(list(row.values())[:-1]) for row in rows]
    assert max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts) <= 60
    assert len(set(prompts)) == len(rows)


def test_no_row_occurs_in_the_pretraining_text() -> None:
    settings = make_tiny_base.Settings()
    count = settings.steps * settings.batch * settings.length // 30  # more than the pretraining reads
    text = "\n".join(demo_text.documents(settings.seed, "train", count))
    for phrase in (make_demo_task.ASK_URGENCY, make_demo_task.ASK_LINE, *make_demo_task.GREETINGS):
        assert phrase not in text
    lines = set(text.split("\n"))
    for client in make_demo_task.CLIENTS:
        for row in make_demo_task.client_rows(client, seed=0):
            prompt, answer = list(row.values())[-2:]
            assert prompt.strip().split("\n")[-1] not in lines
            assert client.options or answer not in lines


def test_short_pretraining_twice_gives_the_same_losses() -> None:
    settings = replace(make_tiny_base.Settings(), steps=3, batch=4, length=64, tokenizer_documents=500)
    first, second = (make_tiny_base.pretrain(settings) for _ in range(2))
    assert first[2] == second[2]
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True))
