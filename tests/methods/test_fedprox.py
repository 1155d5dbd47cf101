"""FedProx: FedIT's round by hand, and the term that holds the clients near the global LoRA."""

from typing import Any

import pytest
import torch
from tests.methods.by_hand import client, driven, full

from fedamole.errors import ConfigError
from fedamole.experiment import prepare
from fedamole.federation.local import LocalTask, fit
from fedamole.federation.method import BaseInfo, ClientInfo, Server, TrainingRequest
from fedamole.federation.penalties import Proximal
from fedamole.federation.record import Nothing
from fedamole.methods.fedprox import FedProx
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.bank import Bank
from fedamole.model.params import Adapter, new_shared

SHAPES = {"m": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
A, B = "m/shared/A", "m/shared/B"


def lora(value: float) -> SharedTensors:
    return SharedTensors({A: full(value, 1, 2), B: full(-value, 2, 1)})


def test_everything_trains_near_what_was_sent() -> None:
    """Sent A = 2, B = -2; trained to A = 5: that goes up, nothing is kept, and the centre stays what was sent."""
    sent = lora(2.0)
    work = FedProx(rank=1, proximal=0.3).update(client(SHAPES), Nothing(), sent)
    (request,), (client_state, reply, trained) = driven(work, {A: full(5.0, 1, 2)})
    assert request.step_fraction == 1.0
    assert request.adapter.frozen == ()
    assert isinstance(request.penalty, Proximal)
    assert request.adapter.tensors.keys() == request.penalty.anchor.keys() == {A, B}
    for name in (A, B):
        assert torch.equal(request.adapter.tensors[name], sent.tensors[name])
        assert torch.equal(request.penalty.anchor[name], lora(2.0).tensors[name])
    assert request.penalty.weight == 0.3
    assert client_state == Nothing()
    assert torch.equal(reply.tensors[A], full(5.0, 1, 2))
    assert torch.equal(reply.tensors[B], full(-2.0, 2, 1))
    assert torch.equal(trained.adapter.tensors[A], reply.tensors[A])


@pytest.mark.parametrize(
    ("weighting", "answered", "mean"),
    [
        ("uniform", "abc", 4.0),  # (2 + 3 + 7) / 3
        ("uniform", "bc", 5.0),  # (3 + 7) / 2
        ("examples", "abc", 25 / 6),  # (10 * 2 + 30 * 3 + 20 * 7) / 60
        ("examples", "bc", 4.6),  # (30 * 3 + 20 * 7) / 50
    ],
)
def test_the_average_by_hand(weighting: Any, answered: str, mean: float) -> None:
    replies = {name: lora(value) for name, value in (("a", 2.0), ("b", 3.0), ("c", 7.0)) if name in answered}
    after = FedProx(weighting=weighting).aggregate(SERVER, lora(100.0), replies)
    torch.testing.assert_close(after.tensors[A], full(mean, 1, 2))
    torch.testing.assert_close(after.tensors[B], full(-mean, 2, 1))


def test_the_personal_model_is_the_average() -> None:
    method = FedProx(rank=1)
    mine = Adapter(method.spec(), lora(9.0).tensors)
    result = method.personal(client(SHAPES), Nothing(), method.message(lora(4.0), INFOS[0]), mine)
    assert result is not None
    assert torch.equal(result.tensors[A], full(4.0, 1, 2))
    assert method.evaluates == "post_aggregation"


@pytest.fixture(scope="module")
def training(runs: Any) -> Any:
    """`training(fit)`: what one real step makes of a client's LoRA, and the gradient that it followed."""
    prepared = prepare(runs.load("fedprox", "training.local_steps=1"))
    bank, rows = Bank(prepared.base), prepared.clients["mood"].train.pairs()

    def train(request: TrainingRequest) -> Any:
        (done,) = fit(bank, [LocalTask("mood", request, rows, 0.01)], prepared.config.training, seed=0, round_=0)
        return done, bank.store.gradients[0].clone(), bank.store.row

    return bank.base.shapes, train


def test_the_term_adds_mu_times_the_distance_to_the_gradient(training: Any) -> None:
    """d/dw of mu / 2 |w - anchor|^2 is mu (w - anchor): with w - anchor = -1 in A, 0.5 in B and mu = 3, -3 and 1.5."""
    shapes, train = training
    method = FedProx(rank=2, alpha=4.0, dropout=0.0)
    start = new_shared(shapes, 2, torch.Generator().manual_seed(0))
    start = {name: tensor + 0.1 for name, tensor in start.items()}
    apart = {name: full(-1.0 if name.endswith("/A") else 0.5, *tensor.shape) for name, tensor in start.items()}
    anchor = {name: start[name] - apart[name] for name in start}
    adapter = Adapter(method.spec(), start)
    _, plain, _ = train(TrainingRequest(adapter))
    _, held, row = train(TrainingRequest(adapter, penalty=Proximal(anchor, 3.0)))
    assert plain.abs().max() > 1e-4
    torch.testing.assert_close(held - plain, 3 * row(0, apart), rtol=0, atol=1e-5)


def test_a_strong_term_leads_back_to_the_anchor(training: Any) -> None:
    """Adam's first step is the learning rate, 0.01, against the gradient's sign: here towards the anchor."""
    shapes, train = training
    start = {name: tensor + 0.1 for name, tensor in new_shared(shapes, 2, torch.Generator().manual_seed(0)).items()}
    anchor = {name: tensor + (1.0 if name.endswith("/A") else -1.0) for name, tensor in start.items()}
    done, _, _ = train(TrainingRequest(Adapter(FedProx(rank=2).spec(), start), penalty=Proximal(anchor, 1e6)))
    for name, tensor in start.items():
        expected = tensor + (0.01 if name.endswith("/A") else -0.01)
        torch.testing.assert_close(done.adapter.tensors[name], expected, rtol=0, atol=1e-5)


def test_without_the_term_it_is_fedit(runs: Any) -> None:
    first, other = runs("fedprox", "method.proximal=0"), runs("fedit")
    for folder in (first, other):
        assert len(list(folder.glob("clients/*/adapter/adapter_model.safetensors"))) == 4
    for path in first.glob("clients/*/adapter/adapter_model.safetensors"):
        assert path.read_bytes() == (other / path.relative_to(first)).read_bytes()


@pytest.mark.parametrize(("values", "message"), [({"proximal": -0.1}, "method.proximal = -0.1"), ({"rank": 0}, "rank")])
def test_invalid_values_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FedProx(**values)
    assert FedProx(proximal=0.0).proximal == 0.0
