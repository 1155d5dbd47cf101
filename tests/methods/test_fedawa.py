"""FedAWA: the objective, a step of Adam on the clients' logits and the weighted average by hand; a poisoned client."""

import itertools
from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from tests.methods.bundled_rounds import BundledRounds, Replies
from tests.methods.by_hand import client, driven, full
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.record import Nothing
from fedamole.methods.fedawa import FedAwa, WeightedLora, change_products, factor_products, objective
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.params import Adapter

SHAPES = {"m": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
A, B = "m/shared/A", "m/shared/B"


def lora(value: float, module: str = "m") -> dict[str, Tensor]:
    return {f"{module}/shared/A": full(value, 1, 2), f"{module}/shared/B": full(-value, 2, 1)}


def products(*vectors: tuple[float, ...]) -> Tensor:
    """Inner products of w, tau_1, ..., of one group."""
    rows = torch.tensor(vectors, dtype=torch.float64)
    return (rows @ rows.T)[None]


def probabilities(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


OPPOSED = products((0.0, 0.0), (1.0, 0.0), (1.0, 0.0), (-1.0, 0.0))
"""w = 0, so that all cosines are 0; two clients agree and the third moves the other way."""


def test_the_gradient_by_hand() -> None:
    """With equal weights the mean is (1/3, 0), the distances are 2/3, 2/3, 4/3.

    dL/dp_k = distance_k + sum_j p_j d(distance_j)/dp_k = 1/3, 1/3, 5/3, and 1 for each cosine of 0. Through the
    softmax it is -4/27, -4/27, 8/27.
    """
    p = probabilities(1 / 3, 1 / 3, 1 / 3).requires_grad_()
    objective(OPPOSED, p, 1.0).backward()
    assert p.grad is not None
    assert (p.grad - 1).flatten().tolist() == pytest.approx([1 / 3, 1 / 3, 5 / 3])
    logits = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    objective(OPPOSED, logits.softmax(0), 1.0).backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([-4 / 27, -4 / 27, 8 / 27])


def test_the_first_step_of_adam_is_the_learning_rate() -> None:
    zeros = torch.zeros(3, 1, dtype=torch.float64)
    once = FedAwa().step(zeros, OPPOSED)
    assert once.flatten().tolist() == pytest.approx([1e-3, 1e-3, -1e-3], rel=1e-5)
    twice = FedAwa(weight_steps=2).step(zeros, OPPOSED)
    assert twice.flatten().tolist() == pytest.approx([2e-3, 2e-3, -2e-3], rel=1e-3)
    assert not zeros.any(), "the logits that came in are left as they are"


@pytest.mark.parametrize(("update_weight", "value"), [(0.0, 0.75), (1.0, 0.75 + 0.75 * 0.5**0.5), (2.0, 1.810660)])
def test_cosines_and_distances_by_hand(update_weight: float, value: float) -> None:
    """w = (1, 0), w_1 = w, w_2 = (0, 1): cosines 1 and 0. With p = 1/4, 3/4 the mean of (0, 0) and (-1, 1) is
    (-3/4, 3/4), the distances are sqrt(9/8) and sqrt(1/8): 1/4 sqrt(9/8) + 3/4 sqrt(1/8) = 0.75 sqrt(1/2).
    """
    inner = products((1.0, 0.0), (0.0, 0.0), (-1.0, 1.0))
    assert float(objective(inner, probabilities(0.25, 0.75), update_weight)) == pytest.approx(value)


def test_the_cosine_is_that_of_the_parameters_not_of_the_vectors() -> None:
    """w = (1, 0), w_1 = w, w_2 = (3, 4): cosines 1 and 3/5."""
    inner = products((1.0, 0.0), (0.0, 0.0), (2.0, 4.0))
    assert float(objective(inner, probabilities(0.5, 0.5), 0.0)) == pytest.approx(0.5 * 0.4)


@pytest.mark.parametrize(("update_weight", "signs"), [(0.0, [1, -1, -1]), (10.0, [-1, 1, 1])])
def test_both_terms_move_the_logits(update_weight: float, signs: list[int]) -> None:
    """The first client stays at w, so that its cosine is 1; the two others agree, so that it is far from the mean."""
    inner = products((1.0, 0.0), (0.0, 0.0), (0.0, 1.0), (0.0, 1.0))
    logits = FedAwa(update_weight=update_weight).step(torch.zeros(3, 1, dtype=torch.float64), inner)
    assert logits.sign().flatten().tolist() == signs


def test_products_are_those_of_the_vectors() -> None:
    """Three clients with two modules of rank 2; the reference forms every change in full."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> dict[str, Tensor]:
        return {
            f"{module}/shared/{factor}": torch.randn(*shape, generator=generator)
            for module, d_out in (("m", 4), ("n", 3))
            for factor, shape in (("A", (2, 5)), ("B", (d_out, 2)))
        }

    before, after = draw(), [draw() for _ in range(3)]
    for modules in (["m", "n"], ["n"]):

        def change(tensors: dict[str, Tensor], modules: list[str] = modules) -> Tensor:
            pairs = [(tensors[f"{m}/shared/B"].double(), tensors[f"{m}/shared/A"].double()) for m in modules]
            return torch.cat([(1.5 * b @ a).flatten() for b, a in pairs])

        def factors(tensors: dict[str, Tensor], modules: list[str] = modules) -> Tensor:
            return torch.cat([tensors[f"{m}/shared/{f}"].double().flatten() for m in modules for f in "AB"])

        for vector, result in (
            (change, change_products(before, after, modules, 1.5)),
            (factors, factor_products(before, after, modules)),
        ):
            rows = torch.stack([vector(before), *(vector(tensors) - vector(before) for tensors in after)])
            torch.testing.assert_close(result, rows @ rows.T)


def aggregated(method: FedAwa, state: WeightedLora, server: Server = SERVER, **values: float) -> WeightedLora:
    return method.aggregate(server, state, {name: SharedTensors(lora(value)) for name, value in values.items()})


START = WeightedLora(lora(0.0), {})


def test_the_weighted_average_by_hand() -> None:
    """A step of ln 2 gives the logits ln 2, ln 2, -ln 2 and the weights 4/9, 4/9, 1/9: (4 + 4 - 1) / 9 = 7/9."""
    after = aggregated(FedAwa(weight_learning_rate=log(2)), START, a=1.0, b=1.0, c=-1.0)
    torch.testing.assert_close(after.tensors[A], full(7 / 9, 1, 2))
    torch.testing.assert_close(after.tensors[B], full(-7 / 9, 2, 1))
    assert {name: float(logit) for name, logit in after.logits.items()} == pytest.approx(
        {"a": log(2), "b": log(2), "c": -log(2)}
    )


def test_by_examples() -> None:
    """The weights start at 10, 30 and 20 of 60 examples: (1 * 10 + 2 * 30 + 6 * 20) / 60 = 19/6."""
    after = aggregated(FedAwa(weight_learning_rate=1e-9, weighting="examples"), START, a=1.0, b=2.0, c=6.0)
    torch.testing.assert_close(after.tensors[A], full(19 / 6, 1, 2))


def test_who_is_absent_keeps_its_logit_and_who_is_new_starts_at_0() -> None:
    method = FedAwa(weight_learning_rate=0.1)
    state = WeightedLora(lora(0.0), {"a": torch.tensor([3.0]).double(), "b": torch.tensor([2.0]).double()})
    after = aggregated(method, state, b=1.0, c=-1.0)
    assert sorted(after.logits) == ["a", "b", "c"]
    assert float(after.logits["a"]) == 3.0
    assert float(after.logits["b"]) == pytest.approx(2.1, abs=1e-6)
    assert float(after.logits["c"]) == pytest.approx(-0.1, abs=1e-6)


def test_equal_replies_and_a_single_reply_move_nothing() -> None:
    for values in ({"a": 1.5, "b": 1.5, "c": 1.5}, {"b": 1.5}):
        after = aggregated(FedAwa(weight_learning_rate=0.1), START, SERVER, **values)
        assert after.tensors[A].tolist() == [[1.5, 1.5]]
        assert all(abs(float(logit)) < 1e-3 for logit in after.logits.values())


def test_modules_may_have_weights_of_their_own() -> None:
    """c moves the other way in m, a in n: only there each loses weight. One set of weights favours b alone."""
    shapes = {"m": (2, 2), "n": (2, 2)}
    server = Server(BaseInfo(shapes), INFOS, seed=0)
    moves = {"a": (1.0, -1.0), "b": (1.0, 1.0), "c": (-1.0, 1.0)}
    replies = {name: SharedTensors({**lora(m), **lora(n, "n")}) for name, (m, n) in moves.items()}
    start = WeightedLora({**lora(0.0), **lora(0.0, "n")}, {})
    apart = FedAwa(weight_learning_rate=log(2), per_module=True).aggregate(server, start, replies)
    assert apart.logits["a"].tolist() == pytest.approx([log(2), -log(2)])
    assert apart.logits["c"].tolist() == pytest.approx([-log(2), log(2)])
    torch.testing.assert_close(apart.tensors[A], full(7 / 9, 1, 2))
    torch.testing.assert_close(apart.tensors["n/shared/A"], full(7 / 9, 1, 2))
    together = FedAwa(weight_learning_rate=log(2)).aggregate(server, start, replies)
    assert {name: float(logit) for name, logit in together.logits.items()} == pytest.approx(
        {"a": -log(2), "b": log(2), "c": -log(2)}
    )


def test_two_spaces_tell_different_clients_apart() -> None:
    """A and B of c are both negated: as a change it is that of a and b, as factors it is their opposite."""
    state = WeightedLora({A: full(0.0, 1, 2), B: full(0.0, 2, 1)}, {})
    factors, change = (
        aggregated(FedAwa(rank=1, space=space, weight_learning_rate=0.1), state, a=1.0, b=1.0, c=-1.0)
        for space in ("factors", "change")
    )
    assert float(factors.logits["c"]) == pytest.approx(-0.1, abs=1e-6)
    assert abs(float(change.logits["c"])) < 1e-3


def test_no_client_exceeds_the_largest_share_of_a_deployment() -> None:
    """Logits of 9, 0, 0 would give a nearly everything; at most 0.5 leaves 0.25 for each other one."""
    state = WeightedLora(lora(0.0), {"a": torch.tensor([9.0]).double()})
    method, server = FedAwa(weight_learning_rate=1e-6), replace(SERVER, max_weight_share=0.5)
    after = aggregated(method, state, server, a=1.0, b=2.0, c=4.0)
    torch.testing.assert_close(after.tensors[A], full(0.5 + 0.25 * 6, 1, 2))


def test_clients_train_and_are_scored_as_with_fedit() -> None:
    method, state = FedAwa(rank=1), WeightedLora(lora(4.0), {})
    message = method.message(state, INFOS[0])
    (request,), (_, reply, _) = driven(method.update(client(SHAPES), Nothing(), message), lora(9.0))
    assert request.adapter.tensors[A].tolist() == [[4.0, 4.0]]
    assert (request.step_fraction, request.adapter.frozen, request.penalty) == (1.0, (), None)
    assert reply.tensors[A].tolist() == [[9.0, 9.0]]
    model = method.personal(client(SHAPES), Nothing(), message, Adapter(method.spec(), lora(9.0)))
    assert model is not None
    assert model.tensors[A].tolist() == [[4.0, 4.0]]
    assert method.evaluates == "post_aggregation"


@pytest.mark.parametrize(
    ("field", "wrong", "message"),
    [
        ("weight_learning_rate", 0.0, "must be above 0 and at most 10"),
        ("weight_learning_rate", float("nan"), "must be above 0 and at most 10"),
        ("weight_learning_rate", 11.0, "must be above 0 and at most 10"),
        ("weight_steps", 0, "must be at least 1"),
        ("update_weight", -0.5, "must not be negative"),
    ],
)
def test_invalid_values_are_refused(field: str, wrong: float, message: str) -> None:
    with pytest.raises(ConfigError, match=f"method.{field} = {wrong}: {message}"):
        FedAwa(**dict[str, Any]({field: wrong}))
    assert FedAwa(update_weight=0.0).update_weight == 0.0


POISONED = "shop_house"
"""A client whose reply has B negated, so that its change B A undoes what it has learned."""


def poisoned(replies: Replies) -> Replies:
    tensors = replies[POISONED].tensors
    negated = {key: -tensor if key.endswith("/B") else tensor for key, tensor in tensors.items()}
    return {**replies, POISONED: SharedTensors(negated)}


FEW = ("training.local_steps=3", "method.rank=4")


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> BundledRounds:
    clients = ("bank_city", "hospital_north", POISONED, "weather_coast")
    return BundledRounds(tmp_path_factory.mktemp("fedawa"), clients)


@pytest.fixture(scope="module")
def even(rounds: BundledRounds) -> dict[str, float]:
    """Validation losses with equal weights."""
    return rounds("fedit", *FEW, rounds=6, changed=poisoned)


@pytest.mark.parametrize("space", ["factors", "change"])
def test_a_poisoned_client_loses_weight_every_round(rounds: BundledRounds, even: dict[str, float], space: str) -> None:
    """Four clients of the bundled task: after six rounds its share is below 60 % of an even share, and the loss of
    the others is below that of FedIT.
    """
    shares = [0.25]

    def record(state: WeightedLora) -> None:
        names = sorted(state.logits)
        weights = torch.stack([state.logits[name] for name in names]).softmax(0)
        shares.append(float(weights[names.index(POISONED)]))

    own = ("method.weight_learning_rate=0.1", f"method.space={space}")
    losses = rounds("fedawa", *FEW, *own, rounds=6, changed=poisoned, after_round=record)
    assert len(shares) == 7
    assert all(after < before for before, after in itertools.pairwise(shares))
    assert shares[-1] < 0.6 * 0.25
    honest = sorted(set(losses) - {POISONED})
    assert sum(losses[name] for name in honest) < sum(even[name] for name in honest)
