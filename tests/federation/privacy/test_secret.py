"""Secret random numbers: never the same twice, with the distribution that the accounting assumes, and never shown."""

import copy
import pickle

import numpy as np
import pytest
from scipy.stats import kstest

from fedamole.federation.privacy.secret import SecretRandom


def test_a_stream_never_repeats_and_another_key_gives_another() -> None:
    stream = SecretRandom(bytes(32))
    first, second = stream.normal(100), stream.normal(100)
    assert not np.intersect1d(first, second).size
    assert (SecretRandom(bytes(32)).normal(100) == first).all()
    assert not np.intersect1d(SecretRandom().normal(100), SecretRandom().normal(100)).size


def test_numbers_are_normal_and_uniform() -> None:
    stream = SecretRandom(b"a key for tests of 32 bytes long")
    noise, uniform = stream.normal(200_000), stream.uniform(200_000)
    assert kstest(noise, "norm").pvalue > 0.001
    assert kstest(uniform, "uniform").pvalue > 0.001
    assert np.abs(noise).max() < 7
    assert 0 < uniform.min() < uniform.max() < 1


def test_a_sample_includes_each_index_with_its_probability() -> None:
    stream = SecretRandom(b"a key for tests of 32 bytes long")
    samples = [stream.poisson_sample(10, 0.25) for _ in range(4000)]
    counts = np.bincount(np.concatenate(samples).astype(int), minlength=10)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)
    assert [] in samples
    assert stream.poisson_sample(5, 1.0) == [0, 1, 2, 3, 4]


def test_the_key_is_not_shown_and_does_not_leave_the_process() -> None:
    stream = SecretRandom(b"a key for tests of 32 bytes long")
    assert "key" not in repr(stream)
    for leave in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            leave(stream)
