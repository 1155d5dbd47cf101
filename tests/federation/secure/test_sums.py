"""Masks cancel to the last bit, for any groups and any clients that are lost, and nothing below the minimum opens."""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.federation.secure.clients import CLIP, CONTEXT, HOLDERS, NAMES, announced, participants, random_values

from fedamole.federation.secure.fixed_point import decode, encode
from fedamole.federation.secure.masks import pair_secret, seed_of, sign_of, stream
from fedamole.federation.secure.participant import Participant, Revealed, Values
from fedamole.federation.secure.statements import Context, SecureAggregationError
from fedamole.federation.secure.sums import Masked, open_sums


def revealed_by(clients: Mapping[str, Participant], context: Context, survivors: frozenset[str]) -> dict[str, Revealed]:
    confirmations = {name: clients[name].confirm(context, survivors) for name in survivors}
    return {name: clients[name].reveal(context, confirmations) for name in survivors}


def plain_sum(values: Mapping[str, Values], key: str, names: Collection[str]) -> np.ndarray:
    """The sum of the encoded values as Python integers, modulo 2^32."""
    rows = [[round(min(max(x, -CLIP), CLIP) * 2**20) for x in values[name][key]] for name in names]
    return np.array([sum(column) % 2**32 for column in zip(*rows, strict=True)], np.uint32)


GROUPS = st.lists(
    st.sets(st.sampled_from(NAMES), min_size=1).map(lambda names: tuple(sorted(names))), min_size=1, max_size=4
)


@given(groups=GROUPS, lost=st.sets(st.sampled_from(NAMES)), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_any_groups_and_any_lost_clients(
    groups: list[tuple[str, ...]], lost: set[str], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A sum equals the plain integer sum over the survivors, and exists if at least three holders survived."""
    clients, context = participants(tmp_path_factory.mktemp("journals")), Context("run", 0, 0)
    holders = {f"tensors:m/expert-{index:02d}/A": names for index, names in enumerate(groups)}
    values = random_values(holders, seed)
    announcement = announced(clients, holders, context)
    assert set(announcement.groups) == {key for key, names in holders.items() if len(names) >= 3}
    masked = {name: client.mask(announcement, values[name]) for name, client in clients.items() if name not in lost}
    survivors = frozenset(masked)
    sums = open_sums(announcement, masked, survivors, revealed_by(clients, context, survivors), 3)
    expected = {key: sorted(survivors & set(names)) for key, names in holders.items()}
    assert set(sums) == {key for key, names in expected.items() if len(names) >= 3}
    for key, group in sums.items():
        assert list(group.clients) == expected[key]
        assert group.total.tolist() == plain_sum(values, key, expected[key]).tolist()


def test_a_client_that_gives_no_seeds_costs_its_groups_alone(tmp_path: Path) -> None:
    clients = participants(tmp_path)
    holders = {**HOLDERS, "z": ("bob", "cleo", "dan")}
    values = random_values(holders, 1)
    announcement = announced(clients, holders, CONTEXT)
    masked = {name: client.mask(announcement, values[name]) for name, client in clients.items()}
    seeds = revealed_by(clients, CONTEXT, frozenset(NAMES))
    assert set(open_sums(announcement, masked, frozenset(NAMES), seeds, 3)) == {"x", "y", "z"}
    del seeds["ann"]
    assert set(open_sums(announcement, masked, frozenset(NAMES), seeds, 3)) == {"z"}
    short = {**seeds, "ann": Revealed(dict.fromkeys("xy", b"short"), {})}
    assert set(open_sums(announcement, masked, frozenset(NAMES), short, 3)) == {"z"}
    other_shape: Masked = {**masked, "bob": {**masked["bob"], "z": np.zeros(9, np.uint32)}}
    assert not open_sums(announcement, other_shape, frozenset(NAMES), short, 3)


def test_no_seed_leaves_for_a_tensor_with_too_few_survivors(tmp_path: Path) -> None:
    """Of the three holders of y one is lost; x still has four. Seeds of x leave, seeds of y do not."""
    clients = participants(tmp_path)
    announcement = announced(clients, HOLDERS, CONTEXT)
    values = random_values(HOLDERS, 2)
    masked = {name: clients[name].mask(announcement, values[name]) for name in NAMES if name != "cleo"}
    seeds = revealed_by(clients, CONTEXT, frozenset(masked))
    assert {name: sorted(of_client.own) for name, of_client in seeds.items()} == {name: ["x"] for name in masked}
    assert all(
        {key: list(pairs) for key, pairs in of_client.pairs.items()} == {"x": ["cleo"]} for of_client in seeds.values()
    )
    assert set(open_sums(announcement, masked, frozenset(masked), seeds, 3)) == {"x"}


def test_a_masked_value_alone_is_noise(tmp_path: Path) -> None:
    """10,000 zeros, masked: their mean and their single bits are those of random integers."""
    clients = participants(tmp_path)
    zeros = {name: {"x": np.zeros(10_000)} for name in NAMES}
    announcement = announced(clients, {"x": NAMES}, CONTEXT)
    masked = clients["ann"].mask(announcement, zeros["ann"])["x"]
    assert abs(masked.mean() / 2**32 - 0.5) < 0.02
    bits = np.unpackbits(masked.view(np.uint8)).reshape(-1, 32).mean(0)
    assert np.abs(bits - 0.5).max() < 0.03


def test_an_old_rounds_value_is_noise_in_a_later_sum(tmp_path: Path) -> None:
    clients, values = participants(tmp_path), random_values({"x": NAMES}, 3, 1000)
    old = announced(clients, {"x": NAMES}, CONTEXT)
    before = clients["ann"].mask(old, values["ann"])
    context = CONTEXT._replace(round=5)
    announcement = announced(clients, {"x": NAMES}, context)
    masked = {name: client.mask(announcement, values[name]) for name, client in clients.items()}
    seeds = revealed_by(clients, context, frozenset(NAMES))
    expected = plain_sum(values, "x", NAMES)
    assert open_sums(announcement, masked, frozenset(NAMES), seeds, 3)["x"].total.tolist() == expected.tolist()
    replayed = open_sums(announcement, {**masked, "ann": before}, frozenset(NAMES), seeds, 3)["x"].total
    assert (replayed == expected).mean() < 0.01
    assert np.abs(decode(replayed)).mean() > 500, "numbers from the complete range, not sums of five updates"


def test_fixed_point_by_hand() -> None:
    values = np.array([0.0, 1.0, -1.0, 2.0**-20, 2.0**-21 * 1.01, 7.0, -np.inf])
    encoded = encode(values, 2.0)
    assert encoded.words.tolist() == [0, 2**20, 2**32 - 2**20, 1, 1, 2**21, 2**32 - 2**21]
    assert encoded.clipped == 2
    assert decode(encoded.words).tolist() == [0.0, 1.0, -1.0, 2.0**-20, 2.0**-20, 2.0, -2.0]
    with pytest.raises(SecureAggregationError, match="NaN"):
        encode(np.array([1.0, np.nan]), 2.0)


@pytest.mark.parametrize("clip", [0.999, 16.0, 500.0])
def test_the_largest_sum_does_not_wrap(clip: float) -> None:
    """As many clients as fit under 2048 / clip, all at the bound, on either side."""
    clients = int(2047 / clip)
    for side in (1.0, -1.0):
        word = encode(np.full(1, side * clip * 3), clip).words
        assert decode(np.multiply(word, np.uint32(clients)))[0] == pytest.approx(side * clients * clip, rel=1e-6)


def test_pairs_derive_the_same_secret_and_no_other(tmp_path: Path) -> None:
    """The secret depends on both keys, both names and the exchange; the seed also on the tensor."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    first, second = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    publics = [key.public_key().public_bytes_raw() for key in (first, second)]
    secret = pair_secret(first, publics[1], ("ann", "bob"), CONTEXT)
    assert secret == pair_secret(second, publics[0], ("bob", "ann"), CONTEXT)
    others = [
        pair_secret(first, publics[1], ("ann", "cleo"), CONTEXT),
        *(
            pair_secret(first, publics[1], ("ann", "bob"), context)
            for context in (CONTEXT._replace(run="r"), CONTEXT._replace(round=5), CONTEXT._replace(exchange=1))
        ),
    ]
    seeds = {secret, *others, seed_of(secret, "x"), seed_of(secret, "y")}
    assert len(seeds) == 7
    assert sign_of("ann", "bob") == -sign_of("bob", "ann") == 1
    assert stream(seed_of(secret, "x"), 5).tolist() == stream(seed_of(secret, "x"), 8)[:5].tolist()
