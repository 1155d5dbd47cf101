"""Option likelihoods with the prompt's cache against plain full forwards; generation in batches against one by one."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fedamole.evaluation.generation import generate_answers
from fedamole.evaluation.likelihood import by_length, mean_losses, option_losses
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.batch import TokenPair

from ..model.conftest import mixture

ARCHITECTURES = ["llama", "gpt2", "gemma3_text"]


def draw(count: int, lengths: tuple[int, int], seed: int) -> list[tuple[int, ...]]:
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(*lengths, (count,), generator=g).tolist()
    return [tuple(torch.randint(2, 300, (size,), generator=g).tolist()) for size in sizes]


def plain_loss(bank: Bank, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Mean loss of an answer by one full forward without padding, cache or mask."""
    with torch.no_grad():
        logits = bank.base.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
    logs = torch.log_softmax(logits.double(), dim=-1)
    start = len(prompt) - 1
    return -sum(logs[start + j, token].item() for j, token in enumerate(answer)) / len(answer)


@pytest.fixture(params=ARCHITECTURES)
def bank(base: Callable[..., Base], request: pytest.FixtureRequest) -> Bank:
    bank = Bank(base(request.param))
    bank.load([mixture(bank.base)])
    return bank


@pytest.mark.parametrize("batch_tokens", [1, 60, 100_000])
def test_77_options_equal_full_forwards(bank: Bank, batch_tokens: int) -> None:
    prompts = draw(3, (1, 25), 0)
    options = [(*option, 0) for option in draw(77, (0, 6), 1)]
    several = [options, options[:1], options[3:9]]
    (result,) = option_losses(bank, [list(zip(prompts, several, strict=True))], batch_tokens)
    for prompt, choices, losses in zip(prompts, several, result, strict=True):
        expected = [plain_loss(bank, prompt, option) for option in choices]
        assert losses == pytest.approx(expected, abs=1e-5)


def test_no_token_is_computed_twice(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's 20 tokens, and each beginning of the 30 options of 4 tokens once, not 30 * 24 tokens. Gemma 3's
    window of 8 is shorter than the prompt: there whole forward passes are made.
    """
    assert bank.continuation.caches  # found out before passes are counted
    seen: list[int] = []
    inner = bank.base.model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].numel())
        return inner(*args, **kwargs)

    monkeypatch.setattr(bank.base.model, "forward", counting)
    options = [(*option, 0) for option in draw(30, (3, 4), 2)]
    option_losses(bank, [[(prompt, options) for prompt in draw(1, (20, 21), 3)]], 200)
    beginnings = {option[:length] for option in options for length in (1, 2, 3)}
    assert len(beginnings) < 90, "some options begin alike"
    windowed = bank.base.model.config.model_type == "gemma3_text"
    assert sum(seen) == (30 * 24 if windowed else 20 + len(beginnings))
    assert max(seen) <= 200


def test_several_clients_at_once_equal_each_alone(bank: Bank, base: Callable[..., Base]) -> None:
    """Uneven rows, one client without any; every client has its own adapter."""
    adapters = [mixture(bank.base, seed) for seed in range(3)]
    several = [(*option, 0) for option in draw(9, (0, 5), 5)]
    clients = [[(prompt, several[: 3 + index]) for index, prompt in enumerate(draw(n, (1, 7), n))] for n in (4, 0, 3)]
    only: list[TokenPair] = [((5,), (6, 0))]
    answers: list[list[TokenPair]] = [[(prompt, (7, 9, 0)) for prompt, _ in rows] or only for rows in clients]
    bank.load(adapters)
    result, means = option_losses(bank, clients, 60), mean_losses(bank, answers, 30)
    texts = generate_answers(bank, [[prompt for prompt, _ in rows] for rows in clients], 5, 60)
    assert (result[1], texts[1]) == ([], [])
    for client, adapter in enumerate(adapters):
        bank.load([adapter])
        (alone,) = option_losses(bank, [clients[client]], 10_000)
        for mine, theirs in zip(result[client], alone, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
        assert means[client] == pytest.approx(mean_losses(bank, [answers[client]], 10_000)[0], abs=1e-5)
        assert texts[client] == generate_answers(bank, [[prompt for prompt, _ in clients[client]]], 5, 10_000)[0]


def test_the_bare_base_answers_for_several_clients(bank: Bank) -> None:
    bank.load([])
    rows = [[(prompt, ((3, 0), (4, 5, 0))) for prompt in draw(n, (2, 6), n)] for n in (2, 3)]
    for part, losses in zip(rows, option_losses(bank, rows, 100), strict=True):
        for (prompt, options), result in zip(part, losses, strict=True):
            assert result == pytest.approx([plain_loss(bank, prompt, option) for option in options], abs=1e-5)


def test_mean_loss_equals_full_forwards(bank: Bank) -> None:
    prompts, answers = draw(7, (1, 20), 4), draw(7, (1, 8), 5)
    rows = list(zip(prompts, answers, strict=True))
    total = sum(plain_loss(bank, *row) * len(row[1]) for row in rows)
    for batch_tokens in (1, 64, 10_000):
        expected = total / sum(map(len, answers))
        assert mean_losses(bank, [rows], batch_tokens)[0] == pytest.approx(expected, abs=1e-5)


def test_groups_of_similar_length_stay_within_the_budget() -> None:
    """Sorted 2 3 4 5 9 with 10 tokens: two of 3 is 6, three of 4 is 12 > 10; two of 5 is 10; then 9 alone."""
    assert list(by_length([9, 4, 2, 5, 3], 10)) == [[2, 4], [1, 3], [0]]
    assert list(by_length([50], 10)) == [[0]]
    assert list(by_length([], 10)) == []


def test_generation_in_batches_equals_one_by_one(bank: Bank) -> None:
    prompts = draw(6, (1, 20), 6)
    together = generate_answers(bank, [prompts], 6, 10_000)[0]
    alone = [generate_answers(bank, [[prompt]], 6, 10_000)[0][0] for prompt in prompts]
    assert together == alone
    assert len(set(together)) > 1


def test_generation_is_greedy_and_stops(bank: Bank) -> None:
    """Each token is the most probable one of a full forward; the text ends before the end-of-text token."""
    prompt = draw(1, (8, 9), 7)[0]
    ids, expected = list(prompt), list[int]()
    for _ in range(12):
        with torch.no_grad():
            token = int(bank.base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == 0:
            break
        ids, expected = [*ids, token], [*expected, token]
    text = bank.base.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert generate_answers(bank, [[prompt]], 12, 1000)[0] == [text]


def test_generation_ends_where_the_base_has_no_positions_left(bank: Bank) -> None:
    prompt = draw(1, (126, 127), 8)[0]
    assert len(bank.base.tokenizer(generate_answers(bank, [[prompt]], 50, 1000)[0][0])["input_ids"]) <= 8
