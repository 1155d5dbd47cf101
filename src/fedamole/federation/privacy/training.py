"""Private local training (DP-SGD) in lock-step: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016,
https://arxiv.org/abs/1607.00133, algorithm 1.

A step of a client
    1. samples each training example with probability q, by the client's secret;
    2. computes the gradient of each sampled example on its own, clips it to norm `clip`, and adds it up;
    3. adds Gaussian noise with standard deviation noise * clip to every trained value;
    4. divides by the expected number of examples, q * n, not by the sampled one;
    5. adds the gradients of penalties, which read no example, and lets Adam take its step.
A pass reads at most one example per client, so that the gradient that it adds is that of the example, including the
balance loss of a mixture. The dropout mask of an example depends on its index among the client's rows and the step, not
on which other examples were sampled.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from typing_extensions import override

from fedamole.federation.local import DivergedError, TrainingGroup
from fedamole.federation.passes import in_passes
from fedamole.federation.privacy.mechanism import Mechanism
from fedamole.federation.probe import count_tokens
from fedamole.federation.request import TrainingResult
from fedamole.model.batch import TokenPair

ROUNDING = 1e-6
"""Relative margin of a clip for the rounding of float32 gradients."""


class PrivateGroup(TrainingGroup):
    """Clients whose training is noised; every task has a `Mechanism`."""

    def __init__(self, bank: Any, tasks: Sequence[Any], *arguments: Any) -> None:
        """Prepare the group as `TrainingGroup` does.

        Raises ValueError for a training without a mechanism, or one that reads more than the client's own rows.
        """
        for task in tasks:
            if task.mechanism is None or task.mechanism.examples != len(task.rows):
                raise ValueError("a private training needs a mechanism for the number of its rows")
            if task.fit.teacher is not None or task.fit.partner is not None or task.fit.extra is not None:
                raise ValueError("a private training has no teacher, no partner and no extra rows")
        super().__init__(bank, tasks, *arguments)
        self.rows: list[Sequence[TokenPair]] = bank.prefixed([task.rows for task in self.tasks])
        self.trainable = self._trainable_mask()  # no noise on frozen values and on empty places of a mixture
        self.sums = torch.zeros_like(self.store.gradients, dtype=torch.float64)
        """Sum of the clipped gradients of the step, (C, P)."""
        self.example_losses, self.examples = torch.zeros_like(self.loss_sums), [0] * len(self.tasks)
        self.reading = [0] * len(self.tasks)
        """Index of the row that each client reads in this pass."""

    @override
    def step(self, step: int) -> None:
        active = sum(step < steps for steps in self.steps)
        mechanisms = [task.mechanism for task in self.tasks[:active]]
        samples = [m.secret.poisson_sample(m.examples, m.sampling) for m in mechanisms if m is not None]
        self.add_clipped(samples, step)
        self.release(mechanisms)
        self.store.gradients[active:].zero_()
        self._add_penalty_gradients()
        self._update(active)
        # Losses must not decide whether a client diverged: that decision leaves the client, and they are not noised.
        self.example_losses += self.loss_sums
        self.loss_sums.zero_()

    def release(self, mechanisms: Sequence[Mechanism | None]) -> None:
        """Set the first clients' gradients to `sums` with noise, over the expected number of examples."""
        for client, mechanism in enumerate(mechanisms):
            assert mechanism is not None
            noise = torch.from_numpy(mechanism.secret.normal(self.sums.shape[1])).to(self.sums.device)
            noised = self.sums[client] + noise * (mechanism.noise * mechanism.clip)
            self.store.gradients[client] = (noised / mechanism.batch).to(self.store.gradients.dtype)

    def add_clipped(self, samples: Sequence[Sequence[int]], step: int) -> None:
        """Set `sums` to the sums of the clipped gradients of each client's sampled rows."""
        self.sums.zero_()
        for index in range(max(map(len, samples), default=0)):
            for first, last in _ranges([len(sample) > index for sample in samples]):
                for client in range(first, last):
                    self.reading[client] = samples[client][index]
                self._add_examples(first, last, step)

    def _add_examples(self, first: int, last: int, step: int) -> None:
        """Add the clipped gradients of one example of each of the clients `first` to `last` - 1."""
        gradients = self.store.gradients
        gradients[first:last].zero_()
        rows = [[self.rows[client][self.reading[client]]] for client in range(first, last)]
        losses_before = self.loss_sums.clone()

        def run(begin: int, end: int) -> None:
            self._add_gradients(rows[begin:end], first + begin, first + end, str(step), 1)

        def undo(begin: int, end: int) -> None:
            gradients[first + begin : first + end].zero_()
            self.loss_sums[first + begin : first + end] = losses_before[first + begin : first + end]

        in_passes(self.bank, [count_tokens(client_rows) for client_rows in rows], run, undo)
        assert self.trainable is not None
        examples = gradients[first:last].double() * self.trainable[first:last]
        clips = [task.mechanism.clip for task in self.tasks[first:last] if task.mechanism is not None]
        clip = torch.tensor(clips, dtype=torch.float64, device=examples.device).unsqueeze(1)
        norms = torch.linalg.vector_norm(examples, dim=1, keepdim=True)
        factors = (clip * (1 - ROUNDING) / norms).clamp(max=1.0)
        # A gradient that is not finite contributes nothing; a factor of 0 would leave NaN.
        self.sums[first:last] += torch.where(norms.isfinite(), examples * factors, 0.0)
        for client, client_rows in zip(range(first, last), rows, strict=True):
            self.examples[client] += 1
            self.tokens[client] += count_tokens(client_rows)

    @override
    def _dropout_purpose(self, part: str, client: int) -> str:
        return f"{super()._dropout_purpose(part, client)}/example-{self.reading[client]}"

    @override
    def results(self) -> list[TrainingResult | DivergedError]:
        """Return the results; their losses are means over the examples read, and are not noised."""
        losses = self.example_losses.tolist()
        return [
            result if isinstance(result, DivergedError) else replace(result, loss=loss / max(1, examples))
            for result, loss, examples in zip(super().results(), losses, self.examples, strict=True)
        ]


def _ranges(members: Sequence[bool]) -> list[tuple[int, int]]:
    """Return the ranges (first, last + 1) of consecutive members."""
    edges = [
        i for i in range(len(members) + 1) if (members[i - 1] if i else False) != (i < len(members) and members[i])
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))
