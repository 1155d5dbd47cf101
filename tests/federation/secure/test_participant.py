"""What a client refuses: small groups, foreign keys, two lists of survivors, old messages, a second sum."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from tests.federation.secure.clients import CONTEXT, HOLDERS, NAMES, announced, key_of, participants, random_values

from fedamole.federation.secure.journal import Journal
from fedamole.federation.secure.participant import Participant
from fedamole.federation.secure.statements import (
    Advertisement,
    Announcement,
    Group,
    SecureAggregationError,
    advertisement_bytes,
    sign,
)

VALUES = random_values(HOLDERS, 5)
EVERYBODY = frozenset(NAMES)


def masked_by(clients: Mapping[str, Participant], announcement: Announcement) -> None:
    for name in clients:
        clients[name].mask(announcement, VALUES[name])


def with_group(announcement: Announcement, key: str, *holders: str) -> Announcement:
    return dataclasses.replace(announcement, groups={**announcement.groups, key: Group(holders, False)})


@pytest.mark.parametrize(
    ("holders", "message"),
    [
        (("ann", "bob"), "y: a group of 2 clients, but this client accepts 3 or more"),
        (("ann", "ann", "bob"), "y: the holders are not in order, or one is named twice"),
        (("cleo", "bob", "ann"), "y: the holders are not in order"),
        (("ann", "bob", "mallory"), "y: no public key of holder 'mallory' was announced"),
        (("dan", "bob"), "y: the holders are not in order"),
        (("bob", "dan"), "y: a group of 2 clients"),
    ],
)
def test_a_group_that_hides_nothing_is_refused(holders: tuple[str, ...], message: str, tmp_path: Path) -> None:
    clients = participants(tmp_path)
    announcement = with_group(announced(clients, HOLDERS, CONTEXT), "y", *holders)
    with pytest.raises(SecureAggregationError, match=message):
        clients["ann"].mask(announcement, VALUES["ann"])


def test_a_client_is_no_holder_of_what_it_does_not_have(tmp_path: Path) -> None:
    clients = participants(tmp_path)
    announcement = with_group(announced(clients, HOLDERS, CONTEXT), "y", "ann", "bob", "dan")
    with pytest.raises(SecureAggregationError, match="y: this client is named as a holder, but it has no such tensor"):
        clients["dan"].mask(announcement, VALUES["dan"])


def test_the_minimum_of_a_client_is_its_own(tmp_path: Path) -> None:
    """The server announces groups of three; a client that wants five refuses. Less than three is no minimum."""
    clients = participants(tmp_path, min_group=5)
    announcement = announced(clients, HOLDERS, CONTEXT)
    with pytest.raises(SecureAggregationError, match="y: a group of 3 clients, but this client accepts 5 or more"):
        clients["ann"].mask(announcement, VALUES["ann"])
    with pytest.raises(SecureAggregationError, match="groups of 2 clients hide nothing"):
        participants(tmp_path, min_group=2)


def forged(name: str, as_name: str, key: ec.EllipticCurvePrivateKey, public: bytes = bytes(range(32))) -> Advertisement:
    return Advertisement(as_name, public, sign(key, advertisement_bytes(CONTEXT, name, public)))


def test_clients_that_the_server_invents_are_refused(tmp_path: Path) -> None:
    """A key for another name, a new name, a key signed by nobody, one of another round, one with a known secret."""
    clients = participants(tmp_path)
    announcement = announced(clients, HOLDERS, CONTEXT)
    own = dict(announcement.advertisements)
    older = participants(tmp_path)["bob"].advertise(CONTEXT._replace(round=3))
    for replaced, message in (
        (
            {**own, "mallory": forged("mallory", "mallory", key_of("mallory"))},
            "'mallory' is not on this client's roster",
        ),
        ({**own, "bob": forged("bob", "bob", key_of("mallory"))}, "public key: client 'bob' did not sign this"),
        ({**own, "bob": own["cleo"]}, "the key of 'bob' was announced for another client"),
        ({**own, "bob": older}, "public key: client 'bob' did not sign this; .* or repeats an old message"),
        (
            {**own, "bob": forged("bob", "bob", key_of("bob"), bytes(32))},
            "an announced public key is not one of X25519",
        ),
        ({**own, "ann": own["bob"]}, "does not have this client's key of this exchange"),
    ):
        other = dataclasses.replace(announcement, advertisements=replaced)
        with pytest.raises(SecureAggregationError, match=message):
            clients["ann"].mask(other, VALUES["ann"])


def test_values_are_masked_once_and_in_order(tmp_path: Path) -> None:
    clients = participants(tmp_path)
    with pytest.raises(SecureAggregationError, match="this client is not in that exchange"):
        clients["ann"].confirm(CONTEXT, EVERYBODY)
    announcement = announced(clients, HOLDERS, CONTEXT)
    with pytest.raises(SecureAggregationError, match="came before the values were masked"):
        clients["ann"].confirm(CONTEXT, EVERYBODY)
    with pytest.raises(SecureAggregationError, match="before a list of survivors was confirmed"):
        clients["ann"].reveal(CONTEXT, {})
    clients["ann"].mask(announcement, VALUES["ann"])
    with pytest.raises(SecureAggregationError, match="the same masks never serve twice"):
        clients["ann"].mask(announcement, VALUES["ann"])
    with pytest.raises(SecureAggregationError, match="belongs to another run"):
        clients["ann"].advertise(CONTEXT._replace(run="other"))


def test_a_client_confirms_a_single_list_that_has_it(tmp_path: Path) -> None:
    clients = participants(tmp_path)
    announcement = announced(clients, HOLDERS, CONTEXT)
    masked_by(clients, announcement)
    with pytest.raises(SecureAggregationError, match="the list of survivors lacks this client"):
        clients["ann"].confirm(CONTEXT, EVERYBODY - {"ann"})
    with pytest.raises(SecureAggregationError, match="names 'mallory', who was not announced"):
        clients["ann"].confirm(CONTEXT, EVERYBODY | {"mallory"})
    clients["ann"].confirm(CONTEXT, EVERYBODY)
    clients["ann"].confirm(CONTEXT, EVERYBODY)  # the answer was lost on its way
    with pytest.raises(SecureAggregationError, match="two different lists of survivors"):
        clients["ann"].confirm(CONTEXT, EVERYBODY - {"eve"})


def test_two_different_lists_are_detected_before_any_seed_leaves(tmp_path: Path) -> None:
    """The server tells ann that eve is lost, and all others that she is not: it would get both masks of eve."""
    clients = participants(tmp_path)
    masked_by(clients, announced(clients, HOLDERS, CONTEXT))
    without = EVERYBODY - {"eve"}
    signatures = {name: clients[name].confirm(CONTEXT, without if name == "ann" else EVERYBODY) for name in NAMES}
    for name in NAMES:
        with pytest.raises(SecureAggregationError, match="did not sign this; the server shows different things"):
            clients[name].reveal(CONTEXT, signatures)
    del signatures["ann"]
    with pytest.raises(SecureAggregationError, match="survivors' list: the signature of 'ann' is missing"):
        clients["bob"].reveal(CONTEXT, signatures)
    assert not list(tmp_path.iterdir()), "nothing was revealed, so the journals are empty"


def test_two_different_announcements_are_detected_before_any_seed_leaves(tmp_path: Path) -> None:
    """ann is shown other holders of x than the others are."""
    clients = participants(tmp_path)
    announcement = announced(clients, HOLDERS, CONTEXT)
    other = with_group(announcement, "x", "ann", "bob", "cleo")
    for name in NAMES:
        clients[name].mask(other if name == "ann" else announcement, VALUES[name])
    signatures = {name: clients[name].confirm(CONTEXT, EVERYBODY) for name in NAMES}
    for name in NAMES:
        with pytest.raises(SecureAggregationError, match="did not sign this"):
            clients[name].reveal(CONTEXT, signatures)


def test_signatures_of_an_older_round_are_refused(tmp_path: Path) -> None:
    clients = participants(tmp_path)
    masked_by(clients, announced(clients, HOLDERS, CONTEXT))
    old = {name: client.confirm(CONTEXT, EVERYBODY) for name, client in clients.items()}
    later = CONTEXT._replace(round=5)
    masked_by(clients, announced(clients, HOLDERS, later))
    for client in clients.values():
        client.confirm(later, EVERYBODY)
    with pytest.raises(SecureAggregationError, match="repeats an old message"):
        clients["ann"].reveal(later, old)
    with pytest.raises(SecureAggregationError, match="round 4, exchange 0: this client is not in that exchange"):
        clients["ann"].reveal(CONTEXT, old)


def test_a_client_that_was_killed_reveals_nothing_and_opens_no_second_sum(tmp_path: Path) -> None:
    """Restarted before it revealed, it may begin anew, with other keys; after it revealed, it takes part no more."""
    clients = participants(tmp_path)
    masked_by(clients, announced(clients, HOLDERS, CONTEXT))
    signatures = {name: client.confirm(CONTEXT, EVERYBODY) for name, client in clients.items()}
    restarted = participants(tmp_path)["eve"]
    with pytest.raises(SecureAggregationError, match="or the client was restarted"):
        restarted.reveal(CONTEXT, signatures)
    assert restarted.advertise(CONTEXT).public != clients["eve"].advertise(CONTEXT).public
    clients["ann"].reveal(CONTEXT, signatures)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ann.jsonl"]
    for ann in (clients["ann"], participants(tmp_path)["ann"]):
        with pytest.raises(SecureAggregationError, match="is in a sum that was opened already"):
            ann.advertise(CONTEXT)
        ann.advertise(CONTEXT._replace(exchange=1))


def test_the_journal_is_on_disk_before_a_seed_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = participants(tmp_path)
    masked_by(clients, announced(clients, HOLDERS, CONTEXT))
    signatures = {name: client.confirm(CONTEXT, EVERYBODY) for name, client in clients.items()}

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        clients["ann"].reveal(CONTEXT, signatures)


def test_a_journal_that_is_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ann.jsonl"
    journal = Journal(path)
    journal.record(CONTEXT)
    assert path.stat().st_mode & 0o777 == 0o600
    complete = path.read_text()
    path.write_text(complete + complete[:9])  # killed while the second line was written
    again = Journal(path)
    with pytest.raises(SecureAggregationError, match="opened already"):
        again.check_open(CONTEXT)
    again.record(CONTEXT._replace(round=5))
    assert len(Journal(path).revealed) == 2
    for damage in ("nonsense\n", "5\n", '{"run": "run"}\n'):
        path.write_text(damage)
        with pytest.raises(SecureAggregationError, match="is damaged, so this client cannot tell which sums"):
            Journal(path)


def test_numbers_above_the_clip_are_cut_and_counted(tmp_path: Path) -> None:
    clients = participants(tmp_path)
    announcement = announced(clients, HOLDERS, CONTEXT)
    clients["dan"].mask(announcement, {"x": np.array([9.0, -9.0, 1.0])})
    assert clients["dan"].clipped == 2
