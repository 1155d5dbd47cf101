"""The canary bound: its theorem by hand, sound mechanisms below their claim, broken mechanisms above it."""

from collections.abc import Callable
from dataclasses import replace
from math import log
from typing import Any

import numpy as np
import pytest
import torch

from fedamole.auditing.bound import best_bound, epsilon_bound, probability
from fedamole.auditing.canaries import Claim, Directions, audit_plain, audit_private, log_likelihood_ratio
from fedamole.errors import ConfigError
from fedamole.experiment import prepare
from fedamole.federation.privacy.accounting import NoisedSteps, epsilon_of, noise_for
from fedamole.federation.privacy.mechanism import Mechanism
from fedamole.federation.privacy.secret import SecretRandom
from fedamole.federation.request import TrainingRequest
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.params import Adapter, new_shared

KEY = b"a key for tests of 32 bytes long"


def test_the_probability_by_hand() -> None:
    """Two guesses of a mechanism with epsilon ln 3, which answers truly 3 times out of 4."""
    epsilon = log(3)
    assert probability(2, 2, 2, epsilon, 0.0) == pytest.approx(9 / 16)
    assert probability(2, 2, 1, epsilon, 0.0) == pytest.approx(15 / 16)
    # P[2 > X >= 1] = 6/16 over 1, P[2 > X >= 0] = 7/16 over 2: the largest is 6/16.
    assert probability(2, 2, 2, epsilon, 0.1) == pytest.approx(9 / 16 + 2 * 2 * 0.1 * 6 / 16)
    assert probability(2, 2, 0, epsilon, 0.1) == 1


@pytest.mark.parametrize(("guesses", "expected"), [(200, 4.19), (1000, 5.81)])
def test_the_bound_if_all_guesses_are_right(guesses: int, expected: float) -> None:
    assert epsilon_bound(guesses, guesses, guesses, 0.0) == pytest.approx(expected, abs=0.005)
    assert epsilon_bound(guesses, guesses, guesses // 2, 0.0) == 0
    assert epsilon_bound(guesses, guesses, guesses, 0.5) == 0  # delta allows everything


def test_equal_scores_are_no_knowledge() -> None:
    assert best_bound(np.zeros(1000), np.arange(1000) < 500, 1e-5).epsilon == 0


def test_the_likelihood_ratio_by_hand() -> None:
    released = np.array([[1.0, 0.5], [0.0, 0.5]])
    assert log_likelihood_ratio(released, 1.0, 1.0) == pytest.approx([0.0, 0.0])
    expected = log(0.75 + 0.25 * np.exp(0.5)) + log(0.75 + 0.25 * np.exp(-0.5))
    assert log_likelihood_ratio(released, 1.0, 0.25) == pytest.approx([expected, 0.0])


def test_directions_are_orthogonal_and_spare_frozen_values() -> None:
    trainable = torch.tensor([1.0, 0, 1, 1, 1, 0, 1, 1, 1])
    directions = Directions(trainable, 3, torch.Generator().manual_seed(0))
    vectors = torch.zeros(3, 9)
    for canary, vector in enumerate(vectors):
        directions.add_to(vector, canary, 2.0)
    assert torch.allclose(vectors @ vectors.T, 4 * torch.eye(3), atol=1e-6)
    assert not vectors[:, trainable == 0].any()
    assert torch.allclose(directions.project(vectors.sum(0)), torch.full((3,), 2.0, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"--canaries 8: .* there are 7; lower it"):
        Directions(trainable, 8, torch.Generator())


@pytest.fixture(scope="module")
def prepared(runs: Any) -> Any:
    return prepare(runs.load("fedit"))


@pytest.fixture(scope="module")
def bank(prepared: Any) -> Bank:
    return Bank(prepared.base)


@pytest.fixture(scope="module")
def request_(bank: Bank) -> TrainingRequest:
    """A LoRA of more than 10,000 values."""
    tensors = new_shared(bank.base.shapes, 64, torch.Generator().manual_seed(3))
    assert sum(tensor.numel() for tensor in tensors.values()) > 10_000
    return TrainingRequest(Adapter(AdapterSpec(64, 4.0), tensors))


def claim_of(epsilon: float, sampling: float, steps: int) -> Claim:
    noise = noise_for(epsilon, 1e-5, sampling, steps)
    return Claim(epsilon, 1e-5, 0.5, noise, sampling, steps)


def coins(count: int) -> np.ndarray:
    return np.random.default_rng(5).random(count) < 0.5


@pytest.fixture
def audit(bank: Bank, prepared: Any, request_: TrainingRequest) -> Callable[..., Any]:
    def audit(claim: Claim, canaries: int, clip: float = 0.5, noise: float = 1.0, keys: tuple[bytes, ...] = ()) -> Any:
        """Audit a mechanism whose clip and noise (as a multiple of the claimed one) may be other than claimed."""
        secrets = iter([SecretRandom(key) for key in keys] or [SecretRandom(KEY), SecretRandom(KEY[::-1])])
        settings = prepared.config.training

        def new_mechanism() -> Mechanism:
            return Mechanism(clip, claim.noise * noise * claim.clip / clip, 4, 40, next(secrets))

        return audit_private(bank, request_, claim, new_mechanism, settings, canaries, coins(canaries))

    return audit


def test_without_noise_the_bound_is_at_least_3(audit: Any) -> None:
    result = audit(claim_of(2.0, 0.1, 30), 500, noise=0.0)
    assert result.bound.epsilon >= 3
    assert result.measured_noise == 0


@pytest.mark.parametrize(("sampling", "steps"), [(1.0, 3), (0.1, 20)])
def test_a_claim_of_2_gets_a_bound_of_at_most_2(sampling: float, steps: int, audit: Any) -> None:
    result = audit(claim_of(2.0, sampling, steps), 1000)
    assert result.bound.epsilon <= 2
    assert result.measured_noise == pytest.approx(1.0, abs=0.05)
    assert not result.noise_repeats


def test_a_weaker_claim_gets_a_larger_bound(audit: Any) -> None:
    """So the bound of a sound mechanism is not small because the audit sees nothing."""
    result = audit(claim_of(10.0, 1.0, 1), 1000)
    assert 2 <= result.bound.epsilon <= 10


def test_a_missing_clip_is_caught(audit: Any) -> None:
    claim = claim_of(2.0, 0.1, 20)
    assert audit(claim, 1000, clip=1e6).bound.epsilon > claim.epsilon


def test_noise_of_half_size_is_caught(audit: Any) -> None:
    claim = claim_of(2.0, 0.002, 500)
    result = audit(claim, 10_000, noise=0.5)
    assert result.bound.epsilon > claim.epsilon
    assert epsilon_of([NoisedSteps(0.002, claim.noise / 2, 500)], 1e-5) > result.bound.epsilon
    assert result.measured_noise == pytest.approx(0.5, abs=0.01)


def test_noise_from_a_known_key_is_caught(audit: Any) -> None:
    claim = claim_of(2.0, 0.1, 20)
    result = audit(claim, 1000, keys=(KEY, KEY))
    assert result.noise_repeats
    assert result.bound.epsilon > claim.epsilon


def test_without_privacy_the_update_reveals_its_canaries(bank: Bank, prepared: Any, request_: TrainingRequest) -> None:
    rows = prepared.clients["mood"].train.pairs()
    settings = replace(prepared.config.training, local_epochs=1)
    sent = tuple(name for name in request_.adapter.tensors if name.endswith("/B"))
    result = audit_plain(bank, request_, rows, sent, settings, 0, 1000, 1e-5, coins(1000))
    assert result.bound.epsilon >= 3
    assert (result.steps, result.canaries, result.measured_noise) == (len(rows) // 2, 1000, None)
