"""Greedy answers: where they end, and what must not change them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamole.data.layouts import conversation_prompt
from fedamole.data.tokens import prompt_ids
from fedamole.evaluation.generation import generate_answers
from fedamole.model.bank import Bank
from fedamole.model.base import Base, BaseSettings, load_base
from fedamole.model.continuation import Continuation
from fedamole.personal.chat import Chat
from fedamole.personal.generate import raw_prompt
from fedamole.personal.routing import greedy_answer

from ..model.architectures import write_tiny
from ..model.conftest import mixture, write_model, write_tokenizer
from ..model.test_peft import lora

PROMPTS = [(5, 6, 7, 8), (9, 10), tuple(range(20, 35))]


def greedy(bank: Bank, prompt: Sequence[int], steps: int) -> list[int]:
    """The most probable token of a full forward, again and again."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(bank.base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def text(bank: Bank, ids: Sequence[int]) -> str:
    return str(bank.base.tokenizer.decode(ids, skip_special_tokens=True)).strip()


@pytest.fixture(params=["llama", "gpt2", "gemma3_text"])
def bank(base: Callable[..., Base], request: pytest.FixtureRequest) -> Bank:
    bank = Bank(base(request.param))
    bank.load([mixture(bank.base)])
    return bank


def test_an_answer_ends_at_the_end_of_text_token_while_others_go_on(bank: Bank) -> None:
    """The end-of-text token is made one that the first prompt is answered with, later than at once."""
    free = [greedy(bank, prompt, 8) for prompt in PROMPTS]
    prompt, stop = next((model, token) for model, ids in enumerate(free) for token in ids if ids.index(token) > 0)
    bank.base.tokenizer.add_special_tokens({"eos_token": bank.base.tokenizer.convert_ids_to_tokens(stop)})
    assert bank.base.tokenizer.eos_token_id == stop
    cut = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert 0 < len(cut[prompt]) < 8
    assert generate_answers(bank, [PROMPTS], 8, 10_000)[0] == [text(bank, ids) for ids in cut]


def test_answers_keep_the_order_of_the_prompts(bank: Bank) -> None:
    answers = generate_answers(bank, [PROMPTS], 4, 10_000)[0]
    assert generate_answers(bank, [PROMPTS[::-1]], 4, 10_000)[0] == answers[::-1]
    assert generate_answers(bank, [PROMPTS], 4, 1)[0] == answers
    assert answers == [text(bank, greedy(bank, prompt, 4)) for prompt in PROMPTS]


def test_a_prompt_with_little_room_does_not_cut_others_short(bank: Bank) -> None:
    """128 positions: 122 tokens leave room for 6 new ones, 115 for all 10; 128 for one, which needs no position."""
    prompts = [tuple(2 + (7 * i + start) % 300 for i in range(size)) for start, size in ((0, 122), (1, 115), (2, 128))]
    expected = [text(bank, greedy(bank, prompt, room)) for prompt, room in zip(prompts, (6, 10, 1), strict=True)]
    assert generate_answers(bank, [prompts], 10, 100_000)[0] == expected


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 50.0},
        {"num_beams": 3},
        {"no_repeat_ngram_size": 1},
        {"do_sample": True, "top_k": 5},
        {"suppress_tokens": list(range(2, 200))},
        {"eos_token_id": list(range(2, 300))},
    ],
    ids=lambda own: next(iter(own)),
)
def test_generation_settings_that_come_with_a_base_are_not_used(tmp_path: Path, own: dict[str, Any]) -> None:
    """Chat models on the hub bring a repetition penalty or sampling in their generation_config.json."""
    from transformers import GenerationConfig

    write_tokenizer(tmp_path)
    write_model(tmp_path)
    GenerationConfig(**own).save_pretrained(tmp_path)
    bank = Bank(load_base(BaseSettings(str(tmp_path)), torch.device("cpu"), Path("/")))
    answers = [greedy(bank, prompt, 6) for prompt in PROMPTS]
    expected = [text(bank, ids[: ids.index(0)] if 0 in ids else ids) for ids in answers]
    assert generate_answers(bank, [PROMPTS], 6, 10_000)[0] == expected


RECURRENT: dict[str, tuple[dict[str, Any], dict[str, Any], Continuation | None]] = {
    "mamba": ({"targets": ("in_proj",)}, {}, Continuation(True, True)),
    "rwkv": ({}, {"rescale_every": 0}, Continuation(False, True)),
    "recurrent_gemma": ({}, {}, None),
    "qwen3_5_text": ({}, {}, Continuation(True, True)),
    "bart": ({"targets": ("self_attn.q_proj",)}, {}, Continuation(False, False)),
}
"""Bases that keep more of a text than keys and values, or what transformers cannot continue (the decoder of BART):
settings, changes of their config, how they generate."""


@pytest.mark.parametrize("architecture", sorted(RECURRENT))
def test_no_base_forgets_its_prompt(architecture: str, tmp_path: Path) -> None:
    """Prompts of several lengths, answered together, in a chat and by `explain`, as by forward passes over all."""
    settings, changes, way = RECURRENT[architecture]
    write_tiny(tmp_path, architecture, decoder_alone=True, **changes)
    bank = Bank(load_base(BaseSettings(str(tmp_path), **settings), torch.device("cpu"), Path("/")))
    bank.load([lora(bank.base)])
    expected = [greedy(bank, prompt, 6) for prompt in PROMPTS]
    stop = bank.base.tokenizer.eos_token_id
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in expected]
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)
    assert generate_answers(bank, [PROMPTS], 6, 10_000)[0] == [text(bank, ids) for ids in expected]
    if way is not None:
        assert bank.continuation == way
    assert greedy_answer(bank, PROMPTS[0], 6) == tuple(expected[0])
    chat, messages = Chat(bank, 4), list[str]()
    chat.answer("what now?", messages.append)
    prompt = prompt_ids(raw_prompt(conversation_prompt([("user", "what now?")])), bank.base.tokenizer)
    assert "".join(messages).strip() == text(bank, greedy(bank, prompt, 4))


def test_how_a_base_generates_is_found_out_without_its_adapters(bank: Bank) -> None:
    """And the adapters are at work again afterwards."""
    before = greedy(bank, PROMPTS[0], 8)
    assert bank.continuation == Continuation(True, True)
    assert greedy(bank, PROMPTS[0], 8) == before
    bank.load([])
    assert greedy(bank, PROMPTS[0], 8) != before


def test_prompts_of_one_length_are_still_generated_together(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    bank.__dict__["continuation"] = Continuation(False, True)
    generate, sizes = bank.base.model.generate, list[tuple[int, ...]]()

    def not_padding(**more: Any) -> Any:
        sizes.append(tuple(more["input_ids"].shape))
        return generate(**more)

    monkeypatch.setattr(bank.base.model, "generate", not_padding)
    generate_answers(bank, [[*PROMPTS, (40, 41), (50, 51)]], 2, 10_000)
    assert sorted(sizes) == [(1, 4), (1, 15), (3, 2)]
