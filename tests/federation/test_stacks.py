"""Changes of the base that add up exactly, whoever was absent when."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedamole.federation.method import ClientInfo
from fedamole.methods.shared.stacks import Changes, Log, Merged, stacked, truncated

SHAPES = {"m": (3, 4), "n": (2, 5)}
CLIENTS = tuple(ClientInfo(name, 1) for name in "abc")


def change(round_: int) -> dict[str, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(round_)
    return {
        module: {"A": torch.randn(2, d_in, generator=draw), "B": torch.randn(d_out, 2, generator=draw)}
        for module, (d_in, d_out) in SHAPES.items()
    }


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sets(st.sampled_from("abc"), min_size=1), max_size=6))
def test_everybody_ends_with_the_sum_of_all_changes(rounds: list[set[str]]) -> None:
    """In each round some clients merge what they are sent, answer, and a change is logged; some answers are lost."""
    log, kept = Log(Changes({})), {name: Merged.nothing(SHAPES) for name in "abc"}
    for number, present in enumerate(rounds):
        merged = {}
        for index, name in enumerate(sorted(present)):
            kept[name] = kept[name].merge(log.pending(name))
            if index or len(present) == 1:  # the first of several merges, but its answer never arrives
                merged[name] = kept[name].count
        log = log.add(change(number), merged, CLIENTS)
    for name in "abc":
        now = kept[name].merge(log.pending(name))
        assert now.count == len(rounds)
        for module in SHAPES:
            pairs = [change(number)[module] for number in range(len(rounds))]
            expected = sum((pair["B"] @ pair["A"] for pair in pairs), torch.zeros(SHAPES[module][::-1]))
            torch.testing.assert_close(now.deltas[f"{module}/delta"], expected, rtol=0, atol=1e-5)


def test_what_everybody_has_is_dropped_and_nothing_else() -> None:
    log = Log(Changes({})).add(change(0), {}, CLIENTS).add(change(1), {"a": 1, "b": 1}, CLIENTS)
    assert set(log.changes.factors) == {"0", "1"}
    log = log.add(change(2), {"a": 2, "c": 1}, CLIENTS)
    assert set(log.changes.factors) == {"1", "2"}
    assert set(log.pending("a").factors) == {"2"}
    assert set(log.pending("c").factors) == {"1", "2"}


def test_a_message_that_comes_late_takes_nothing_back() -> None:
    log = Log(Changes({})).add(change(0), {}, CLIENTS)
    late, log = log.pending("a"), log.add(change(1), {}, CLIENTS)
    now = Merged.nothing(SHAPES).merge(log.pending("a"))
    for again in (now.merge(late), now.merge(late).merge(log.pending("a"))):
        assert again.count == 2
        assert all(torch.equal(again.deltas[name], delta) for name, delta in now.deltas.items())


def test_a_stack_is_the_weighted_mean_of_the_products() -> None:
    """Weights 1 and 3: a quarter of one client's product, three quarters of the other's, of rank 2 though it has 1."""
    a = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[0.0, 4.0], [2.0, 0.0]])}
    b = {"a": torch.tensor([[4.0], [0.0]]), "b": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}
    replies = {name: {"A": a[name], "B": b[name]} for name in ("b", "a")}
    tall, wide = stacked(replies, {"a": 1.0, "b": 3.0}, ("A", "B"))
    assert tall.shape == (3, 2)
    # a: [[4, 8], [0, 0]] / 4 = [[1, 2], [0, 0]];  b: [[0, 4], [4, 0]] * 3 / 4 = [[0, 3], [3, 0]]
    assert (wide @ tall).tolist() == [[1.0, 5.0], [3.0, 0.0]]
    assert tall.tolist() == [[1.0, 2.0], [0.0, 4.0], [2.0, 0.0]], "by the clients' names, whoever answered first"


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 99))
def test_truncation_is_the_best_of_its_rank(rank: int, stack: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(stack, 5, generator=draw), torch.randn(4, stack, generator=draw)
    new_a, new_b = truncated(a, b, rank)
    assert new_a.shape == (rank, 5)
    assert new_b.shape == (4, rank)
    u, s, v = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    expected = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    torch.testing.assert_close((new_b @ new_a).double(), expected, rtol=0, atol=1e-4)
    alive = min(rank, 5)  # ranks beyond the product's have B = 0, and an A that can learn
    torch.testing.assert_close(new_a[:alive] @ new_a[:alive].T, torch.eye(alive), rtol=0, atol=1e-5)
    assert not new_b[:, min(rank, stack, 4) :].any()
