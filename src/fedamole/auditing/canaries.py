"""Canaries: made-up gradients that go through the training code of a run, to measure how well they can be recognised.

Each of m canaries is an example whose gradient has a direction of its own, with values in a block of the adapter that
no other canary uses. A fair coin decides whether it is in the client's data. The adversary knows the directions and
sees what the training releases, and guesses the coins (`bound.py`).

With `[privacy]`, canaries are the only examples of `PrivateGroup`, which samples, clips, sums and noises them as it
does the client's rows; the adversary sees the noised sum of every step, as the accounting assumes. Their gradients are
`OVERSIZE` times as large as the clip, so that a missing clip is noticed. A second training, with all canaries out, is
subtracted if it repeats the noise of the first one.

Without `[privacy]`, canaries are added to the gradients of `TrainingGroup`, which trains on the client's rows. They
have the norm of an average example, and are read as often as the rows. The adversary sees the tensors that leave the
client in a round. It knows the rows and the run's seed, so it subtracts the result of a training without canaries.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedamole.auditing.bound import Bound, best_bound
from fedamole.errors import ConfigError
from fedamole.federation.local import LocalTask, TrainingGroup
from fedamole.federation.privacy.mechanism import Mechanism
from fedamole.federation.privacy.training import PrivateGroup
from fedamole.federation.randomness import torch_generator
from fedamole.federation.request import TrainingRequest
from fedamole.federation.settings import TrainingSettings
from fedamole.model.bank import Bank
from fedamole.model.batch import TokenPair

OVERSIZE = 10.0
"""Norm of a canary as a multiple of the clip."""
SMALLEST_NOISE = 0.01
"""Smallest noise multiplier that scores assume; with none at all a likelihood ratio would be infinite."""
NORM_EXAMPLES = 16
"""Examples whose gradients give the norm of canaries without `[privacy]`."""
PLACEHOLDER: TokenPair = ((0,), (0,))
"""Row of a canary, which is never read."""

OnStep = Callable[[int], None]
"""Called after each step of a training, with the steps done."""


@dataclass(frozen=True)
class CanaryMechanism(Mechanism):
    """The mechanism of a training whose examples are canaries, with the run's probability of sampling."""

    probability: float = 1.0

    @property
    @override
    def sampling(self) -> float:
        return self.probability


class Directions:
    """Orthogonal directions of unit norm: canary i has values of equal size in a block of the trained values."""

    def __init__(self, trainable: Tensor, count: int, generator: torch.Generator) -> None:
        """Divide the values that `trainable` (P) selects among `count` canaries; ConfigError if there are too few."""
        values = trainable.nonzero().flatten().cpu()
        if not 0 < count <= len(values):
            raise ConfigError(
                f"--canaries {count}: each needs a trained value of its own, and there are {len(values)}; lower it"
            )
        self.width = len(values) // count
        chosen = values[torch.randperm(len(values), generator=generator)[: count * self.width]]
        self.indices = chosen.view(count, self.width).to(trainable.device)
        signs = torch.randint(0, 2, self.indices.shape, generator=generator) * 2.0 - 1
        self.values = (signs / math.sqrt(self.width)).to(trainable.device)

    def project(self, vector: Tensor) -> Tensor:
        """Return the products (m) of a vector (P) with all directions, float64."""
        return (vector.double()[self.indices] * self.values).sum(1)

    def add_to(self, vector: Tensor, canary: int, norm: float) -> None:
        """Add a canary's gradient of this norm to a vector (P)."""
        vector[self.indices[canary]] += (self.values[canary] * norm).to(vector.dtype)


def fair_coins(count: int) -> np.ndarray:
    """Return which of `count` canaries are in a client's data (count), bool."""
    return np.asarray(np.frombuffer(os.urandom(count), np.uint8) % 2 == 1)


class PrivateCanaries(PrivateGroup):
    """A private training of one client whose examples are canaries."""

    def __init__(
        self, bank: Bank, task: LocalTask, settings: TrainingSettings, included: np.ndarray, clip: float
    ) -> None:
        """Prepare a training of the canaries that are `included` (m); `clip` is what the run claims to clip to."""
        super().__init__(bank, [task], settings, 0, 0, 0)
        assert self.trainable is not None
        self.directions = Directions(self.trainable[0], len(included), torch_generator(0, "audit/directions"))
        self.included, self.clip = included, clip
        self.projections: list[np.ndarray] = []
        """What each step released in the directions of the canaries (m), as a multiple of the clip."""

    @override
    def add_clipped(self, samples: Sequence[Sequence[int]], step: int) -> None:
        """Leave out canaries that are not in the data, which contribute nothing."""
        super().add_clipped([[i for i in sample if self.included[i]] for sample in samples], step)

    @override
    def _add_gradients(self, rows: list[list[TokenPair]], first: int, last: int, part: str, parts: int) -> None:
        self.directions.add_to(self.store.gradients[first], self.reading[first], OVERSIZE * self.clip)

    @override
    def release(self, mechanisms: Sequence[Mechanism | None]) -> None:
        super().release(mechanisms)
        (mechanism,) = mechanisms
        assert mechanism is not None
        released = self.directions.project(self.store.gradients[0]) * (mechanism.batch / self.clip)
        self.projections.append(released.cpu().numpy().astype(np.float32))


@dataclass(frozen=True)
class Claim:
    """The privacy that a run claims for a client."""

    epsilon: float
    delta: float
    clip: float
    noise: float
    """Noise multiplier."""
    sampling: float
    """Probability of an example to be in a step."""
    steps: int


@dataclass(frozen=True)
class CanaryResult:
    """Result of guessing which canaries were included."""

    bound: Bound
    canaries: int
    steps: int
    delta: float
    measured_noise: float | None = None
    """Measured noise as a multiple of the claimed noise; None without `[privacy]`."""
    noise_repeats: bool = False
    """Whether two trainings had the same noise."""


def audit_private(
    bank: Bank,
    request: TrainingRequest,
    claim: Claim,
    new_mechanism: Callable[[], Mechanism],
    training: TrainingSettings,
    canaries: int,
    included: np.ndarray | None = None,
    on_step: OnStep = lambda step: None,
) -> CanaryResult:
    """Guess canaries from the noised sums of a private training.

    Args:
        bank: The base.
        request: The training, as in round 0.
        claim: What the run claims.
        new_mechanism: Returns the mechanism of one training, as the run does.
        training: The run's settings.
        canaries: Number m of canaries.
        included: Which of them are in the data (m); default: new fair coins.
        on_step: Called after each of the 2 * claim.steps steps.

    Raises:
        ConfigError: The adapter has fewer trained values than canaries.
    """
    coins = fair_coins(canaries) if included is None else included
    settings = replace(training, local_steps=claim.steps, local_epochs=0, budget="steps")
    request = replace(request, step_fraction=1.0)

    def projections(members: np.ndarray, done: int) -> np.ndarray:
        """Train once with these canaries in the data; return the projections (steps, m)."""
        own = new_mechanism()
        mechanism = CanaryMechanism(own.clip, own.noise, own.batch, canaries, own.secret, claim.sampling)
        task = LocalTask("audit", request, [PLACEHOLDER] * canaries, training.learning_rate, mechanism=mechanism)
        group = PrivateCanaries(bank, task, settings, members, claim.clip)
        for step in range(group.steps[0]):
            group.step(step)
            on_step(done + step + 1)
        return np.stack(group.projections)

    released = projections(coins, 0)
    noise = projections(np.zeros(canaries, dtype=bool), claim.steps)
    difference = released - noise
    # Of two equal noises the difference is 0 for all canaries that are out or were not sampled.
    repeats = bool(np.quantile(np.abs(difference), 0.25) < 0.5 * np.quantile(np.abs(noise), 0.25))
    scores = log_likelihood_ratio(difference if repeats else released, claim.noise, claim.sampling)
    measured = float(noise.std()) / claim.noise if claim.noise else math.inf
    bound = best_bound(scores, coins, claim.delta)
    return CanaryResult(bound, canaries, claim.steps, claim.delta, measured, repeats)


def log_likelihood_ratio(released: np.ndarray, noise: float, sampling: float) -> np.ndarray:
    """Return the logarithm of how much more likely a release is with a canary in the data than without it (m).

    Args:
        released: Projections (steps, m), as multiples of the clip: noise, plus 1 where a canary was sampled.
        noise: Standard deviation of the noise.
        sampling: Probability of a canary in the data to be sampled in a step.
    """
    spread = max(noise, SMALLEST_NOISE)
    absent = math.log1p(-sampling) if sampling < 1 else -math.inf
    ratios = np.logaddexp(absent, math.log(sampling) + (2 * released.astype(np.float64) - 1) / (2 * spread**2))
    return np.asarray(ratios.sum(0))


class PlainCanaries(TrainingGroup):
    """A training of one client on its own rows, with canaries among them."""

    def __init__(
        self,
        bank: Bank,
        task: LocalTask,
        settings: TrainingSettings,
        seed: int,
        included: np.ndarray,
        sent: Sequence[str],
    ) -> None:
        """Prepare a training of the canaries that are `included` (m), with directions in the tensors named `sent`."""
        super().__init__(bank, [task], settings, seed, 0, 0)
        names = self.adapters[0].tensors
        leaves = {name: torch.full_like(tensor, name in sent) for name, tensor in names.items()}
        trainable = self.store.row(0, leaves).to(self.store.weights)
        if self.trainable is not None:
            trainable = trainable * self.trainable[0]
        self.directions = Directions(trainable, len(included), torch_generator(seed, "audit/directions"))
        self.included = included
        self.norm = self._example_norm(task.rows[:NORM_EXAMPLES]) / (settings.batch_size * settings.accumulation)
        self.read, self.order = 0.0, self._order(torch_generator(seed, "audit/order"))

    def _example_norm(self, rows: Sequence[TokenPair]) -> float:
        """Return the mean norm of an example's gradient in the tensors that leave."""
        norms = []
        for row in self.bank.prefixed([rows])[0]:
            self.store.gradients.zero_()
            self._add_gradients([[row]], 0, 1, "audit", 1)
            norms.append(float(self.store.gradients[0].norm()))
        self.store.gradients.zero_()
        self.loss_sums.zero_()
        return sum(norms) / len(norms)

    def _order(self, generator: torch.Generator) -> Iterator[int]:
        """Yield canaries without end, each once per epoch."""
        while True:
            yield from torch.randperm(len(self.included), generator=generator).tolist()

    @override
    def _update(self, active: int) -> None:
        """Add the gradients of as many canaries as belong to a step, and take the step."""
        examples = self.settings.batch_size * self.settings.accumulation
        before, self.read = int(self.read), self.read + len(self.included) * examples / len(self.tasks[0].rows)
        for canary in itertools.islice(self.order, int(self.read) - before):
            if self.included[canary]:
                self.directions.add_to(self.store.gradients[0], canary, self.norm)
        super()._update(active)


def audit_plain(
    bank: Bank,
    request: TrainingRequest,
    rows: Sequence[TokenPair],
    sent: Sequence[str],
    training: TrainingSettings,
    seed: int,
    canaries: int,
    delta: float,
    included: np.ndarray | None = None,
    on_step: OnStep = lambda step: None,
) -> CanaryResult:
    """Guess canaries from the update that leaves a client without `[privacy]` in round 0.

    Args:
        bank: The base.
        request: The training of round 0.
        rows: The client's training rows.
        sent: Names of the tensors that leave.
        training: The run's settings.
        seed: The run's seed.
        canaries: Number m of canaries.
        delta: Delta at which epsilon is bounded.
        included: Which of them are in the data (m); default: new fair coins.
        on_step: Called after each step of the two trainings.

    Raises:
        ConfigError: The adapter has fewer trained values than canaries.
        DivergedError: The training diverged.
    """
    coins = fair_coins(canaries) if included is None else included
    task = LocalTask("audit", request, rows, training.rate(0))

    def projections(members: np.ndarray, done: int) -> np.ndarray:
        """Train once with these canaries in the data; return where the adapter is in their directions (m)."""
        group = PlainCanaries(bank, task, training, seed, members, sent)
        bank.base.training(True)
        try:
            for step in range(group.steps[0]):
                group.step(step)
                on_step(done + step + 1)
        finally:
            bank.base.training(False)
        for error in group.check(group.steps[0] - 1).values():
            raise error
        return group.directions.project(group.store.weights[0]).cpu().numpy()

    steps = task.steps(training)
    scores = projections(np.zeros(canaries, dtype=bool), 0) - projections(coins, steps)  # training descends
    return CanaryResult(best_bound(scores, coins, delta), canaries, steps, delta)
