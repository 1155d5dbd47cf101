"""FedAF: its two exchanges by hand, FedDM where its weights are 0, and agreement of clients on real text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.bundled_rounds import BundledRounds
from tests.methods.by_hand import full
from tests.methods.test_feddm import SHAPES, A, B, Steps, TwoClasses, both
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, Client, ClientInfo, Server, TrainingRequest, TrainingResult
from fedamole.federation.probe import DryProbe
from fedamole.federation.record import Nothing, pack, unpack
from fedamole.federation.synthesis import features
from fedamole.federation.synthesis_request import SynthesisRequest, SynthesisResult
from fedamole.methods.fedaf import ClassMessage, FedAf
from fedamole.methods.feddm import FedDm
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.batch import Ids
from fedamole.model.params import Adapter
from fedamole.synthesis.class_reply import ClassReply, logits_for, options_hash
from fedamole.synthesis.collaboration import Collaborative, centred
from fedamole.synthesis.examples import PROBABILITIES, VECTORS
from fedamole.synthesis.matching import DistributionMatching

METHOD = FedAf(rank=1, max_options=3, virtual_tokens=1)


read: list[int] = []
"""Prompts of each call of `FirstToken.prompt_logits`."""


class FirstToken(DryProbe):
    """Its logits of the two options are A's first value times the prompt's token, and 0."""

    def prompt_logits(self, adapter: Adapter, prompts: Sequence[Ids], tokens: Sequence[int]) -> Tensor:
        assert tuple(tokens) == (5, 6)
        read.append(len(prompts))
        scale = float(adapter.tensors[A][0, 0])
        return torch.tensor([[scale * prompt[0], 0.0] for prompt in prompts])


def client(free: bool = False) -> Client:
    base = BaseInfo(SHAPES, 2, embedding_std=0.5, vocabulary=10)
    return Client(ClientInfo("a", 10), base, 0, 0, FirstToken(SHAPES, 2), lambda: TwoClasses(free))


def measured(method: FedAf, free: bool = False) -> tuple[ClassReply, TrainingResult]:
    with pytest.raises(StopIteration) as end:
        next(method.update(client(free), Nothing(), ClassMessage(both(2.0), {}, True)))
    state, reply, trained = end.value.value
    assert state == Nothing()
    return reply, trained


def test_a_client_measures_and_trains_nothing_in_the_first_exchange() -> None:
    """Class 0 has the logits (2, 0), (4, 0), (6, 0): (2, -2) on average. Class 1 has one example, too few for 2."""
    reply, trained = measured(replace(METHOD, global_share=1.0))
    assert {label: row.tolist() for label, row in reply.logits.items()} == {"0": [2.0, -2.0]}
    assert reply.options == options_hash([(5,), (6,)])
    assert (reply.tensors, reply.classes, reply.answers) == ({}, (), ())
    assert trained.steps == 0
    read.clear()
    few = measured(replace(METHOD, global_share=1.0, min_class_examples=1, label_examples=1))[0]
    assert read == [1, 1]
    assert few.logits["0"].tolist() in ([1.0, -1.0], [2.0, -2.0], [3.0, -3.0])
    assert few.logits["1"].tolist() == [4.0, -4.0]


def test_free_text_and_many_options_have_no_logits() -> None:
    for reply in (measured(METHOD, free=True)[0], measured(replace(METHOD, max_options=1))[0]):
        assert (reply.logits, reply.options) == ({}, "")


def test_the_global_lora_is_mixed_with_a_fresh_one() -> None:
    """0.9 x 2 + 0.1 x fresh, |fresh| <= 1 / sqrt 2; of B 0.9 x -2, as a fresh B is 0. The same in both exchanges."""
    tensors = measured(METHOD)[1].adapter.tensors
    fresh = (tensors[A] - 1.8) / 0.1
    assert 0 < float(fresh.abs().max()) < 0.71
    torch.testing.assert_close(tensors[B], full(-1.8, 2, 1))
    again = asked(METHOD)[1].adapter.tensors
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def asked(method: FedDm, message: SharedTensors | None = None) -> tuple[TrainingRequest, SynthesisRequest, Any]:
    """The two requests of the second exchange."""
    work = method.update(client(), Nothing(), message or ClassMessage(both(2.0), {"0": torch.ones(2, 2)}, False))
    first = next(work)
    assert isinstance(first, TrainingRequest)
    second = work.send(TrainingResult(replace(first.adapter, tensors=both(3.0)), 4, 0.5))
    assert isinstance(second, SynthesisRequest)
    return first, second, work


def test_the_second_exchange_is_feddm_with_the_term() -> None:
    training, synthesis, _ = asked(METHOD)
    plain_training, plain, _ = asked(FedDm(rank=1, virtual_tokens=1), SharedTensors(both(2.0)))
    assert torch.equal(training.adapter.tensors[A], full(2.0, 1, 2)), "its own LoRA starts from the global one"
    assert training.step_fraction == plain_training.step_fraction
    objective = synthesis.objective
    assert isinstance(objective, Collaborative)
    assert (objective.objective, objective.weight, objective.tokens) == (DistributionMatching(), 0.8, (5, 6))
    assert torch.equal(objective.logits[0], torch.ones(2, 2))
    same = replace(synthesis, examples=plain.examples, objective=plain.objective, adapter=plain.adapter, toward=None)
    assert same == replace(plain, toward=None)


def test_soft_labels_are_means_under_the_own_lora() -> None:
    """Own A = 3: logits (3, 0), (6, 0), (9, 0), at temperature 2 halved; the mean of their sigmoids."""
    _, synthesis, work = asked(METHOD)
    with pytest.raises(StopIteration) as end:
        work.send(SynthesisResult(synthesis.examples, 9, 1.0))
    reply = end.value.value[1]
    first = sum(1 / (1 + math.exp(-x / 2)) for x in (3, 6, 9)) / 3
    assert reply.tensors[PROBABILITIES].flatten().tolist() == pytest.approx([first, 1 - first, 0, 0, 0, 0])
    assert reply.soft_ids == (5, 6, 0) * 2
    assert torch.equal(reply.vectors, synthesis.examples.vectors)
    assert (reply.logits, reply.options) == ({}, "")


def test_a_round_asks_twice_and_only_those_that_answered_again() -> None:
    options = options_hash([(5,), (6,)])
    asked_for: list[Mapping[str, ClassMessage]] = []

    def exchange(messages: Mapping[str, ClassMessage]) -> dict[str, ClassReply]:
        asked_for.append(messages)
        if len(asked_for) > 1:
            return {}
        rows = {"a": [1.0, -1.0], "b": [3.0, -3.0]}
        return {name: ClassReply({}, (), (), (), (), {"1": torch.tensor(rows[name])}, options) for name in rows}

    state = SharedTensors(both(2.0))
    cohort = [ClientInfo(name, 1) for name in "abc"]
    assert METHOD.round(Server(BaseInfo(SHAPES), (), 0), state, cohort, exchange) is state
    first, second = asked_for
    assert {name: message.measure for name, message in first.items()} == dict.fromkeys("abc", True)
    assert {name: message.measure for name, message in second.items()} == dict.fromkeys("ab", False)
    assert all(message.logits["1"].tolist() == [[1.0, -1.0], [3.0, -3.0]] for message in second.values())
    assert METHOD.exchanges() == 2


def reply_with(first: float) -> ClassReply:
    """One example of each class, the first with the soft label (first, 1 - first), the second without one."""
    probabilities = torch.tensor([[[first, 1 - first, 0.0]], [[0.0, 0.0, 0.0]]])
    tensors = {VECTORS: torch.zeros(2, 1, 2), PROBABILITIES: probabilities}
    return ClassReply(tensors, (8, -1), (5, 6), (0, 1), (5, 6, 0) * 2)


def test_the_server_follows_mean_soft_labels() -> None:
    """(1 - w) CE + w 2^2 KL with w = 0.8 / 4.8 is 1 / 1.2 x (CE + 0.8 KL)."""
    work = Steps()
    server = Server(BaseInfo(SHAPES), (), seed=0, work=work)
    replies = {"a": reply_with(0.2), "b": reply_with(0.6)}
    METHOD.aggregate(server, SharedTensors(both(2.0)), replies)
    ((request, _, _),) = work.seen
    assert request.distillation is not None
    assert request.distillation.temperature == 2.0
    w = request.distillation.weight
    assert w * 2.0**2 / (1 - w) == pytest.approx(0.8)
    assert request.extra is not None
    assert request.extra.soft is not None
    labels = request.extra.soft.probabilities[:, 0]
    torch.testing.assert_close(labels, torch.tensor([[0.4, 0.6, 0.0], [0.0, 0.0, 0.0]] * 2))


def test_without_weights_the_server_trains_as_in_feddm() -> None:
    requests = []
    for method in (replace(METHOD, label_weight=0.0), FedDm(rank=1)):
        work = Steps()
        reply = reply_with(0.2)
        if not isinstance(method, FedAf):
            reply = replace(reply, tensors={VECTORS: reply.vectors}, soft_ids=())
        method.aggregate(Server(BaseInfo(SHAPES), (), 0, work=work), SharedTensors(both(2.0)), {"a": reply})
        ((request, steps, _),) = work.seen
        assert request.extra is not None
        assert request.extra.soft is None
        requests.append((request.extra.rows, request.distillation, request.own_rows, steps))
    assert requests[0] == requests[1]


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        ("agreement_weight", -1.0, "at least 0"),
        ("label_weight", float("inf"), "at least 0"),
        ("temperature", 0.0, "above 0"),
        ("global_share", 1.1, "at least 0 and at most 1"),
        ("label_examples", 1, "at least 2"),
        ("max_options", 0, "at least 1"),
    ],
)
def test_wrong_values_are_refused(key: str, value: float, must: str) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.{key} = {value}: must be {must}$"):
        FedAf(**{key: value})  # type: ignore[arg-type]


# --- on the bundled base --------------------------------------------------------------------------------------

SMALL = ("method.real_examples=8", "method.examples_per_class=4", "method.own_share=0.25")


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> BundledRounds:
    return BundledRounds(tmp_path_factory.mktemp("rounds"), ("hospital_north", "bank_village"))


def test_with_weights_of_0_it_is_feddm_number_by_number(bundled: BundledRounds) -> None:
    """Also its losses: those of the synthesis make the examples, and those of the server the next state."""
    quick = (*SMALL, "training.local_steps=4", "method.server_steps=3")
    zero = ("method.agreement_weight=0", "method.label_weight=0", "method.global_share=1")
    states, vectors = [], list[dict[str, Tensor]]()

    def record(replies: dict[str, Any]) -> dict[str, Any]:
        vectors.append({name: reply.tensors[VECTORS] for name, reply in replies.items() if reply.tensors})
        return replies

    for options in (("feddm", *quick), ("fedaf", *quick, *zero), ("fedaf", *quick)):
        states.append(bundled.train(*options, rounds=1, changed=record)[0].tensors)
    plain, (measuring, zeros), (_, others) = vectors[0], vectors[1:3], vectors[3:]
    assert measuring == {}
    assert set(plain) == set(bundled.clients)
    for name in plain:
        assert torch.equal(plain[name], zeros[name])
        assert not torch.equal(plain[name], others[name])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_class_logits_of_clients_come_nearer_together(bundled: BundledRounds) -> None:
    """What the mechanism is for: the distance between two clients' mean option logits, class by class.

    They are those of the synthetic examples under the global LoRA, around which the passes are made (in the ball of the
    paper). The LoRA was trained by FedIT, so that it separates the classes.
    """
    start = bundled.train("fedit", "training.local_steps=30", rounds=1)[0].tensors
    tokens = [answer[0] for answer in bundled.prepared.clients["hospital_north"].train.rows[0].options]

    def distance(weight: float) -> float:
        ball = ("method.perturbation=ball", "method.radius=0.3", "training.local_steps=20")
        config = bundled.config("fedaf", 1, (*SMALL, *ball, f"method.agreement_weight={weight}"))
        engine = bundled.engine(config)

        def exchange(messages: dict[str, ClassMessage]) -> dict[str, ClassReply]:
            results = engine.update(0, {name: pack(message) for name, message in messages.items()})
            return {name: unpack(ClassReply, result.payload or b"") for name, result in results.items()}

        message = ClassMessage(start, {}, True)
        sent = exchange(dict.fromkeys(bundled.clients, message))
        second = {name: replace(message, measure=False, logits=logits_for(sent[name], sent)) for name in sent}
        means = []
        for reply in exchange(second).values():
            bundled.bank.load([reply.rows().read_by(Adapter(config.method.spec(), start))])
            with torch.no_grad():
                logits = centred(features(bundled.bank, reply.prompts()).logits[:, tokens])
            means.append(torch.stack([logits[i : i + 4].mean(0) for i in (0, 4, 8)]))
        return float((means[0] - means[1]).norm(dim=1).mean())

    near, far = distance(20.0), distance(0.0)
    print(f"mean distance of class logits with the term {near:.3f}, without {far:.3f}")
    assert near < 0.75 * far
