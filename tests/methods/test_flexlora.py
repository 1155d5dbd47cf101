"""FlexLoRA: the mean of the products, decomposed, each client at its own rank."""

import pytest
import torch
from tests.methods.by_hand import client, driven
from tests.training import lora_spec

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server, TrainingRequest
from fedamole.federation.record import Nothing
from fedamole.methods.flexlora import FlexLora, RankedLora, cut
from fedamole.methods.shared.averaging import SharedTensors

SHAPES = {"m": (2, 2)}
INFOS = (ClientInfo("a", 10), ClientInfo("b", 30), ClientInfo("c", 20))
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0)
A, B = "m/shared/A", "m/shared/B"


def test_the_mean_of_the_products_is_decomposed() -> None:
    """Products diag(4, 0) and [[0, 0], [0, 2]]: their mean is diag(2, 1), and its best rank 1 is diag(2, 0)."""
    method = FlexLora(rank=1, ranks=(1, 2))
    state = method.init(SERVER)
    reply = SharedTensors({A: torch.tensor([[2.0, 0.0]]), B: torch.tensor([[2.0], [0.0]])})
    other = SharedTensors({A: torch.tensor([[0.0, 1.0], [0.0, 0.0]]), B: torch.tensor([[0.0, 5.0], [2.0, 5.0]])})
    after = method.aggregate(SERVER, state, {"a": reply, "b": other})
    torch.testing.assert_close(after.tensors[B] @ after.tensors[A], torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    small = method.message(after, INFOS[0]).tensors
    torch.testing.assert_close(small[B] @ small[A], torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(small[A].norm(), torch.tensor(1.0))  # A = V^T, the size is in B
    assert len(method.message(after, INFOS[1]).tensors[A]) == 2


def test_by_examples() -> None:
    """10 and 30 examples: a quarter of 4 and three quarters of 8."""
    method = FlexLora(rank=1, ranks=(1,), weighting="examples")
    parts = {
        name: SharedTensors({A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[size], [0.0]])})
        for name, size in (("a", 4.0), ("b", 8.0))
    }
    after = method.aggregate(SERVER, method.init(SERVER), parts)
    assert float((after.tensors[B] @ after.tensors[A])[0, 0]) == pytest.approx(7.0)


def test_ranks_go_round_and_the_scaling_is_one() -> None:
    method = FlexLora(rank=4, alpha=8.0)
    state = method.init(SERVER)
    assert state.ranks == {"a": 2, "b": 4, "c": 8}
    adapters = [method.adapter(client(SHAPES), Nothing(), method.message(state, info)) for info in INFOS]
    specs = [lora_spec(adapter.spec) for adapter in adapters]
    assert [spec.rank for spec in specs] == [2, 4, 8]
    assert {spec.scaling for spec in specs} == {2.0}
    assert not state.tensors[B].any()
    with pytest.raises(ConfigError, match=r"method.ranks = \[0, 2\]: ranks must be at least 1"):
        FlexLora(ranks=(0, 2)).init(SERVER)


def test_cut_takes_the_first_ranks() -> None:
    full = {A: torch.arange(6.0).view(3, 2), B: torch.arange(6.0).view(2, 3)}
    part = cut(full, 2)
    assert part[A].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert part[B].tolist() == [[0.0, 1.0], [3.0, 4.0]]


def test_the_lora_at_the_clients_rank_is_trained_sent_and_scored() -> None:
    method, message = FlexLora(rank=1, alpha=3.0), SharedTensors({A: torch.ones(2, 2), B: torch.ones(2, 2)})
    work = method.update(client(SHAPES), Nothing(), message)
    (request,), (client_state, reply, _) = driven(work, {A: torch.full((2, 2), 7.0)})
    assert request == TrainingRequest(request.adapter)
    assert request.adapter.frozen == ()
    assert torch.equal(request.adapter.tensors[A], torch.ones(2, 2))
    assert client_state == Nothing()
    assert torch.equal(reply.tensors[A], torch.full((2, 2), 7.0))
    assert torch.equal(reply.tensors[B], torch.ones(2, 2))
    message = SharedTensors({A: torch.zeros(2, 2), B: torch.ones(2, 2)})
    model = method.personal(client(SHAPES), client_state, message, request.adapter)
    assert model is not None
    assert not model.tensors[A].any(), "what was sent after the aggregation"
    assert (lora_spec(model.spec).rank, lora_spec(model.spec).scaling) == (2, 3.0)


@pytest.mark.parametrize("answered", ["abc", "bc", "c"])
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_equals_the_decomposition_of_the_dense_mean(answered: str, weighting: str) -> None:
    """Ranks 1, 2 and 4 of two modules; each client's next LoRA is the best of its rank for the mean."""
    server = Server(BaseInfo({"m": (5, 6), "n": (4, 3)}), INFOS, seed=0)
    method = FlexLora(rank=2, weighting=weighting)  # type: ignore[arg-type]
    state, draw, weights = method.init(server), torch.Generator().manual_seed(0), server.weights(method.weighting)
    replies = {}
    for info in INFOS:
        sent = method.message(state, info).tensors
        trained = {name: torch.randn(tensor.shape, generator=draw) for name, tensor in sent.items()}
        replies.update({info.name: SharedTensors(trained)} if info.name in answered else {})
    after = method.aggregate(server, state, dict(reversed(replies.items())))
    assert after.ranks == state.ranks == {"a": 1, "b": 2, "c": 4}
    for module, (d_in, d_out) in server.shapes.items():
        a, b = f"{module}/shared/A", f"{module}/shared/B"
        assert after.tensors[a].shape == (4, d_in)
        assert after.tensors[b].shape == (d_out, 4)
        total = sum(weights[name] for name in answered)
        parts = [(weights[name] / total, replies[name].tensors) for name in answered]
        mean = sum(weight * part[b].double() @ part[a].double() for weight, part in parts)
        u, s, v = torch.linalg.svd(mean, full_matrices=False)
        for info, rank in zip(INFOS, (1, 2, 4), strict=True):
            sent = method.message(after, info).tensors
            result = (sent[b] @ sent[a]).double()
            torch.testing.assert_close(result, u[:, :rank] * s[:rank] @ v[:rank], rtol=0, atol=1e-5)


def test_what_is_sent_is_the_global_lora_cut() -> None:
    state = RankedLora({A: torch.arange(6.0).view(3, 2), B: torch.arange(6.0).view(2, 3)}, {"a": 1, "b": 3, "c": 2})
    assert FlexLora().message(state, INFOS[0]).tensors[A].tolist() == [[0.0, 1.0]]
    assert FlexLora().message(state, INFOS[2]).tensors[B].tolist() == [[0.0, 1.0], [3.0, 4.0]]
