"""Training on preference pairs by direct preference optimisation (DPO), in the steps of `TrainingGroup`.

Source: Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, https://arxiv.org/abs/2305.18290. The reference
model is the untuned base, which is in memory anyway: it reads the batch without adapters and without dropout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.evaluation.preferences import dpo_losses, margins_of, sequence_log_probabilities
from fedamole.federation.local import DivergedError, LocalTask, TrainingGroup
from fedamole.federation.method import TrainingResult
from fedamole.federation.settings import TrainingSettings
from fedamole.model.adapter_store import AdapterStore
from fedamole.model.bank import Bank
from fedamole.model.batch import Batch, TokenPair, collate


@dataclass(frozen=True)
class PairBatch(Batch):
    """A batch whose rows are pairs: each chosen answer is followed by the rejected one, with the same prompt."""

    reference: Tensor
    """Log-probabilities (pairs, 2) of the chosen and the rejected answers under the untuned base."""


class PreferenceGroup(TrainingGroup):
    """A `TrainingGroup` whose tasks have preference pairs (`AnswerPair`) as rows and whose loss is that of DPO.

    A batch has `batch_size` pairs. The loss of a client is the mean over its pairs, in place of the mean loss of answer
    tokens; balance losses and penalties are added to it as to the other.
    """

    def __init__(
        self, bank: Bank, tasks: Sequence[LocalTask], settings: TrainingSettings, seed: int, round_: int, fit_index: int
    ) -> None:
        """As `TrainingGroup`.

        Raises ValueError for a request with extra rows, a teacher or a partner, as those have one answer to a prompt.
        """
        fits = [task.fit for task in tasks]
        if any(fit.extra is not None or fit.teacher is not None or fit.partner is not None for fit in fits):
            raise ValueError(
                "a training on preference pairs cannot have extra rows, a teacher or a partner: a method that asks for "
                "them must say so by `only_answers`"
            )
        super().__init__(bank, tasks, settings, seed, round_, fit_index)
        self.untuned = AdapterStore(bank.base, [])
        self.virtual = len(bank.prefix(()))
        """Virtual tokens before each prompt."""
        self.batches = [map(rows_of_pairs, pairs) for pairs in self.batches]
        self.losses_of_pairs = self._losses_of_pairs

    @override
    def _collate(self, rows: list[list[TokenPair]], first: int, part: str) -> Batch:
        """Make one batch, with the log-probabilities of its answers under the reference model."""
        batch, bank = super()._collate(rows, first, part), self.bank
        without = batch
        if self.virtual:  # the untuned base cannot read virtual tokens
            plain = [[(prompt[self.virtual :], answer) for prompt, answer in part] for part in rows]
            without = collate(plain, bank.base.pad_id, bank.packs, device=bank.base.device)
        with torch.no_grad(), bank.lent(self.untuned, 0, 0), bank.forward(without) as logits:
            reference = sequence_log_probabilities(logits, without).view(-1, 2)
        return PairBatch(**vars(batch), reference=reference)

    def _losses_of_pairs(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss (C) of each client's pairs."""
        assert isinstance(batch, PairBatch)
        margins = margins_of(sequence_log_probabilities(logits, batch).view(-1, 2), batch.reference)
        return dpo_losses(margins, self.settings.beta).view(len(batch.prompts), -1).mean(1)

    @override
    def results(self) -> list[TrainingResult | DivergedError]:
        """Return the result of each client; the reference model counts as a teacher that reads every batch."""
        return [
            result if isinstance(result, DivergedError) else self._with_reference(result)
            for result in super().results()
        ]

    def _with_reference(self, result: TrainingResult) -> TrainingResult:
        pairs = result.steps * self.settings.accumulation * self.settings.batch_size
        return replace(
            result,
            teacher_examples=pairs,
            teacher_tokens=result.tokens - 2 * pairs * self.virtual,
        )


def rows_of_pairs(pairs: Sequence[Any]) -> list[TokenPair]:
    """Return (prompt, chosen answer) and (prompt, rejected answer) of each `AnswerPair`, one after the other."""
    return [(prompt, answer) for prompt, answers in pairs for answer in answers]
