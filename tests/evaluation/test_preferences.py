"""The loss of DPO and the preference score by hand, and log-probabilities of pairs against plain forward passes."""

import math
from collections.abc import Callable

import pytest
import torch

from fedamole.evaluation.preferences import (
    AnswerPair,
    dpo_losses,
    margins_of,
    pair_log_probabilities,
    preference_scores,
    sequence_log_probabilities,
)
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.batch import collate
from fedamole.model.params import Adapter, new_shared
from fedamole.model.prompt import PromptSpec, new_prompt


@pytest.fixture
def llama(base: Callable[..., Base]) -> Base:
    return base("llama")


PAIRS: list[list[AnswerPair]] = [
    [((3, 4, 5), ((6, 7, 1), (8, 1))), ((9,), ((2, 1), (3, 4, 5, 6, 1)))],
    [((5, 5), ((7, 1), (7, 8, 1)))],
]


def lora(base: Base, scale: float) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    named = new_shared(base.shapes, 2, generator)
    return Adapter(AdapterSpec(2, 4.0, 0.0), {name: t if t.any() else t + scale for name, t in named.items()})


def test_the_loss_by_hand() -> None:
    """beta 0.1, log ratios 2 and -1: -log sigmoid(0.1 * 3) = 0.5544. No difference is ln 2; beta 1 and 1: 0.3133."""
    log_probabilities, reference = torch.tensor([[5.0, -3.0]]), torch.tensor([[3.0, -2.0]])
    margins = margins_of(log_probabilities, reference)
    assert margins.tolist() == [3.0]
    assert float(dpo_losses(margins, 0.1)) == pytest.approx(0.5544, abs=5e-5)
    assert float(dpo_losses(torch.zeros(1), 0.7)) == pytest.approx(math.log(2))
    assert float(dpo_losses(torch.ones(1), 1.0)) == pytest.approx(0.3133, abs=5e-5)


def test_the_scores_by_hand() -> None:
    """Margins 1, -1, 0, 2 are 62.5 % with half of the tie; by log-probability alone the first answer wins once."""
    log_probabilities = torch.tensor([[-2.0, -1.0], [-3.0, -1.0], [-2.0, -1.0], [-1.0, -2.0]])
    reference = torch.tensor([[-3.0, -1.0], [-2.0, -1.0], [-2.0, -1.0], [-3.0, -2.0]])
    scores = preference_scores(log_probabilities, reference)
    assert scores == {"preference": 62.5, "ranking_accuracy": 25.0}


@pytest.mark.parametrize("packs", [True, False])
def test_log_probabilities_are_sums_over_the_answer_tokens(llama: Base, packs: bool) -> None:
    """Against one forward pass of the untuned base per sequence; a bank without adapters is that base."""
    bank = Bank(llama)
    expected = []
    for pairs in PAIRS:
        for prompt, answers in pairs:
            for answer in answers:
                logits = llama.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double()
                steps = logits.log_softmax(1)[len(prompt) - 1 : -1]
                expected.append(float(sum(row[token] for row, token in zip(steps, answer, strict=True))))
    assert bank.packs
    bank.packs = packs
    for tokens in (5, 1000):
        values = pair_log_probabilities(bank, PAIRS, tokens)
        assert [tuple(part.shape) for part in values] == [(2, 2), (1, 2)]
        torch.testing.assert_close(
            torch.cat(values).flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4
        )


def test_the_reference_is_the_untuned_base_whatever_is_loaded(llama: Base) -> None:
    bank = Bank(llama)
    untuned = torch.cat(pair_log_probabilities(bank, PAIRS, 100))
    bank.load([lora(llama, 0.1), lora(llama, 0.3)])
    own = torch.cat(pair_log_probabilities(bank, PAIRS, 100))
    assert (own - untuned).abs().min() > 1e-4
    torch.testing.assert_close(torch.cat(pair_log_probabilities(bank, PAIRS, 100, reference=True)), untuned)
    torch.testing.assert_close(torch.cat(pair_log_probabilities(bank, PAIRS, 100)), own)
    spec = PromptSpec(3)
    bank.load([Adapter(spec, new_prompt(spec, llama.width, 1.0, torch.Generator().manual_seed(0)))] * 2)
    assert (torch.cat(pair_log_probabilities(bank, PAIRS, 100)) - untuned).abs().min() > 1e-4
    torch.testing.assert_close(torch.cat(pair_log_probabilities(bank, PAIRS, 100, reference=True)), untuned)


def test_the_loss_is_that_of_trl(llama: Base) -> None:
    """`DPOTrainer.dpo_loss` of TRL; skipped where TRL is not installed, or has no such method."""
    trl = pytest.importorskip("trl")
    if not hasattr(trl.DPOTrainer, "dpo_loss"):
        pytest.skip("this version of TRL computes the loss inside its trainer")
    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)
    for key, value in {"beta": 0.3, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl"}.items():
        setattr(trainer, key, value)
    trainer.reference_free, trainer.loss_type = False, ["sigmoid"]
    trainer.accelerator = type("Accelerator", (), {"device": torch.device("cpu")})()
    bank = Bank(llama)
    bank.load([lora(llama, 0.1), lora(llama, 0.3)])
    own = torch.cat(pair_log_probabilities(bank, PAIRS, 100))
    reference = torch.cat(pair_log_probabilities(bank, PAIRS, 100, reference=True))
    losses, *_ = trainer.dpo_loss(own[:, 0], own[:, 1], reference[:, 0], reference[:, 1], "sigmoid", {})
    torch.testing.assert_close(losses, dpo_losses(margins_of(own, reference), 0.3))


def test_rows_of_a_batch_have_their_own_log_probability(llama: Base) -> None:
    """The gradient of one row's log-probability reaches the logits of its own answer tokens alone."""
    batch = collate([[((3, 4), (5, 1)), ((3, 4), (6, 7, 1))]], llama.pad_id, False)
    logits = torch.randn(5, 20, requires_grad=True)
    sequence_log_probabilities(logits, batch)[1].backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum(1).gt(0).tolist() == [False, False, True, True, True]
