"""Kendall's tau against published orders, by hand."""

import pytest
from scripts.published_order import PUBLISHED, order

from fedamole.methods import METHODS


def test_tau_counts_pairs_in_the_same_order() -> None:
    """Of the six pairs of a, b, c, d, five are in the same order and one is not: (5 - 1) / 6. x is in one alone."""
    published = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "x": 9.0}
    methods, tau, _ = order(published, {"d": 50.0, "a": 1.0, "b": 7.0, "c": 6.0})
    assert methods == ["a", "b", "c", "d"]
    assert tau == pytest.approx(4 / 6)


def test_published_methods_are_in_the_registry() -> None:
    assert {name for table in PUBLISHED.values() for name in table} <= METHODS.keys()
