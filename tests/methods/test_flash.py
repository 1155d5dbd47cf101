"""FLASH: context, reward and posterior by hand; who is selected; clean clients are found on real text."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.methods.by_hand import CallProbe, client, driven, full

import fedamole
from fedamole.errors import ConfigError
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.record import Nothing
from fedamole.methods.flash import LARGEST, Bandit, Flash, Report
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.params import Adapter

SHAPES = {"m": (2, 2)}
INFOS = tuple(ClientInfo(name, 10) for name in "abcdef")
SERVER = Server(BaseInfo(SHAPES), INFOS, seed=0, rounds=10)
A, B = "m/shared/A", "m/shared/B"
METHOD = Flash(rank=1)


def lora(value: float) -> dict[str, torch.Tensor]:
    return {A: full(value, 1, 2), B: full(-value, 2, 1)}


def report(update: float, before: float, after: float, tokens: int = 99) -> Report:
    numbers = {"before": before, "after": after, "log_tokens": float(np.log1p(tokens))}
    scaled = {key: torch.tensor(number / LARGEST[key], dtype=torch.float64) for key, number in numbers.items()}
    return Report(lora(update), scaled)


def state(contexts: Mapping[str, Sequence[float]] = {}, asked: Mapping[str, int] = {}, **response: float) -> Bandit:
    """A state whose LoRA is 0; `response` is b by feature."""
    first = METHOD.init(SERVER)
    b = [response.get(key, 0.0) for key in ("loss", "distance", "tokens", "waited")]
    return Bandit(
        {name: tensor * 0 for name, tensor in first.tensors.items()},
        {**first.rewards, "response": torch.tensor(b, dtype=torch.float64)},
        {name: torch.tensor(context, dtype=torch.float64) for name, context in contexts.items()},
        dict(asked),
    )


def learned(method: Flash, replies: Mapping[str, Report], before: Bandit | None = None) -> tuple[Any, Any]:
    """A and b after round 3 with these replies."""
    after = method.aggregate(replace(SERVER, round=3), before or state(), replies)
    return after.rewards["precision"].numpy(), after.rewards["response"].numpy()


def test_contexts_of_the_first_round_by_hand() -> None:
    """The mean loss after training is 0.5. The updates 1, 3 and -1 have the mean 1: distances 0, 0 and 2."""
    replies = {"a": report(1.0, 3.0, 0.2), "b": report(3.0, 3.0, 0.4), "c": report(-1.0, 3.0, 0.9, tokens=49)}
    after = METHOD.aggregate(SERVER, state(), replies)
    expected = {"a": [-0.3, 0.0, np.log(100)], "b": [-0.1, 0.0, np.log(100)], "c": [0.4, 2.0, np.log(50)]}
    assert {name: context.tolist() for name, context in after.contexts.items()} == {
        name: pytest.approx(context, abs=1e-9) for name, context in expected.items()
    }
    torch.testing.assert_close(after.tensors[A], full(1.0, 1, 2))
    assert torch.equal(after.rewards["precision"], 0.1 * torch.eye(4, dtype=torch.float64)), "round 0 does not count"
    assert not after.rewards["response"].any()


def test_losses_of_a_later_round_are_moved_to_the_mean_that_is_known_of_its_clients() -> None:
    """The mean of 0.05 and 0.15 is 0.1, that of the known -0.3 and -0.1 is -0.2. A new client has their mean."""
    before = state({"a": [-0.3, 0.0, 1.0], "b": [-0.1, 0.0, 1.0]})
    after = METHOD.aggregate(replace(SERVER, round=5), before, {"a": report(1, 1, 0.05), "b": report(1, 1, 0.15)})
    assert [float(after.contexts[name][0]) for name in "ab"] == pytest.approx([-0.25, -0.15])
    after = METHOD.aggregate(replace(SERVER, round=5), before, {"a": report(1, 1, 0.1), "c": report(1, 1, 0.5)})
    assert [float(after.contexts[name][0]) for name in "ac"] == pytest.approx([-0.45, -0.05])  # known: -0.3 and -0.2


def test_the_reward_by_hand() -> None:
    """a saves half of its loss and keeps 0.5: 0. b saves 0.1 of it and keeps 0.9: -0.8. Less their mean: 0.4 and -0.4.

    The relative losses are -0.2 and 0.2, all other features are equal.
    """
    precision, response = learned(METHOD, {"a": report(1.0, 1.0, 0.5), "b": report(1.0, 1.0, 0.9)})
    assert precision == pytest.approx(np.diag([0.18, 0.1, 0.1, 0.1]))
    assert response == pytest.approx([-0.16, 0.0, 0.0, 0.0], abs=1e-9)


def test_tokens_count_with_their_weight() -> None:
    """Rewards that are equal but for tokens, 100 and 50: relative 1 and 0.5, so -0.2 and -0.1 at the weight 0.2."""
    replies = {"a": report(1.0, 1.0, 0.5, tokens=99), "b": report(1.0, 1.0, 0.5, tokens=49)}
    precision, response = learned(replace(METHOD, token_weight=0.2), replies)
    assert precision == pytest.approx(np.diag([0.1, 0.1, 0.225, 0.1]))
    assert response == pytest.approx([0.0, 0.0, 2 * 0.25 * -0.05, 0.0], abs=1e-9)
    assert learned(replace(METHOD, token_weight=0.0), replies)[1] == pytest.approx(np.zeros(4), abs=1e-9)


def test_rounds_since_a_client_was_asked_are_a_feature() -> None:
    """In round 3 of 10: asked in round 2 is 0.1, never asked 0.4; less their mean -0.15 and 0.15."""
    replies = {"a": report(1.0, 1.0, 0.5), "b": report(1.0, 1.0, 0.5)}
    precision, _ = learned(METHOD, replies, state(asked={"a": 2}))
    assert precision == pytest.approx(np.diag([0.1, 0.1, 0.1, 0.145]))


def test_a_report_cannot_count_for_more_than_its_bounds() -> None:
    """Losses count with at most 20, and a reward with at most 1."""
    replies = {"a": report(1.0, 1e9, 0.0), "b": report(1.0, 0.0, 1e9, tokens=2**60)}
    _, response = learned(METHOD, replies)
    assert response[0] == pytest.approx(2 * -10.0 * 1.0)
    assert np.isfinite(response).all()


def test_one_reply_teaches_nothing() -> None:
    precision, response = learned(METHOD, {"a": report(1.0, 1.0, 0.5)})
    assert np.array_equal(precision, 0.1 * np.eye(4))
    assert not response.any()


def test_a_client_that_was_asked_and_failed_does_not_count_as_waiting() -> None:
    after = METHOD.aggregate(replace(SERVER, round=4, asked=("a", "b")), state(), {"a": report(1.0, 1.0, 0.5)})
    assert after.asked == {"a": 4, "b": 4}
    assert set(after.contexts) == {"a"}


def selected(method: Flash, before: Bandit, count: int, round_: int = 3) -> Sequence[str]:
    names = method.select(replace(SERVER, round=round_), before, INFOS, count)
    assert names == method.select(replace(SERVER, round=round_), before, INFOS, count), "the draw is repeatable"
    assert len(set(names)) == count
    assert set(names) <= set("abcdef")
    return names


def test_the_clients_with_the_highest_predicted_rewards_are_selected() -> None:
    """A lower loss earns more: b, then the four clients without a context, which count with the mean, then a."""
    before = state({"a": [0.5, 0.0, 1.0], "b": [-0.5, 0.0, 1.0]}, asked=dict.fromkeys("abcdef", 2), loss=-1.0)
    certain = replace(METHOD, exploration=0.0)
    assert selected(certain, before, 1) == ["b"]
    assert [set(selected(certain, before, 5)), selected(certain, before, 6)[5]] == [set("bcdef"), "a"]
    few = certain.select(replace(SERVER, round=3), before, INFOS[2:], 2)
    assert set(few) <= set("cdef"), "only clients that are available"


def test_the_other_features_count_too() -> None:
    contexts = {"a": [0.0, 0.2, 5.0], "b": [0.0, 0.9, 3.0], "c": [0.0, 0.5, 4.0]}
    three, certain = INFOS[:3], replace(METHOD, exploration=0.0)
    for feature, first in (("distance", "a"), ("tokens", "b")):
        before = state(contexts, asked=dict.fromkeys("abc", 2), **{feature: -1.0})
        assert certain.select(replace(SERVER, round=3), before, three, 1) == [first]
    waited = state(contexts, asked={"a": 2, "b": 2, "c": 0}, waited=1.0)
    assert certain.select(replace(SERVER, round=3), waited, three, 1) == ["c"]


def test_without_rewards_the_selection_is_an_even_draw_and_exploration_keeps_some_of_it() -> None:
    counts = [sum("a" in selected(METHOD, state(), 2, round_) for round_ in range(300))]
    known = state({"a": [0.5, 0.0, 1.0], "b": [-0.5, 0.0, 1.0]}, asked=dict.fromkeys("abcdef", 2), loss=-0.2)
    for exploration in (0.0, 0.5, 100.0):
        method = replace(METHOD, exploration=exploration)
        counts.append(sum(selected(method, known, 1, round_) == ["a"] for round_ in range(300)))
    assert 75 < counts[0] < 125  # 100, deviation 8
    assert counts[1] == 0 < counts[2] < counts[3]


def test_a_client_reports_its_losses_on_the_same_examples_and_its_tokens() -> None:
    calls: list[tuple[list[float], int]] = []

    def losses(adapters: Sequence[Adapter], most: int) -> list[float]:
        calls.append(([float(adapter.tensors[A][0, 0]) for adapter in adapters], most))
        return [0.9, 0.4]

    sent = SharedTensors(lora(2.0))
    work = Flash(rank=1, probe_examples=7).update(client(SHAPES, probe=CallProbe(losses)), Nothing(), sent)
    (request,), (_, reply, trained) = driven(work, lora(5.0))
    assert torch.equal(request.adapter.tensors[A], full(2.0, 1, 2))
    assert calls == [([2.0, 5.0], 7)]
    assert {key: float(number) for key, number in reply.numbers.items()} == pytest.approx(
        {"before": 0.9 / 20, "after": 0.4 / 20, "log_tokens": np.log1p(trained.tokens) / 30}
    )
    assert torch.equal(reply.tensors[A], full(5.0, 1, 2))


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_average_by_hand(weighting: Any) -> None:
    server = replace(SERVER, clients=(ClientInfo("a", 10), ClientInfo("b", 30)))
    after = replace(METHOD, weighting=weighting).aggregate(
        server, state(), {"a": report(1.0, 1.0, 1.0), "b": report(5.0, 1.0, 1.0)}
    )
    torch.testing.assert_close(after.tensors[A], full(3.0 if weighting == "uniform" else 4.0, 1, 2))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"exploration": -0.1}, "method.exploration = -0.1: must be a number of at least 0"),
        ({"exploration": float("nan")}, "method.exploration = nan: must be"),
        ({"token_weight": float("inf")}, "method.token_weight = inf: must be"),
        ({"probe_examples": 0}, "method.probe_examples = 0: must be at least 1"),
        ({"rank": 0}, "rank"),
    ],
)
def test_invalid_values_are_refused(field: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Flash(**field)
    assert Flash(exploration=0.0, token_weight=0.0).exploration == 0.0


def made_run(seed: int) -> list[str]:
    """Those that were selected from round 4 on, of 16 clients and 4 a round.

    Clean clients save more of their loss the better the model is; it gets better by their updates. At the others no
    training saves anything, and the loss before it is larger the better the model fits the clean ones.
    """
    rng, progress, later = np.random.default_rng(seed), 0.0, list[str]()
    infos = tuple(ClientInfo(f"{kind}-{index}", 10) for kind in ("clean", "noisy") for index in range(8))
    server, now = Server(BaseInfo(SHAPES), infos, seed, rounds=20), state()
    for round_ in range(20):
        server = replace(server, round=round_)
        names, replies = METHOD.select(server, now, infos, 4), dict[str, Report]()
        for name in names:
            before = 0.6 - 0.5 * progress if name < "d" else 0.6 + 0.7 * progress**2
            after = before * (0.9 - 0.4 * progress) if name < "d" else 0.58
            noise = rng.normal(0.0, 0.03, 2)
            format_loss = 2.0 * np.exp(-round_)  # the form of the answers, which all learn
            replies[name] = report(rng.normal(), before + 2 * format_loss + noise[0], after + format_loss + noise[1])
        now = METHOD.aggregate(server, now, replies)
        clean = sum(name < "d" for name in names) / 4
        progress = float(np.clip(progress + 0.2 * (clean - 0.35), 0.0, 1.0))
        later += names if round_ >= 4 else []
    return later


def test_clients_whose_training_saves_nothing_are_avoided() -> None:
    shares = [np.mean([name < "d" for name in made_run(seed)]) for seed in range(12)]
    assert np.mean(shares) >= 0.8, shares
    assert np.mean([share >= 0.7 for share in shares]) >= 0.75, shares


NOISY = """
[run]
threads = 1
device = "cpu"

[base]
model = "bundled"

[federation]
rounds = 12
cohort = 0.25

[training]
local_steps = 12
batch_size = 4
learning_rate = 3e-3
max_length = 160

[data]
embedding_share = 0.25
min_examples = 5
validation_cap_classification = 6
test_cap_classification = 6

[data.templates.urgency]
prompt = "### Instruction:\\n{instruction}\\n\\n### Input:\\n{context}\\n\\n### Response:\\n"
context = "context"
answer = "{response}"
options = ["low", "medium", "high"]
"""
SOURCE = """
[[data.source]]
name = "NAME"
path = "PATH"
template = "urgency"
partition = { kind = "iid", clients = 8 }
label_noise = NOISE
"""


@pytest.fixture(scope="module")
def noisy_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen clients with letters of the bundled task; the answers of eight are nearly random."""
    data = Path(fedamole.__file__).parent / "bundled" / "task" / "hospital_north.jsonl"
    path = tmp_path_factory.mktemp("noisy") / "config.toml"
    sources = [("clean", "0.0"), ("noisy", "0.7")]
    text = "".join(
        SOURCE.replace("NAME", name).replace("PATH", str(data)).replace("NOISE", noise) for name, noise in sources
    )
    path.write_text(NOISY + text)
    return path


@pytest.mark.long
def test_clean_clients_are_selected_and_the_model_is_better_than_with_an_even_draw(
    noisy_config: Path, tmp_path: Path, facts: Callable[[Path], list[dict[str, Any]]]
) -> None:
    from fedamole.config import load_config
    from fedamole.experiment import start
    from fedamole.federation.progress import ProgressListener

    losses = {}
    for name in ("flash", "fedit"):
        start(load_config(noisy_config, [f"method.name={name}"]), tmp_path / name, ProgressListener())
        lines = facts(tmp_path / name)
        cohorts = [line["cohort"] for line in lines if line["split"] == "round"]
        clean = np.mean([member.startswith("clean") for cohort in cohorts[4:] for member in cohort])
        last = [line["loss"] for line in lines if (line["split"], line["round"]) == ("validation", 11)]
        losses[name] = np.mean(last)
        print(name, "clean", clean, "loss", losses[name], json.dumps(cohorts))
        if name == "flash":
            assert clean >= 0.7
    assert losses["flash"] < losses["fedit"]
