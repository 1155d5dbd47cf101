"""The noise of each client of a run, and the checks before it starts."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedamole.errors import ConfigError
from fedamole.federation.method import Method
from fedamole.federation.privacy.accounting import NoisedSteps, epsilon_of, noise_for
from fedamole.federation.privacy.mechanism import Mechanism
from fedamole.federation.privacy.releases import PRIVATE
from fedamole.federation.privacy.settings import PrivacySettings
from fedamole.federation.settings import FederationSettings, TrainingSettings

MOST_NOISE = 100.0
"""Largest noise multiplier of a run; more is no training any longer."""


def check_private(
    name: str,
    method: Method[Any, Any, Any, Any],
    training: TrainingSettings,
    federation: FederationSettings,
    best_round: str,
    deployed: bool,
) -> None:
    """Raise ConfigError if a method, called `name`, or the settings of a run cannot be made private."""
    if reason := refusal(method):
        raise ConfigError(f"[privacy]: the method {name} cannot be made private: {reason}")
    if training.objective == "preference":
        raise ConfigError('[privacy]: training.objective = "preference" is not available; use "answer"')
    if federation.patience:
        raise ConfigError(
            f"[privacy]: federation.patience = {federation.patience} stops a run by validation scores, which are not "
            "noised; remove it"
        )
    if best_round == "mean":
        raise ConfigError(
            '[privacy]: evaluation.best_round = "mean" chooses by the validation scores of all clients, which are not '
            'noised; set it to "client", so that each client chooses its own'
        )
    if deployed:
        raise ConfigError(
            "[privacy] is not available in a deployment yet, only in a simulation: remove [privacy] or "
            "deployment.clients"
        )


def refusal(method: Method[Any, Any, Any, Any]) -> str:
    """Return why a method cannot be made private, with a remedy; empty if it can."""
    fields, released = list(method.records.reply.__dataclass_fields__), method.released()
    if unknown := [field for field in fields if field not in released]:
        return (
            f"it does not declare of what kind the {'fields' if len(unknown) > 1 else 'field'} {', '.join(unknown)} of "
            "its replies is (Method.releases); use fedit, ffa_lora or another of docs/privacy.md"
        )
    if refused := [f"{field} ({released[field]})" for field in fields if released[field] not in PRIVATE]:
        remedy = '; set method.assignment = "static"' if hasattr(method, "assignment") else ""
        return f"there is no noise yet for {', '.join(refused)} of its replies{remedy}"
    if method.probes or method.trains_at_server or method.sends_synthetic_examples:
        return "its clients send what depends on their examples in other ways than by local training"
    return ""


@dataclass(frozen=True)
class Budget:
    """The privacy of a run: which noise its clients add, and how many steps they take."""

    settings: PrivacySettings
    training: TrainingSettings
    method: Method[Any, Any, Any, Any]
    rounds: int

    @cached_property
    def trains(self) -> bool:
        """Whether a client releases anything that it has trained."""
        return "trained" in self.method.released().values()

    @property
    def batch(self) -> int:
        """Expected number of examples in a step."""
        return self.training.batch_size * self.training.accumulation

    def steps(self, examples: int) -> int:
        """Return the private steps of a client's round, for a client with this number of training examples."""
        if not self.trains:
            return 0
        share = self.method.round_share(self.training.budget) * self.method.released_share
        return max(1, round(self.training.steps(examples) * share))

    def noise(self, examples: int) -> float:
        """Return the noise multiplier with which the client can take part in every round."""
        settings, sampling = self.settings, min(1.0, self.batch / examples)
        return noise_for(settings.epsilon, settings.delta, sampling, self.steps(examples) * self.rounds)

    def mechanism(self, examples: int) -> Mechanism:
        """Return the mechanism of one training, with new secret random numbers."""
        return Mechanism(self.settings.clip, self.noise(examples), self.batch, examples)

    def round_of(self, examples: int) -> NoisedSteps:
        """Return the private steps of one round."""
        sampling = min(1.0, self.batch / examples)
        return NoisedSteps(sampling, self.noise(examples) if self.trains else 0.0, self.steps(examples))

    def check(self, client: str, examples: int) -> None:
        """Raise ConfigError if a client with this number of training examples cannot keep to the budget."""
        if not self.trains:
            return
        if examples < self.batch:
            raise ConfigError(
                f"[privacy]: client {client} has {examples} training examples, fewer than the {self.batch} of a step "
                f"(training.batch_size * accumulation): lower them to {examples} or less"
            )
        if self.settings.delta * examples >= 1:
            raise ConfigError(
                f"privacy.delta = {self.settings.delta}: must be below 1 / {examples}, as client {client} has "
                f"{examples} training examples; set it to {1 / examples / 10:.0e}"
            )
        if (noise := self.noise(examples)) > MOST_NOISE:
            raise ConfigError(
                f"privacy.epsilon = {self.settings.epsilon}: client {client} with {examples} training examples would "
                f"need noise of {noise:.0f} times the clip in each of {self.steps(examples) * self.rounds} steps, more "
                f"than {MOST_NOISE:.0f}; {self._what_fits(examples)}"
            )

    def describe(self, client: str, examples: int, parameters: float) -> str:
        """Return the noise in a step against the largest signal in a sentence, for an adapter of this size."""
        if not self.trains:
            return "Nothing that was trained leaves a client, so no noise is added."
        noise, settings = self.noise(examples), self.settings
        ratio = noise * math.sqrt(parameters) / self.batch
        text = (
            f"epsilon {settings.epsilon:g} at delta {settings.delta:g} for {client}, with {examples} examples: noise "
            f"of {noise:.2f} times the clip on each value in {self.steps(examples) * self.rounds} steps. Its norm is "
            f"{noise * math.sqrt(parameters) * settings.clip:.3g}, that of a step's gradients at most "
            f"{self.batch * settings.clip:.3g} ({ratio:.1f} times as much noise)."
        )
        if ratio <= 1:
            return text
        return f"{text} For less: a larger training.batch_size, a lower method.rank, ffa_lora, or fewer steps."

    def _what_fits(self, examples: int) -> str:
        """Return what to change if the noise is too large."""
        sampling, steps = min(1.0, self.batch / examples), self.steps(examples)
        epsilon = epsilon_of([NoisedSteps(sampling, MOST_NOISE, steps * self.rounds)], self.settings.delta)
        options = [f"epsilon = {epsilon * 1.01:.2g} would fit"]
        low, high = 0, self.rounds
        while high - low > 1:
            middle = (low + high) // 2
            spent = epsilon_of([NoisedSteps(sampling, MOST_NOISE, steps * middle)], self.settings.delta)
            low, high = (middle, high) if spent <= self.settings.epsilon else (low, middle)
        if low:
            options.append(f"federation.rounds = {low}")
        return " or ".join(options)
