"""Sorted ids and tie hashes: what an assignment may depend on."""

import numpy as np
import pytest

from fedamole.assignment.identity import sorted_index, tie_hashes

GOLDEN = [[3901627550244126953, 7377501511659637934], [6474106967737743924, 5861748841637247318]]


def test_tie_hashes_never_change() -> None:
    """A stored run must be repeatable by a later version: these numbers are part of the file format."""
    hashes = tie_hashes(["expert-00", "expert-01"], ["a", "b"])
    assert hashes.tolist() == GOLDEN
    assert tie_hashes(["expert-01"], ["b"])[0, 0] == GOLDEN[1][1]
    assert tie_hashes(["a"], ["b"]) != tie_hashes(["b"], ["a"])


def test_sorted_index_reads_in_the_order_of_ids() -> None:
    """Experts y, x and clients 2, 3, 1: sorted they are rows 1, 0 and columns 2, 0, 1."""
    array = np.array([[10, 11, 12], [20, 21, 22]])
    index = sorted_index(["y", "x"], ["2", "3", "1"])
    assert array[index].tolist() == [[22, 20, 21], [12, 10, 11]]
    with pytest.raises(ValueError, match="x occur more than once"):
        sorted_index(["x", "x"], ["1"])
