"""Products and sums by client against a plain loop over clients, in float64, with gradients."""

import pytest
import torch
from torch import Tensor

from fedamole.model.segments import Padding, Segments, add_product, expand, product, segment_sum

LENGTHS = [(4,), (3, 3, 3), (5, 1, 4), (2, 0, 3), (0, 0, 7), (3, 2, 0)]
every_shape = pytest.mark.parametrize("lengths", LENGTHS, ids=str)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def by_loop(x: Tensor, weights: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([rows @ weights[client] for client, rows in enumerate(x.split(lengths))])


def with_gradients(y: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad((y * drawn(*y.shape)).sum(), leaves)]


def through_padding(x: Tensor, weights: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """What a GPU does with unequal segments."""
    padding = Padding.of(lengths)
    return padding.unpad(torch.bmm(padding.pad(x), weights))


@every_shape
@pytest.mark.parametrize("padded", [False, True])
def test_product(lengths: tuple[int, ...], padded: bool) -> None:
    x, weights = drawn(sum(lengths), 5).requires_grad_(), drawn(len(lengths), 5, 6).requires_grad_()
    y = through_padding(x, weights, lengths) if padded else product(x, weights, Segments(lengths))
    for mine, theirs in zip(
        with_gradients(y, x, weights), with_gradients(by_loop(x, weights, lengths), x, weights), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


@every_shape
def test_add_product(lengths: tuple[int, ...]) -> None:
    rows, clients = sum(lengths), len(lengths)
    leaves = [drawn(*shape).requires_grad_() for shape in ((rows, 6), (rows, 5), (clients, 5, 6))]
    base, x, weights = leaves
    mine = with_gradients(add_product(base, x, weights, Segments(lengths), 2.5), *leaves)
    theirs = with_gradients(base + 2.5 * by_loop(x, weights, lengths), *leaves)
    for item, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(item, other, rtol=1e-13, atol=1e-13)


@every_shape
@pytest.mark.parametrize("more", [(), (3,), (2, 3)])
def test_segment_sum(lengths: tuple[int, ...], more: tuple[int, ...]) -> None:
    values = drawn(sum(lengths), *more).requires_grad_()
    mine = with_gradients(segment_sum(values, Segments(lengths)), values)
    theirs = with_gradients(torch.stack([part.sum(0) for part in values.split(lengths)]), values)
    for item, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(item, other, rtol=1e-13, atol=1e-13)


@every_shape
def test_expand(lengths: tuple[int, ...]) -> None:
    rows = drawn(len(lengths), 3).requires_grad_()
    mine = with_gradients(expand(rows, Segments(lengths)), rows)
    theirs = with_gradients(rows.repeat_interleave(torch.tensor(lengths), 0), rows)
    assert torch.equal(mine[0], theirs[0])
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-13, atol=1e-13)


@every_shape
def test_gradients_are_slopes(lengths: tuple[int, ...]) -> None:
    """Of the products that have a backward pass of their own, by differences."""
    x, weights = drawn(sum(lengths), 2).requires_grad_(), drawn(len(lengths), 2, 3).requires_grad_()
    segments = Segments(lengths)
    assert torch.autograd.gradcheck(lambda x, weights: product(x, weights, segments), (x, weights))
    assert torch.autograd.gradcheck(lambda x, weights: through_padding(x, weights, lengths), (x, weights))
    assert torch.autograd.gradcheck(lambda x: add_product(drawn(sum(lengths), 3), x, weights, segments, -0.5), (x,))


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    """Inputs of a first layer and weights of a frozen one need none."""
    segments, x, weights = Segments((2, 1)), drawn(3, 2), drawn(2, 2, 3)
    product(x, weights.requires_grad_(), segments).sum().backward()
    assert x.grad is None
    assert weights.grad is not None
    expected = torch.stack([x[:2].sum(0), x[2]])[:, :, None].expand(2, 2, 3)
    torch.testing.assert_close(weights.grad, expected)
    product(x.requires_grad_(), weights.detach(), segments).sum().backward()
    torch.testing.assert_close(x.grad, weights.detach().sum(2)[[0, 0, 1]])


def test_padding_by_hand() -> None:
    """Segments of 2, 3 and 1 rows in places of 3: padding repeats a segment's own last row."""
    padding = Padding.of((2, 3, 1))
    assert padding.longest == 3
    assert padding.source_index.tolist() == [0, 1, 1, 2, 3, 4, 5, 5, 5]
    assert padding.padded_index.tolist() == [0, 1, 3, 4, 5, 6]
    rows = torch.arange(6.0).unsqueeze(1)
    assert padding.pad(rows).squeeze(2).tolist() == [[0, 1, 1], [2, 3, 4], [5, 5, 5]]
    assert torch.equal(padding.unpad(padding.pad(rows)), rows)


def test_copies_that_are_padding_carry_no_gradient() -> None:
    """Row 5 stands three times in the padded tensor, its gradient is that of its first copy: 7, not 7 + 8 + 9."""
    rows = torch.arange(6.0).unsqueeze(1).requires_grad_()
    pull = torch.tensor([[1.0, 2, 9], [4, 5, 6], [7, 8, 9]])
    (Padding.of((2, 3, 1)).pad(rows).squeeze(2) * pull).sum().backward()
    assert rows.grad is not None
    assert rows.grad.flatten().tolist() == [1, 2, 4, 5, 6, 7]


def test_segments_of_sequences_scale_to_their_tokens() -> None:
    segments = Segments((2, 0, 1))
    assert segments.scaled_to(3) is segments
    assert segments.scaled_to(12).lengths == (8, 0, 4)
    assert segments.scaled_to(12) is segments.scaled_to(12)
    assert segments.counts.tolist() == [2, 0, 1]
    assert segments.owner.tolist() == [0, 0, 2]
    assert (segments.equal, Segments((2, 2)).equal, Segments((5,)).equal) == (False, True, True)
    with pytest.raises(ValueError, match="7 rows are not a multiple of 3"):
        segments.scaled_to(7)


@pytest.mark.parametrize("lengths", [(3, 3, 3), (5, 1, 4)])
@pytest.mark.parametrize("padded", [False, True])
def test_nan_stays_with_its_client(lengths: tuple[int, ...], padded: bool) -> None:
    """Client 1's rows and weights are NaN: outputs, sums and gradients of the others keep every bit."""
    segments, rows = Segments(lengths), sum(lengths)
    results = []
    for sick in (False, True):
        x, weights = drawn(rows, 5), drawn(3, 5, 6)
        if sick:
            x[lengths[0] : lengths[0] + lengths[1]], weights[1] = torch.nan, torch.nan
        x.requires_grad_(), weights.requires_grad_()
        y = through_padding(x, weights, lengths) if padded else product(x, weights, segments)
        z = add_product(y * 2, x, weights, segments, -1.5) * expand(weights[:, 0], segments)
        sums = segment_sum(z, segments)
        gradients = torch.autograd.grad((sums * drawn(3, 6)).sum(), (x, weights))
        results.append([y.split(lengths), sums.unbind(0), gradients[0].split(lengths), gradients[1].unbind(0)])
    for healthy, beside in zip(*results, strict=True):
        assert all(torch.equal(healthy[client], beside[client]) for client in (0, 2))
        assert beside[1].isnan().any()


def test_a_client_without_rows_adds_no_padding() -> None:
    """As a GPU does it, with client 0 NaN: nothing reaches the weights of client 1, who has no rows."""
    segments = Segments((3, 0, 2))
    x, weights = drawn(5, 4), drawn(3, 4, 6)
    x[:3] = torch.nan
    weights.requires_grad_()
    padding, present = segments.padding, [0, 2]
    y = padding.unpad(torch.bmm(padding.pad(x), weights[present]))
    assert torch.equal(y[3:], (x[3:] @ weights[2]))
    (gradient,) = torch.autograd.grad(y.sum(), weights)
    assert not gradient[1].any()
    assert torch.isfinite(gradient[2]).all()
