"""FedDPMS: what a client trains, releases and decodes, and what the server keeps, by hand and on real text."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.bundled_rounds import BundledRounds
from tests.methods.test_feddm import SHAPES, A, TwoClasses, both
from torch import Tensor

from fedamole.deployment.run_session import computed_once
from fedamole.deployment.security.policy import PolicySettings, settings_checks
from fedamole.errors import ConfigError
from fedamole.federation.autoencoder_request import AutoencoderRequest, AutoencoderResult
from fedamole.federation.method import BaseInfo, Client, ClientInfo, Server, TrainingRequest, TrainingResult
from fedamole.federation.privacy.gaussian import noise_multiplier, released
from fedamole.federation.probe import DryProbe, ProbeCounts
from fedamole.federation.record import unpack
from fedamole.federation.synthesis import features
from fedamole.methods.feddpms import FedDpms
from fedamole.model.batch import Ids
from fedamole.model.params import Adapter
from fedamole.synthesis.examples import SyntheticExamplesError
from fedamole.synthesis.latent_exchange import LatentKept, LatentMessage, LatentReply, LatentState
from fedamole.synthesis.latents import class_means, class_sums, decode, encode

METHOD = FedDpms(rank=1, warmup_rounds=2, own_share=0.3, latent_size=2, hidden_size=3, virtual_tokens=1, epsilon=1e6)
SERVER = Server(BaseInfo(SHAPES, 2, embedding_std=0.5, vocabulary=10), (ClientInfo("a", 4), ClientInfo("b", 4)), 0)
START = METHOD.init(SERVER)
NONE: dict[str, Tensor] = {}
KEY = b"k" * 32


class Numbered(DryProbe):
    """The hidden state at the end of a prompt is (its first id, A's first value)."""

    def prompt_hidden(self, adapter: Adapter, prompts: Sequence[Ids]) -> Tensor:
        return torch.tensor([[float(prompt[0]), float(adapter.tensors[A][0, 0])] for prompt in prompts])


def client(round_: int = 0, name: str = "a", free: bool = False, **parts: Any) -> Client:
    outline = TwoClasses(free)
    made = Client(ClientInfo(name, 4), SERVER.base, 0, round_, Numbered(SHAPES, 2), lambda: outline)
    return replace(made, **{"new_key": lambda: KEY, **parts})


def message(lora: float = 2.0, **fields: Any) -> LatentMessage:
    return LatentMessage(
        **{"tensors": both(lora), "autoencoder": START.autoencoder, "reader": {}, "means": {}, **fields}
    )


def worked(
    who: Client, sent: LatentMessage, kept: LatentKept | None = None, method: FedDpms = METHOD
) -> tuple[list[Any], LatentKept, LatentReply]:
    """The requests of a client whose LoRA becomes 3 and whose autoencoder grows by 1; its next state and its reply."""
    work, requests = method.update(who, kept or method.init_client_state(who), sent), list[Any]()
    try:
        requests.append(next(work))
        while True:
            asked = requests[-1]
            if isinstance(asked, AutoencoderRequest):
                grown = {name: tensor + 1 for name, tensor in asked.tensors.items()}
                requests.append(work.send(AutoencoderResult(grown, 4, 0.5)))
            else:
                requests.append(work.send(TrainingResult(replace(asked.adapter, tensors=both(3.0)), 4, 0.5)))
    except StopIteration as end:
        return requests, end.value[0], end.value[1]


def released_means(sums: Tensor, method: FedDpms, key: bytes = KEY) -> dict[str, list[float]]:
    noisy = released(sums, 2 * method.latent_norm, noise_multiplier(method.epsilon, method.delta), key)
    means = class_means(noisy, method.latent_norm, method.min_synthetic_rows())  # which is more than the noise needs
    return {str(label): mean.tolist() for label, mean in means.items()}


def sums_under(first: float, method: FedDpms = METHOD) -> Tensor:
    """Sums over three prompts of class 0 and one of class 1, under a LoRA whose A begins with a number."""
    hidden = {0: torch.tensor([[1.0, first], [2.0, first], [3.0, first]]), 1: torch.tensor([[4.0, first]])}
    latents = {label: encode(START.autoencoder, states)[0] for label, states in hidden.items()}
    return class_sums(latents, 2, method.latent_norm)


def test_in_the_warm_up_a_client_trains_its_lora_and_the_autoencoder() -> None:
    (training, autoencoder), kept, reply = worked(client(), message())
    assert isinstance(training, TrainingRequest)
    assert (training.step_fraction, training.extra) == (0.3, None)
    assert isinstance(autoencoder, AutoencoderRequest)
    assert autoencoder.step_fraction == pytest.approx(0.7)
    assert float(autoencoder.adapter.tensors[A][0, 0]) == 2.0, "read under the LoRA that was sent, not the trained one"
    rows = torch.cat([autoencoder.hidden, autoencoder.classes.unsqueeze(1)], dim=1).tolist()
    assert set(map(tuple, rows)) == {(1.0, 2.0, 0), (2.0, 2.0, 0), (3.0, 2.0, 0), (4.0, 2.0, 1)}
    assert (autoencoder.prompt, autoencoder.tokens) == ((8, -1), (5, 6))
    assert autoencoder.class_weight == METHOD.class_weight
    assert float(reply.tensors[A][0, 0]) == 3.0
    assert all(torch.equal(reply.autoencoder[name], START.autoencoder[name] + 1) for name in START.autoencoder)
    assert (reply.means, kept) == ({}, LatentKept({})), "nothing is released"
    assert len(reply.task) == 64


def test_the_autoencoder_is_trained_on_a_draw() -> None:
    (_, autoencoder), _, _ = worked(client(), message(), method=replace(METHOD, real_examples=2))
    assert len(autoencoder.hidden) == len(autoencoder.classes) == 2


def test_after_the_warm_up_a_client_releases_means_once() -> None:
    """With 2 examples needed, those of class 0; encoded under the reader, and under the LoRA sent if there is none."""
    (training,), kept, reply = worked(client(2), message())
    assert (training.step_fraction, training.extra, reply.autoencoder) == (1.0, None, {})
    expected = released_means(sums_under(2.0), METHOD)
    assert list(expected) == ["0"]
    assert {label: mean.tolist() for label, mean in reply.means.items()} == expected
    assert kept.released
    _, _, other = worked(client(2), message(reader=both(7.0)))
    assert {label: mean.tolist() for label, mean in other.means.items()} == released_means(sums_under(7.0), METHOD)
    _, later, again = worked(client(3), message(9.0, reader=both(5.0)), kept)
    assert torch.equal(again.means["0"], reply.means["0"]), "what was released is sent again, whatever is asked for"
    assert later.means == kept.means


def test_noise_is_that_of_epsilon_and_of_the_key() -> None:
    method = replace(METHOD, epsilon=50.0, min_class_examples=2, latent_norm=100.0)
    _, _, reply = worked(client(2), message(), method=method)
    expected = released_means(sums_under(2.0, method), method)
    assert expected
    assert {label: mean.tolist() for label, mean in reply.means.items()} == expected
    _, _, other = worked(client(2, new_key=lambda: b"l" * 32), message(), method=method)
    assert {label: mean.tolist() for label, mean in other.means.items()} != expected


@pytest.mark.parametrize(("examples", "kept"), [(10, False), (30, True)])
def test_a_class_whose_mean_would_be_all_noise_is_left_out(examples: int, kept: bool) -> None:
    """Epsilon 1: the number needs 2 * 3.731 * sqrt(2) = 10.6, and has noise with standard deviation 7.5."""

    class Many(TwoClasses):
        def class_prompts(self) -> dict[int, list[tuple[int, ...]]]:
            return {0: [(1,)] * examples}

    outline = Many(free=False)
    method = replace(METHOD, epsilon=1.0, min_class_examples=1)
    counts = list[int]()
    for index in range(100):
        key = index.to_bytes(32, "big")
        who = client(2, outline=lambda: outline, new_key=lambda key=key: key)
        _, state, _ = worked(who, message(), method=method)
        counts.append(int("0" in state.means))
    expected = 0.995 if kept else 0.47  # P(n + 7.46 N(0, 1) >= 10.55)
    assert sum(counts) / 100 == pytest.approx(expected, abs=0.12)


def test_a_repeated_round_of_a_deployment_releases_the_same(tmp_path: Any) -> None:
    """Each call has another key, and the coordinator asks with another LoRA; the file was there before."""
    keys = iter([b"1" * 32, b"2" * 32])
    file = tmp_path / "released.safetensors"
    who = client(2, new_key=lambda: next(keys), once=lambda compute: computed_once(file, compute))
    _, _, first = worked(who, message())
    assert unpack(LatentKept, file.read_bytes()).released
    _, _, second = worked(who, message(5.0))
    assert torch.equal(first.means["0"], second.means["0"])
    assert next(keys) == b"2" * 32, "no second key was drawn"


def test_rows_of_a_rare_class_are_decoded_around_its_mean() -> None:
    """Class 1 has one example; four rows at most, as many as the client has; the extra rows have its answer."""
    method = replace(METHOD, rare_below=2, examples_per_class=9, latent_noise=0.0)
    means = {"0": torch.tensor([0.5, 0.5]), "1": torch.tensor([1.0, -1.0]), "7": torch.zeros(2)}
    sent = message(means=means)
    (training,), _, _ = worked(client(3), sent, LatentKept({}, True), method)
    assert training.own_rows
    assert training.extra.rows == (((8, -1), (6,)), ((8, -2), (6,)), ((8, -3), (6,)), ((8, -4), (6,)))
    vectors = decode(START.autoencoder, torch.tensor([[1.0, -1.0]]), 2, 0.5)
    assert torch.allclose(training.extra.vectors, vectors[0].expand(4, 2))
    (all_rare,), _, _ = worked(client(3), sent, LatentKept({}, True), replace(method, rare_below=9))
    assert [answer for _, answer in all_rare.extra.rows] == [(5,), (5,), (6,), (6,)]
    (noisy,), _, _ = worked(client(3), sent, LatentKept({}, True), replace(method, latent_noise=1.0))
    assert len({tuple(vector) for vector in noisy.extra.vectors.tolist()}) == 4
    (none,), _, _ = worked(client(3), sent, LatentKept({}, True), replace(method, rare_below=1))
    assert none.extra is None, "the client has examples of both"
    (early,), _, _ = worked(client(1, free=True), sent, None, method)
    assert early.extra is None


def test_clients_without_options_train_the_lora_alone() -> None:
    for who, method in ((client(free=True), METHOD), (client(), replace(METHOD, max_options=1))):
        (training,), kept, reply = worked(who, message(), method=method)
        assert (training.step_fraction, reply.task) == (1.0, "")
        assert reply.autoencoder is not None
        assert all(torch.equal(reply.autoencoder[name], START.autoencoder[name]) for name in START.autoencoder)
        _, kept, reply = worked(replace(who, round=2), message(), kept, method)
        assert (reply.means, reply.autoencoder, kept.released) == ({}, {}, False)


def test_the_server_averages_and_keeps_the_means_of_each_task() -> None:
    """Warm-up: the LoRA of all, the autoencoder of clients with a task. Later: means by task, and the reader."""
    ones, threes = (
        {name: torch.full_like(it, value) for name, it in START.autoencoder.items()} for value in (1.0, 3.0)
    )
    replies = {
        "a": LatentReply(both(1.0), ones, {}, "t"),
        "b": LatentReply(both(3.0), threes, {}, "t"),
        "c": LatentReply(both(5.0), START.autoencoder, {}, ""),
    }
    server = replace(SERVER, clients=(*SERVER.clients, ClientInfo("c", 4)))
    state = METHOD.aggregate(server, START, replies)
    assert float(state.tensors[A][0, 0]) == pytest.approx(3.0)
    assert {float(it.mean()) for it in state.autoencoder.values()} == {2.0}
    assert (state.reader, state.means, state.tasks) == ({}, {}, {"a": "t", "b": "t"})
    means = {"a": {"0": torch.tensor([1.0, 0.0])}, "b": {"0": torch.tensor([3.0, 2.0]), "1": torch.ones(2)}, "c": {}}
    later = {name: LatentReply(both(8.0), {}, means[name], reply.task) for name, reply in replies.items()}
    after = METHOD.aggregate(replace(server, round=2), state, later)
    assert float(after.reader[A][0, 0]) == 3.0, "the LoRA that was sent in this round"
    again = METHOD.aggregate(replace(server, round=3), after, {"a": replace(later["a"], tensors=both(9.0))})
    assert float(again.reader[A][0, 0]) == 3.0
    assert {float(it.mean()) for it in again.autoencoder.values()} == {2.0}
    sent = METHOD.message(again, ClientInfo("a", 4))
    assert {label: mean.tolist() for label, mean in sent.means.items()} == {"0": [2.0, 1.0], "1": [1.0, 1.0]}
    assert {name.split("/")[0] for name in sent.autoencoder} == {"decoder"}
    assert sent.reader == {}
    new = METHOD.message(again, ClientInfo("c", 4))
    assert (new.means, len(new.autoencoder), float(new.reader[A][0, 0])) == ({}, len(START.autoencoder), 3.0)
    other = LatentState(again.tensors, again.autoencoder, again.reader, again.means, {**again.tasks, "a": "u"})
    assert METHOD.message(other, ClientInfo("b", 4)).means["0"].tolist() == [3.0, 2.0], "another task counts for itself"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"task": "t"}, "a hash of the task"),
        ({"task": ""}, "means of a client without a task"),
        ({"means": {"16": torch.zeros(2)}}, "means of an unknown class"),
        ({"means": {"01": torch.zeros(2)}}, "means of an unknown class"),
        ({"means": {"0": torch.zeros(3)}}, "means of an unexpected form"),
        ({"means": {"0": torch.tensor([3.0, 0.1])}}, "means that are too long"),
        ({"means": {"0": torch.tensor([math.nan, 0.0])}}, "means that are too long"),
    ],
)
def test_a_wrong_reply_is_refused(fields: dict[str, Any], problem: str) -> None:
    template = LatentReply(both(1.0), {}, {})
    right = LatentReply(both(3.0), {}, {"0": torch.tensor([3.0, 0.0])}, "a" * 64)
    expected = METHOD.expected_reply(template, right)
    assert (expected.task, list(expected.means), float(expected.tensors[A][0, 0])) == ("a" * 64, ["0"], 1.0)
    with pytest.raises(SyntheticExamplesError, match=problem):
        METHOD.expected_reply(template, replace(right, **fields))


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        ("epsilon", 0.0, "above 0"),
        ("epsilon", -1.0, "above 0"),
        ("epsilon", math.inf, "above 0"),
        ("epsilon", math.nan, "above 0"),
        ("delta", 0.0, "above 0 and below 1"),
        ("delta", 1.0, "above 0 and below 1"),
        ("delta", math.nan, "above 0 and below 1"),
        ("own_share", 1.0, "above 0 and below 1"),
        ("latent_norm", 0.0, "above 0"),
        ("autoencoder_rate", math.inf, "above 0"),
        ("class_weight", -1.0, "at least 0"),
        ("kl_weight", math.inf, "at least 0"),
        ("latent_noise", -0.1, "at least 0"),
        ("warmup_rounds", 0, "at least 1"),
        ("latent_size", 0, "at least 1"),
        ("rare_below", 0, "at least 1"),
        ("min_class_examples", 0, "at least 1"),
    ],
)
def test_wrong_values_are_refused(key: str, value: float, must: str) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.{key} = {value}: must be {must}$"):
        FedDpms(**{key: value})  # type: ignore[arg-type]
    assert FedDpms(kl_weight=0.0, class_weight=0.0, latent_noise=0.0)


def test_a_policy_must_allow_it_and_is_told_what_epsilon_covers(runs: Any) -> None:
    config = runs.load("feddpms")
    deployed = config.method.for_deployment()
    assert deployed.min_class_examples == 20

    def refused(**policy: Any) -> set[str]:
        checks = settings_checks(
            replace(config, method=deployed), config.data.source[0], PolicySettings(min_steps=1, **policy), "own"
        )
        return {check.setting for check in checks if not check.passes}

    assert "sending synthetic examples" in refused()
    assert "sending synthetic examples" not in refused(share_synthetic=True)
    (sentence,) = deployed.exposes(3, None)
    assert "epsilon = 8 and delta = 1e-05" in sentence
    assert "does not cover the LoRA" in sentence


# --- on the bundled base --------------------------------------------------------------------------------------

TEACHER, LACKING, MISSING = "hospital_north", "hospital_south", 2
"""The second client has no letter of the class "high" to train on."""


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> BundledRounds:
    rounds = BundledRounds(tmp_path_factory.mktemp("rounds"), (TEACHER, LACKING))
    rounds.remove_class(LACKING, MISSING)
    return rounds


def randomised(replies: dict[str, Any]) -> dict[str, Any]:
    """Replace all means by random vectors of the largest norm, the same in every round."""
    generator, changed = torch.Generator().manual_seed(5), dict[str, Any]()
    for name, reply in sorted(replies.items()):
        drawn = {label: torch.randn(mean.shape, generator=generator) for label, mean in sorted(reply.means.items())}
        changed[name] = replace(reply, means={label: 3 * mean / mean.norm() for label, mean in drawn.items()})
    return changed


def known(bundled: BundledRounds, *overrides: str, **options: Any) -> tuple[float, float]:
    """The mean probability of the missing class on its letters under the client's own LoRA; accuracy on the others."""
    _, engine = bundled.train("feddpms_ft", "training.local_steps=40", *overrides, rounds=8, **options)
    data = bundled.prepared.clients[LACKING]
    rows = [*data.test.rows, *data.validation.rows]
    tokens = [option[0] for option in rows[0].options]
    own = engine.worker.states.load(engine.worker.factory.client(data, 8, ProbeCounts())).trained
    assert own is not None
    bundled.bank.load([own])
    classes = torch.tensor([row.options.index(row.answer) for row in rows])
    with torch.no_grad():
        logits = features(bundled.bank, [row.prompt for row in rows]).logits
    others = classes != MISSING
    probability = logits.softmax(1)[~others, tokens[MISSING]].mean()
    return float(probability), float((logits[others][:, tokens].argmax(1) == classes[others]).float().mean())


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_client_keeps_a_class_that_it_lacks_at_a_huge_epsilon_and_not_at_a_tiny_one(
    bundled: BundledRounds, seed: int
) -> None:
    """At epsilon 0.01 nothing passes the bound on the noise, so the run is that without any release.

    That the means themselves are what helps is not asserted: random latent vectors, which are decoded by the same
    decoder, help at least as much. For a client that knows two classes of three, whatever is neither is the third.
    """
    fixed = f"run.seed={seed}"
    none, _ = known(bundled, fixed, "method.min_class_examples=1000")
    huge, kept = known(bundled, fixed, "method.epsilon=1e6")
    usual, _ = known(bundled, fixed)
    tiny, _ = known(bundled, fixed, "method.epsilon=0.01")
    random, _ = known(bundled, fixed, "method.epsilon=1e6", changed=randomised)
    print(
        f"seed {seed}: probability without {none:.3f}, epsilon 1e6 {huge:.3f} (others {kept:.2f}), 8 {usual:.3f}, "
        f"0.01 {tiny:.3f}; random latent vectors {random:.3f}"
    )
    assert huge > 2 * none
    assert tiny == pytest.approx(none, abs=1e-6)
    assert kept > 0.9
