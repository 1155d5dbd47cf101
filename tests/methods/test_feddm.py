"""FedDM: what a client asks for, sends and keeps, and what the server does with it, by hand and on real text."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.bundled_rounds import BundledRounds
from tests.methods.by_hand import full

from fedamole.deployment.security.policy import PolicySettings, row_checks, settings_checks
from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, Client, ClientInfo, Server, TrainingRequest, TrainingResult
from fedamole.federation.probe import DryProbe, ProbeCounts
from fedamole.federation.record import Nothing
from fedamole.federation.server_work import ServerWork
from fedamole.federation.synthesis_request import SynthesisRequest, SynthesisResult
from fedamole.methods.feddm import FedDm, within
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.params import VECTORS as TABLE
from fedamole.planning import planned
from fedamole.synthesis.examples import VECTORS, SyntheticExamples
from fedamole.synthesis.outline import ExampleSizes, Outline

SHAPES = {"m": (2, 2)}
A, B = "m/shared/A", "m/shared/B"


class TwoClasses(Outline):
    """One example of each of two classes, with vectors of two numbers; or free text."""

    def __init__(self, free: bool) -> None:
        self.free = free

    def new_examples(self, sizes: ExampleSizes, generator: torch.Generator) -> SyntheticExamples:
        vectors = torch.randn(2, sizes.virtual_tokens, 2, generator=generator)
        return SyntheticExamples({VECTORS: vectors}, (8, *range(-1, -1 - sizes.virtual_tokens, -1)), (5, 6), (0, 1))

    def class_answers(self) -> tuple[tuple[int, ...], ...]:
        return () if self.free else ((5,), (6,))

    def class_prompts(self) -> dict[int, list[tuple[int, ...]]]:
        """Three training examples of class 0 and one of class 1."""
        return {} if self.free else {0: [(1,), (2,), (3,)], 1: [(4,)]}


def client(free: bool = False, name: str = "a", round_: int = 0) -> Client:
    base, info = BaseInfo(SHAPES, 2, embedding_std=0.5, vocabulary=10), ClientInfo(name, 10)
    return Client(info, base, 0, round_, DryProbe(SHAPES, 2), lambda: TwoClasses(free))


def both(value: float) -> dict[str, torch.Tensor]:
    return {A: full(value, 1, 2), B: full(-value, 2, 1)}


def asked(method: FedDm, client: Client) -> tuple[TrainingRequest, SynthesisRequest, Any]:
    """The two requests of a client that gets 2 and trains it to 3."""
    work = method.update(client, Nothing(), SharedTensors(both(2.0)))
    first = next(work)
    assert isinstance(first, TrainingRequest)
    second = work.send(TrainingResult(replace(first.adapter, tensors=both(3.0)), 4, 0.5))
    assert isinstance(second, SynthesisRequest)
    return first, second, work


def test_it_trains_its_own_lora_and_then_the_examples_between_the_two() -> None:
    method = FedDm(rank=1, own_share=0.3, virtual_tokens=3, real_examples=7, synthesis_rate=0.2, noise=0.1)
    training, synthesis, _ = asked(method, client())
    assert torch.equal(training.adapter.tensors[A], full(2.0, 1, 2))
    assert (training.step_fraction, synthesis.step_fraction) == (0.3, 0.7)
    assert torch.equal(synthesis.adapter.tensors[A], full(2.0, 1, 2))
    assert synthesis.toward is not None
    assert torch.equal(synthesis.toward.tensors[A], full(3.0, 1, 2))
    assert (synthesis.noise, synthesis.real_examples) == (0.1, 7)
    assert synthesis.learning_rate == pytest.approx(0.2 * 0.5)
    assert synthesis.class_answers == ((5,), (6,))
    assert synthesis.answered_by is None


def test_in_a_ball_the_passes_are_made_around_the_global_lora() -> None:
    _, synthesis, _ = asked(FedDm(rank=1, perturbation="ball", radius=4.0, noise=0.1), client())
    assert synthesis.toward is None
    assert synthesis.noise == 4.0


def test_free_text_is_answered_by_the_own_lora() -> None:
    _, synthesis, _ = asked(FedDm(rank=1), client(free=True))
    assert synthesis.answered_by is not None
    assert torch.equal(synthesis.answered_by.tensors[A], full(3.0, 1, 2))


def test_first_vectors_are_drawn_by_client_and_round() -> None:
    first, again, other, later = (
        asked(FedDm(rank=1), each)[1].examples.vectors
        for each in (client(), client(), client(name="b"), client(round_=1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, later)


def test_the_reply_is_the_examples_and_no_weights() -> None:
    _, synthesis, work = asked(FedDm(rank=1), client())
    made = replace(synthesis.examples, tensors={VECTORS: synthesis.examples.vectors + 1})
    with pytest.raises(StopIteration) as end:
        work.send(SynthesisResult(made, 9, 1.0))
    client_state, reply, trained = end.value.value
    assert client_state == Nothing()
    assert reply is made
    assert set(reply.tensors) == {VECTORS}
    assert torch.equal(trained.adapter.tensors[A], full(3.0, 1, 2)), "feddm_ft scores the client's own LoRA"


class Steps(ServerWork):
    """Records what the server is to train, and moves every tensor by 3."""

    def __init__(self) -> None:
        self.seen: list[tuple[TrainingRequest, int, int]] = []

    def train(self, request: TrainingRequest, steps: int, round_: int) -> TrainingResult:
        self.seen.append((request, steps, round_))
        moved: Mapping[str, torch.Tensor] = {name: it + 3.0 for name, it in request.adapter.tensors.items()}
        return TrainingResult(replace(request.adapter, tensors=moved), steps, 0.1)


def test_the_server_trains_on_the_union_and_stays_within_the_radius() -> None:
    """Four values move by 3, a distance of 6: back to 1.5 within a radius of 3."""
    reply = TwoClasses(False).new_examples(FedDm(virtual_tokens=1).sizes, torch.Generator().manual_seed(0))
    none = replace(reply, tensors={VECTORS: torch.zeros(0, 1, 2)}, answers=(), classes=())
    replies = {"b": reply, "a": replace(reply, tensors={VECTORS: reply.vectors + 1}), "c": none}
    for radius, moved in ((100.0, 3.0), (3.0, 1.5)):
        work = Steps()
        server = Server(BaseInfo(SHAPES), (), seed=0, round=2, work=work)
        state = FedDm(rank=1, radius=radius, server_steps=17).aggregate(server, SharedTensors(both(2.0)), replies)
        ((request, steps, round_),) = work.seen
        assert (steps, round_, request.own_rows) == (17, 2, False)
        assert request.extra is not None
        assert request.extra.rows == (((8, -1), (5,)), ((8, -2), (6,)), ((8, -3), (5,)), ((8, -4), (6,)))
        assert request.extra.vectors is not None
        assert torch.equal(request.extra.vectors, torch.cat([reply.vectors + 1, reply.vectors]).flatten(0, 1))
        torch.testing.assert_close(state.tensors[A], full(2.0 + moved, 1, 2))
        torch.testing.assert_close(state.tensors[B], full(-2.0 + moved, 2, 1))
        unchanged = FedDm(rank=1).aggregate(server, SharedTensors(both(2.0)), {"c": none})
        assert torch.equal(unchanged.tensors[A], full(2.0, 1, 2))
    assert torch.equal(within(both(2.0), both(2.0), 0.1)[A], full(2.0, 1, 2))


def test_a_server_without_a_base_says_so() -> None:
    with pytest.raises(RuntimeError, match="must set `trains_at_server`"):
        Server(BaseInfo(SHAPES), (), seed=0).train(TrainingRequest(asked(FedDm(), client())[0].adapter), 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("examples_per_class", 0),
        ("virtual_tokens", 0),
        ("server_steps", 0),
        ("min_class_examples", 0),
        ("own_share", 0.0),
        ("own_share", 1.0),
        ("radius", 0.0),
        ("noise", -0.1),
        ("synthesis_rate", float("nan")),
    ],
)
def test_wrong_values_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.{key} = {value}: must be "):
        FedDm(**{key: value})  # type: ignore[arg-type]


# --- policy and plan ------------------------------------------------------------------------------------------


def test_a_policy_must_allow_synthetic_examples_and_limits_their_classes(runs: Any) -> None:
    config = runs.load("feddm", "training.local_steps=5")
    source = config.data.source[0]

    def refused(method: FedDm, **policy: Any) -> set[str]:
        checks = settings_checks(replace(config, method=method), source, PolicySettings(**policy), "own")
        return {check.setting for check in checks if not check.passes}

    deployed = config.method.for_deployment()
    assert deployed.min_class_examples == 20
    assert replace(config.method, min_class_examples=3).for_deployment().min_class_examples == 3
    assert refused(deployed) == {"sending synthetic examples"}
    assert refused(deployed, share_synthetic=True) == set()
    few = replace(deployed, min_class_examples=19)
    for small in (few, config.method):  # unset it is 2
        assert refused(small, share_synthetic=True) == {"rows behind synthetic examples"}
    rows = {"train": 1000, "embedding": 30, "validation": 30, "test": 30}
    most = {check.setting: check.requested for check in row_checks(config, rows, PolicySettings())}
    assert most["training rows that a round reads"] == str(5 * 10 * 4), "10 classes of 4 real examples in a step"


def test_a_plan_shows_the_servers_steps(bundled: BundledRounds) -> None:
    config = bundled.config("feddm", 1, ["run.group=1"])
    plan = planned(config, bundled.prepared.base, bundled.prepared.clients)
    assert plan.server_steps == 60
    assert any("not private by themselves" in sentence for sentence in plan.exposure)
    fedit = bundled.config("fedit", 1, ["run.group=1"])
    assert planned(fedit, bundled.prepared.base, bundled.prepared.clients).server_steps == 0


# --- on the bundled base --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> BundledRounds:
    return BundledRounds(tmp_path_factory.mktemp("rounds"), ("hospital_north",))


OVERRIDES = ("training.local_steps=90", "method.own_share=0.4")


def test_synthetic_examples_teach_more_than_random_ones(bundled: BundledRounds) -> None:
    """What the mechanism is for: after one round, the loss is below 0.75 x that of random rows with the same labels."""
    sent: dict[str, SyntheticExamples] = {}
    std, generator = bundled.prepared.base.embedding_std, torch.Generator().manual_seed(1)

    def record(replies: dict[str, Any]) -> dict[str, Any]:
        sent.update(replies)
        return replies

    def random(replies: dict[str, Any]) -> dict[str, Any]:
        shape = sent["hospital_north"].vectors.shape
        vectors = std * torch.randn(shape, generator=generator)
        return {"hospital_north": replace(sent["hospital_north"], tensors={VECTORS: vectors})}

    matched = bundled("feddm", *OVERRIDES, rounds=1, changed=record)["hospital_north"]
    quick = ("training.local_steps=2",)  # what these clients make is replaced
    chance = bundled("feddm", *quick, rounds=1, changed=random)["hospital_north"]
    print(f"loss with synthetic examples {matched:.3f}, with random ones {chance:.3f}")
    assert matched < 0.75 * chance
    assert sent["hospital_north"].classes == tuple(label for label in range(3) for _ in range(8))


def test_the_server_counts_its_work_and_the_table_is_not_part_of_the_model(bundled: BundledRounds) -> None:
    config = bundled.config("feddm", 1)
    work = ServerWork(bundled.bank, config.training, 4096, 0)
    server = Server(BaseInfo.of(bundled.prepared.base), (), seed=0, work=work)
    method = config.method
    state = method.init(server)
    vectors = torch.randn(2, 16, bundled.prepared.base.width)
    prompt = (*range(-1, -17, -1), 5)
    reply = SyntheticExamples({VECTORS: vectors}, prompt, (7, 8), (0, 1))
    request = TrainingRequest(
        method.adapter(None, Nothing(), state),  # type: ignore[arg-type]
        extra=reply.rows(),
        own_rows=False,
    )
    first = server.train(request, 3)
    assert TABLE not in first.adapter.fixed
    second = server.train(request, 3)
    name = next(name for name in first.adapter.tensors if name.endswith("/B"))
    assert not torch.equal(first.adapter.tensors[name], second.adapter.tensors[name]), "each has its own order"
    report = work.report()
    assert report["steps"] == 6
    assert report["backward_tokens"] == 6 * 4 * 18
    assert report["seconds"] > 0
    assert work.report()["steps"] == 0
    row = bundled.prepared.clients["hospital_north"].embedding.rows[:2]
    assert len(server.probe(row).losses([first.adapter], 2)) == 1
    assert work.report()["probed"] == 2
    assert isinstance(work.counts, ProbeCounts)
    with pytest.raises(ValueError, match="no rows of its own"):
        server.train(TrainingRequest(request.adapter), 1)


def test_a_run_logs_the_servers_steps(runs: Any, facts: Any) -> None:
    lines = [line for line in facts(runs("feddm")) if line["split"] == "server"]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert all(line["steps"] == 3 and line["backward_tokens"] > 0 and "client" not in line for line in lines)
    assert not [line for line in facts(runs("fedit")) if line["split"] == "server"]


def test_a_folder_of_a_run_with_server_lines_can_be_read(runs: Any, fedamole: Any) -> None:
    result = fedamole("report", Path(runs("feddm")))
    assert result.code == 0, result.err
