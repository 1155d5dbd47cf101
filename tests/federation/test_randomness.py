"""Generators come from (seed, purpose, client, round) and from nothing else."""

import itertools

import numpy as np
import torch

from fedamole.federation.randomness import derived_seed, exchange_seed, numpy_generator, torch_generator

PLACES = list(itertools.product((0, 1), ("order", "orders", ""), ("a", "b", ""), (-1, 0, 1)))


def test_every_place_has_a_seed_of_its_own() -> None:
    seeds = {derived_seed(*key) for key in PLACES}
    assert len(seeds) == len(PLACES)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # The parts cannot run into each other.
    assert derived_seed(1, "a", "bc") != derived_seed(1, "ab", "c")
    assert derived_seed(1, "a", "b", 11) != derived_seed(1, "a", "b1", 1)


def test_seeds_are_the_same_on_every_machine_and_day() -> None:
    """A stored value: changing the derivation would change every published run."""
    assert derived_seed(0, "pool") == 1516418688642551374


def test_the_first_exchange_of_a_round_has_the_seed_of_the_run() -> None:
    seeds = [exchange_seed(seed, exchange) for seed in (7, 8) for exchange in range(3)]
    assert (seeds[0], seeds[3]) == (7, 8)
    assert len(set(seeds)) == 6


def test_generators_are_new_each_time_and_touch_nothing_global() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist()
    first = torch.rand(5, generator=torch_generator(3, "order", "a", 1))
    assert torch.equal(first, torch.rand(5, generator=torch_generator(3, "order", "a", 1)))
    drawn = numpy_generator(3, "cohort", "server", 1).random(5)
    assert (drawn == numpy_generator(3, "cohort", "server", 1).random(5)).all()
    assert not torch.equal(first, torch.rand(5, generator=torch_generator(3, "order", "a", 2)))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == numpy_state


def test_a_run_touches_no_global_generator(runs: object) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist()
    runs.fresh("fedamole", "federation.rounds=1")  # type: ignore[attr-defined]
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == numpy_state
