"""The work of one client in an exchange, paused wherever it needs local training.

A client's work is the generator `Method.update`: it yields a request for each training it needs. A worker runs the
clients of a group in lock-step. It advances the generators of all of them to their next request, trains these requests
together, sends the results back, and repeats this until every generator has returned.
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from fedamole.federation.autoencoder_request import AutoencoderResult
from fedamole.federation.client_data import ClientData
from fedamole.federation.local import DivergedError
from fedamole.federation.method import Client, Request, TrainingResult
from fedamole.federation.probe import ProbeCounts
from fedamole.federation.settings import Budget
from fedamole.federation.synthesis_request import SynthesisResult

Outcome = TrainingResult | SynthesisResult | AutoencoderResult | DivergedError
"""Outcome of one local training, of one optimisation of synthetic examples, or of one training of an autoencoder."""


@dataclass
class ClientWork:
    """The work of one client, and what it took."""

    client: Client
    data: ClientData
    counts: ProbeCounts
    """Examples and tokens read without training."""
    work: Generator[Request, Any, tuple[Any, Any, TrainingResult]]
    """`Method.update` of the client; returns (client state, reply, result of the last training)."""
    step_fraction: float
    """Fraction of the optimiser steps of the round taken so far, including earlier exchanges."""
    trained_sizes: dict[str, int] = field(default_factory=dict)
    """Values of each tensor trained in the round so far, including earlier exchanges."""
    request: Request | None = None
    """The training it waits for; None before the start and after the end."""
    outcome: tuple[Any, Any, TrainingResult] | DivergedError | None = None
    """What `work` returned, or why it was stopped; None while it runs."""
    steps: int = 0
    """Optimiser steps taken in this exchange; a step of a pair counts as two."""
    tokens: int = 0
    """Tokens, without padding, of the forward and backward passes of this exchange."""

    def advance(self, result: TrainingResult | SynthesisResult | AutoencoderResult | None) -> None:
        """Continue until the next request or the end; `result` answers the last request (None at the start)."""
        try:
            self.request = next(self.work) if result is None else self.work.send(result)
        except StopIteration as end:
            self.request, self.outcome = None, end.value

    def receive(self, result: Outcome, budget: Budget) -> None:
        """Count a finished training, and continue unless it diverged."""
        assert self.request is not None
        for training in self.request.trainings:
            self.trained_sizes.update(training.adapter.trained_sizes())
            self.step_fraction += training.fraction_for(budget)
        if isinstance(result, DivergedError):
            self.request, self.outcome = None, result
            return
        for training_result in result.trainings:
            self.steps += training_result.steps
            self.tokens += training_result.tokens
            self.counts.examples += training_result.teacher_examples
            self.counts.tokens += training_result.teacher_tokens
        self.advance(result)
