"""Training and probing at the server, on its own copy of the base.

Only methods with `trains_at_server` have it. In a simulation the server and the clients use one resident base in turn;
in a deployment the coordinator keeps the base that it has loaded.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedamole.data.tokens import TokenRow
from fedamole.errors import RunError
from fedamole.federation.local import DivergedError, LocalTask, fit
from fedamole.federation.probe import ClientProbe, Probe, ProbeCounts
from fedamole.federation.prompt_states import PromptStates, prompt_states
from fedamole.federation.randomness import derived_seed
from fedamole.federation.request import TrainingRequest, TrainingResult
from fedamole.federation.settings import TrainingSettings
from fedamole.federation.trajectory import TrajectoryRequest, TrajectoryResult, match_trajectory
from fedamole.model.bank import Bank
from fedamole.model.batch import Ids
from fedamole.model.params import Adapter

SERVER = "server"
"""Stands for the name of a client in the purposes of random streams, whose seed is the server's own."""


@dataclass
class ServerWork:
    """What a server that holds the base can do with it, and what it has done in the current round."""

    bank: Bank
    settings: TrainingSettings
    batch_tokens: int
    """Largest number of tokens that a probe reads at once."""
    seed: int
    """The run's."""
    counts: ProbeCounts = field(default_factory=ProbeCounts)
    trainings: int = 0
    """Trainings of this round so far; they have different random streams."""
    steps: int = 0
    tokens: int = 0
    """Tokens of forward and backward passes."""
    seconds: float = 0.0
    second: "ServerWork | None" = None
    """Work on the server's second base, if it has one; its counts are added to those of this one."""
    notes: dict[str, float] = field(default_factory=dict)
    """Numbers for the server's line of this round in metrics.jsonl, by name."""

    def train(self, request: TrainingRequest, steps: int, round_: int) -> TrainingResult:
        """Train for `steps` optimiser steps on the extra rows of a request and return the result.

        Learning rate, batch size and clipping are those of `[training]`. Raises ValueError for a request that reads a
        client's own rows, or has a partner, and RunError if the training diverges.
        """
        if request.own_rows or request.partner is not None:
            raise ValueError("the server has no rows of its own and trains one adapter at a time")
        started, rate = time.perf_counter(), self.settings.rate(round_)
        settings = replace(self.settings, local_steps=steps, local_epochs=0, budget="steps")
        task = LocalTask(SERVER, replace(request, step_fraction=1.0), [], rate)
        seed = derived_seed(self.seed, SERVER)
        (result,) = fit(self.bank, [task], settings, seed=seed, round_=round_, fit_index=self.trainings)
        self.trainings += 1
        self.seconds += time.perf_counter() - started
        if isinstance(result, DivergedError):
            raise RunError(f"training at the server failed: {result}")
        self.steps += result.steps
        self.tokens += result.tokens
        self.counts.examples += result.teacher_examples
        self.counts.tokens += result.teacher_tokens
        return result

    def match(self, request: TrajectoryRequest) -> TrajectoryResult:
        """Match a trajectory and count its steps and tokens; see `match_trajectory`."""
        started, result = time.perf_counter(), match_trajectory(self.bank, request)
        self.seconds += time.perf_counter() - started
        self.steps += len(result.matched.errors)
        self.tokens += result.tokens
        return result

    def probe(self, rows: Sequence[TokenRow]) -> Probe:
        """Return a probe over rows that the server has; what it reads is counted."""
        return ClientProbe(self.bank, rows, SERVER, self.seed, self.batch_tokens, self.counts)

    def read(self, adapter: Adapter | None, prompts: Sequence[Ids]) -> PromptStates:
        """Read prompts under an adapter and count them; see `prompt_states`."""
        started, states = time.perf_counter(), prompt_states(self.bank, adapter, prompts, self.batch_tokens)
        self.seconds += time.perf_counter() - started
        self.counts.add([(prompt, (0,)) for prompt in prompts])
        return states

    def report(self) -> dict[str, Any]:
        """Return what was done since the last call, for metrics.jsonl, and start counting anew."""
        report: dict[str, Any] = {
            "steps": self.steps,
            "forward_tokens": self.counts.tokens,
            "backward_tokens": self.tokens,
            "seconds": self.seconds,
        }
        if self.counts.examples:
            report["probed"] = self.counts.examples
        if self.second is not None:
            report |= {key: report.get(key, 0) + value for key, value in self.second.report().items()}
        report |= self.notes
        self.trainings = self.steps = self.tokens = 0
        self.seconds, self.counts, self.notes = 0.0, ProbeCounts(), {}
        return report
