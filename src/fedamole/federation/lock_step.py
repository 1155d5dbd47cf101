"""Runs the local work of a group of clients side by side.

A client's work is the generator `Method.update`: it yields a request for each training it needs. `LockStep` advances
the generators of all clients to their next request, trains these requests together, sends the results back, and
repeats this until every generator has returned.
"""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedamole.federation.local import DivergedError
from fedamole.federation.method import TrainingRequest, TrainingResult
from fedamole.federation.settings import Budget

Work = Generator[TrainingRequest, TrainingResult, tuple[Any, Any, TrainingResult]]
"""`Method.update` of one client; returns (client state, reply, result of the last training)."""


@dataclass
class ClientWork:
    """The work of one client, and what it took."""

    work: Work
    step_fraction: float
    """Fraction of the optimiser steps of the round taken so far, including earlier exchanges."""
    trained_sizes: dict[str, int] = field(default_factory=dict)
    """Values of each tensor trained in the round so far, including earlier exchanges."""
    request: TrainingRequest | None = None
    """The training it waits for; None before the start and after the end."""
    outcome: tuple[Any, Any, TrainingResult] | DivergedError | None = None
    """What `work` returned, or why it was stopped; None while it runs."""
    steps: int = 0
    """Optimiser steps taken in this exchange."""
    tokens: int = 0
    """Tokens, without padding, of the forward and backward passes of this exchange."""

    def advance(self, result: TrainingResult | None) -> None:
        """Continue until the next request or the end; `result` answers the last request (None at the start)."""
        try:
            self.request = next(self.work) if result is None else self.work.send(result)
        except StopIteration as end:
            self.request, self.outcome = None, end.value

    def receive(self, result: TrainingResult | DivergedError, budget: Budget) -> None:
        """Count a finished training, and continue unless it diverged."""
        assert self.request is not None
        self.trained_sizes.update(self.request.adapter.trained_sizes())
        self.step_fraction += self.request.fraction_for(budget)
        if isinstance(result, DivergedError):
            self.request, self.outcome = None, result
            return
        self.steps += result.steps
        self.tokens += result.tokens
        self.advance(result)


Train = Callable[[Mapping[int, TrainingRequest], int], Mapping[int, TrainingResult | DivergedError]]
"""train(requests by client index, fit_index) -> results by client index; `fit_index` counts the calls from 0."""


class LockStep:
    """Scheduler of the work of a group of clients."""

    def __init__(self, works: Sequence[ClientWork], budget: Budget, train: Train) -> None:
        """Schedule `works`; `train` serves their requests under `budget`."""
        self.works, self.budget, self.train = works, budget, train
        self.seconds_training = 0.0

    def run(self) -> None:
        """Run all work to its end."""
        for work in self.works:
            work.advance(None)
        fit_index = 0
        while requests := {i: work.request for i, work in enumerate(self.works) if work.request is not None}:
            started = time.perf_counter()
            results = self.train(requests, fit_index)
            self.seconds_training += time.perf_counter() - started
            for i in requests:
                self.works[i].receive(results[i], self.budget)
            fit_index += 1
