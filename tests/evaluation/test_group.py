"""Several clients evaluated at once: every number is that of plain full forwards under the client's own adapter."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from fedamole.data.examples import Example
from fedamole.data.tokens import tokenise
from fedamole.evaluation import likelihood
from fedamole.evaluation.generation import generate_answers
from fedamole.evaluation.likelihood import Tree, mean_losses, option_losses
from fedamole.evaluation.personal import EvaluationSettings, losses_of, scores_of
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.batch import Ids

from ..model.conftest import mixture
from .test_likelihood import ARCHITECTURES, draw, plain_loss

Rows = list[tuple[Ids, Sequence[Ids]]]
SIZES = (3, 0, 1, 5)
"""Rows of each client."""


@pytest.fixture(params=ARCHITECTURES)
def bank(base: Callable[..., Base], request: Any) -> Bank:
    """A bank in float64, so that sums of another order differ by less than 1e-9."""
    bank = Bank(base(request.param))
    bank.base.model.double()
    return bank


def adapters(bank: Bank) -> list[Any]:
    return [mixture(bank.base, seed) for seed in range(len(SIZES))]


def labels(count: int) -> list[Ids]:
    """Options like the names of classes: few first words, each with several continuations, some of which end early."""
    items: list[tuple[Ids, Ids]] = [((3 + i // 11, 40 + i % 3), (50 + i % 5,) * (i % 4 == 0)) for i in range(4 * count)]
    each: list[Ids] = [(*first, *second, *((9,) if i % 2 else ()), 0) for i, (first, second) in enumerate(items)]
    labelled = dict.fromkeys(each)
    assert len(labelled) >= count
    return list(labelled)[:count]


def clients(lengths: tuple[int, int], options: Sequence[Ids]) -> list[Rows]:
    """Prompts of these lengths; every other one has few options, so that trees of two sizes meet in a batch."""
    prompts = [draw(size, lengths, seed) for seed, size in enumerate(SIZES)]
    return [[(prompt, options[5:8] if i % 2 else options) for i, prompt in enumerate(part)] for part in prompts]


def expected(bank: Bank, rows: Rows) -> list[list[float]]:
    return [[plain_loss(bank, prompt, option) for option in options] for prompt, options in rows]


def assert_close(result: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> None:
    assert len(result) == len(reference)
    for mine, theirs in zip(result, reference, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-9)


@contextmanager
def watching(bank: Bank, monkeypatch: Any) -> Iterator[list[torch.Tensor]]:
    """The token ids of every forward pass, padding as -1."""
    seen: list[torch.Tensor] = []

    def forward(*args: Any, inner: Any = bank.base.model.forward, **kwargs: Any) -> Any:
        ids, mask = kwargs["input_ids"].clone(), kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            ids[mask == 0] = -1
        seen.append(ids)
        return inner(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(bank.base.model, "forward", forward)
        yield seen


@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
@pytest.mark.parametrize("lengths", [(1, 4), (3, 20)], ids=["short", "long"])
def test_77_options_that_begin_alike(bank: Bank, lengths: tuple[int, int], batch_tokens: int) -> None:
    """Uneven clients, one without rows; the long prompts go beyond Gemma 3's window of 8, the short ones do not."""
    group, options = clients(lengths, labels(77)), labels(77)
    assert len({option[:1] for option in options}) < 15
    own = adapters(bank)
    bank.load(own)
    losses = option_losses(bank, group, batch_tokens)
    assert [len(part) for part in losses] == list(SIZES)
    for client, adapter in enumerate(own):
        bank.load([adapter])
        assert_close(losses[client], expected(bank, group[client]))


def test_the_bare_base(bank: Bank) -> None:
    bank.load([])
    group = clients((1, 20), labels(12))
    for rows, result in zip(group, option_losses(bank, group, 300), strict=True):
        assert_close(result, expected(bank, rows))
    texts = generate_answers(bank, [[prompt for prompt, _ in rows] for rows in group], 3, 100)
    for rows, output in zip(group, texts, strict=True):
        assert output == [text for prompt, _ in rows for text in generate_answers(bank, [[prompt]], 3, 1)[0]]
    answers = [[(prompt, options[0]) for prompt, options in rows] for rows in group if rows]
    losses = [[plain_loss(bank, *row) * len(row[1]) for row in rows] for rows in answers]
    reference = [sum(part) / sum(len(a) for _, a in rows) for part, rows in zip(losses, answers, strict=True)]
    assert mean_losses(bank, answers, 60) == pytest.approx(reference, abs=1e-9)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_token_of_prompts_and_every_node_of_trees_once(
    base: Callable[..., Base], kind: str, monkeypatch: Any
) -> None:
    """Over two forward passes; a last token is never read, only predicted."""
    bank, options = Bank(base(kind)), labels(20)
    group = clients((1, 30), options)
    bank.load(adapters(bank))
    assert bank.continuation.caches  # found out before passes are counted
    with watching(bank, monkeypatch) as seen:
        option_losses(bank, group, 100_000)
    assert len(seen) == 2
    prompts = sorted(token for rows in group for prompt, _ in rows for token in prompt)
    assert sorted(seen[0][seen[0] >= 0].tolist()) == prompts
    inner = {option[:end] for option in options for end in range(1, len(option))}
    few = {option[:end] for option in options[5:8] for end in range(1, len(option))}
    nodes = [sorted(b[-1] for b in (inner if len(row[1]) == 20 else few)) for rows in group for row in rows]
    assert len(inner) < sum(len(option) - 1 for option in options), "some options begin alike"
    assert [sorted(ids[: len(reference)].tolist()) for ids, reference in zip(seen[1], nodes, strict=True)] == nodes
    assert seen[1].shape[1] == len(inner)


def test_trees_equal_whole_forward_passes(bank: Bank, monkeypatch: Any) -> None:
    """The two ways through, on the same rows; logits are normalised in several parts."""
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 700)
    rows = [row for part in clients((1, 3), labels(15)) for row in part]
    bank.load(adapters(bank))
    trees = [Tree(options) for _, options in rows]
    with torch.no_grad():
        mine, theirs = (
            score(bank, list(SIZES), [prompt for prompt, _ in rows], trees)
            for score in (likelihood._tree_losses, partial(likelihood._whole_losses, batch_tokens=60))
        )
    assert_close(mine, theirs)


def test_a_window_is_respected_to_the_token(base: Callable[..., Base], monkeypatch: Any) -> None:
    """Gemma 3's window is 8: a prompt of 5 and a tree of 3 inner tokens fit, a prompt of 6 does not; options that are
    one token long leave nothing inner, so that a prompt of 8 fits, one of 9 does not.
    """
    bank = Bank(base("gemma3_text"))
    bank.base.model.double()
    bank.load([mixture(bank.base)])
    assert bank.continuation.caches  # found out before passes are counted
    long, short = [(7, 8, 9, 0), (7, 3, 0)], [(4,), (0,)]
    assert Tree(long).num_inner == 4
    for size, options, with_tree in ((4, long, True), (5, long, False), (8, short, True), (9, short, False)):
        row = (tuple(range(20, 20 + size)), options)
        with watching(bank, monkeypatch) as seen:
            (losses,) = option_losses(bank, [[row]], 100)
        assert_close(losses, expected(bank, [row]))
        total = sum(size + len(option) for option in options)
        assert sum(ids.numel() for ids in seen) == (size + Tree(options).num_inner if with_tree else total)


def test_options_that_go_on_where_others_end() -> None:
    """5 | 5 6 | 5 6 7 | 8 6: nodes 1: 5, 2: 5 6 go on; leaves 5 6 7 and 8 6 after the inner 8."""
    tree = Tree([(5,), (5, 6), (5, 6, 7), (8, 6), (5, 6)])
    assert tree.num_inner == 3
    assert [tree.tokens[node] for node in (1, 2, 3)] == [5, 8, 6]
    assert tree.parents[1:4] == [0, 0, 1]
    assert tree.attends.tolist() == [[True, False, False], [False, True, False], [True, False, True]]
    assert tree.depths.tolist()[:4] == [0, 1, 1, 2]
    assert [[tree.tokens[node] for node in path] for path in tree.paths] == [list(option) for option in tree.options]
    assert tree.paths[1] == tree.paths[4]


@pytest.mark.parametrize("batch_tokens", [1, 70, 100_000])
def test_mean_losses_and_answers_of_a_group(bank: Bank, batch_tokens: int) -> None:
    """Clients of 1 to 5 rows; their adapters differ, and so do their answers to the same prompts."""
    prompts, answers = draw(5, (1, 20), 1), draw(5, (1, 9), 2)
    parts = [range(5), range(1, 2), range(5), range(3)]
    losses = [[(prompts[i], answers[i]) for i in part] for part in parts]
    requested = [[prompts[i] for i in part] for part in parts]
    own = adapters(bank)
    bank.load(own)
    means, texts = mean_losses(bank, losses, batch_tokens), generate_answers(bank, requested, 6, batch_tokens)
    assert texts[0] != texts[2]
    for client, adapter in enumerate(own):
        bank.load([adapter])
        total = sum(plain_loss(bank, *row) * len(row[1]) for row in losses[client])
        assert means[client] == pytest.approx(total / sum(len(answer) for _, answer in losses[client]), abs=1e-9)
        assert texts[client] == [generate_answers(bank, [[prompt]], 6, 1)[0][0] for prompt in requested[client]]


def test_scores_of_clients_that_choose_beside_clients_that_write(bank: Bank) -> None:
    """Also where a client's neighbours have other tasks, its scores are those it has alone."""
    kinds = ("cat", "dog", "cow")
    texts = [
        [Example("a ", "", f"text {i}\n", kinds[i % 3], kinds) for i in range(4)],
        [Example("a ", "", f"text {i}\n", f"answer {i % 2}") for i in range(3)],
        [Example("a ", "", f"other {i}\n", kinds[:2][i % 2], kinds[:2]) for i in range(5)],
        [Example("a ", "", f"other {i}\n", "a mat") for i in range(2)],
    ]
    rows = [tokenise(part, bank.base.tokenizer, 64).rows for part in texts]
    settings, own = EvaluationSettings(max_new_tokens=4, batch_tokens=200), adapters(bank)
    bank.load(own)
    scores, losses = scores_of(bank, rows, texts, settings), losses_of(bank, rows, settings)
    assert set(scores[0]) == {"accuracy", "score"}
    assert set(scores[1]) == {"rouge_l", "exact_match", "token_f1", "score"}
    for client, adapter in enumerate(own):
        bank.load([adapter])
        assert scores_of(bank, rows[client : client + 1], texts[client : client + 1], settings) == [scores[client]]
        assert losses_of(bank, rows[client : client + 1], settings)[0] == pytest.approx(losses[client], abs=1e-9)
