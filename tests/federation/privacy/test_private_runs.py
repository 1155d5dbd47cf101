"""Private runs: the ledger at every kill point, the stop at the budget, and what is refused before a run."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedamole.errors import ConfigError, RunError
from fedamole.experiment import prepare, resume, worker_of
from fedamole.federation.method import BaseInfo, Server
from fedamole.federation.privacy.accounting import epsilon_of
from fedamole.federation.privacy.budget import Budget
from fedamole.federation.privacy.ledger import Ledger
from fedamole.federation.private_worker import PrivateWorker
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import pack
from fedamole.methods import METHODS
from fedamole.model.bank import Bank
from fedamole.runs.run_folder import RunFolder

PRIVATE = ("privacy.epsilon=8",)
CLIENTS = ("chat", "entail", "mood", "plain")


def spent(folder: Path, client: str) -> list[tuple[int, int]]:
    return [(e.round, e.steps) for e in Ledger(RunFolder(folder), client).entries]


def test_a_run_spends_its_budget_and_no_more(runs: Any) -> None:
    folder = runs("fedit", *PRIVATE)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    for client in CLIENTS:
        epsilons = [x["epsilon"] for x in lines if x["split"] == "train" and x["client"] == client]
        entries = Ledger(RunFolder(folder), client).entries
        assert spent(folder, client) == [(0, 3), (1, 3), (2, 3)]
        for done, epsilon in enumerate(epsilons, 1):
            assert epsilon == epsilon_of([e.noised for e in entries[:done]], 1e-5)
        assert sorted(epsilons) == epsilons
        assert 7.9 < epsilons[-1] <= 8
        folder_of_client = folder / "clients" / client / "private"
        assert {path.stat().st_mode & 0o777 for path in folder_of_client.iterdir()} == {0o600}


def test_a_method_that_stays_local_or_trains_two_adapters_is_charged_for_what_leaves(runs: Any) -> None:
    for method, steps in (("local_only", 0), ("ditto", 2)):
        folder = runs.fresh(method, "federation.rounds=1", *PRIVATE)
        assert spent(folder, "mood") == [(0, steps)]


POINTS = {
    "state written, answer not": ("state/round-0001.safetensors", 1, True),
    "answer written, ledger not": ("private/round-0001.safetensors", 1, True),
    "ledger written, answer not sent": ("private/ledger.jsonl", 5, False),
    "all clients answered, round not committed": ("checkpoints/round-0001.safetensors", 1, False),
    "round committed": ("checkpoints/round-0001.json", 1, False),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_resumed(point: str, runs: Any, crash: Any) -> None:
    """An answer that left is sent again, byte by byte, and charged once; one that had not left is drawn anew."""
    path, nth, anew = POINTS[point]
    folder = crash(path, nth, "fedit", *PRIVATE, "run.group=1")
    charged = (folder / "clients/chat/private/ledger.jsonl").read_text()
    answer = folder / "clients/chat/private/round-0001.safetensors"
    before = answer.read_bytes() if answer.exists() else b""
    assert ('"round": 1' in charged) is not anew
    resume(folder, ProgressListener())
    for client in CLIENTS:
        assert spent(folder, client) == [(0, 3), (1, 3), (2, 3)]
    assert (folder / "clients/chat/private/ledger.jsonl").read_text().startswith(charged)
    assert (answer.read_bytes() == before) is not anew


@pytest.fixture
def worker(runs: Any, tmp_path: Path) -> Any:
    """A worker in an empty folder, its data, and a message of another scale for each number."""
    config = prepare(runs.load("fedit", *PRIVATE)).config
    prepared = prepare(config)
    RunFolder.create(tmp_path / "run", "", "{}", "fedit", prepared.base.identity)
    worker = worker_of(config, Bank(prepared.base), RunFolder(tmp_path / "run"))
    assert isinstance(worker, PrivateWorker)
    data = prepared.clients["mood"]
    state = config.method.init(Server(BaseInfo.of(prepared.base), (data.info,), 0, rounds=3))
    tensors = config.method.message(state, data.info).tensors

    def ask(round_: int, scale: float = 1.0) -> Any:
        message = replace(state, tensors={key: tensor * scale for key, tensor in tensors.items()})
        return worker.update([data], round_, {"mood": pack(message)})["mood"]

    return ask, tmp_path / "run"


def test_the_same_request_is_free_and_another_one_is_charged(worker: Any) -> None:
    ask, folder = worker
    first, again = ask(0), ask(0)
    assert first.payload == again.payload
    assert first.report == again.report
    assert spent(folder, "mood") == [(0, 3)]
    other = ask(0, 2.0)
    assert other.payload != first.payload
    assert spent(folder, "mood") == [(0, 3), (0, 3)]
    assert other.report["epsilon"] > first.report["epsilon"]


def test_the_client_stops_at_its_budget(worker: Any) -> None:
    """A coordinator that asks round 0 again and again, as one restored from an older checkpoint, gets three answers."""
    ask, folder = worker
    answers = [ask(0, scale) for scale in (1.0, 2.0, 3.0, 4.0)]
    assert [answer.payload is None for answer in answers] == [False, False, False, True]
    assert re.match(
        r"privacy budget spent: client mood has used epsilon 7\.9\d+ of 8, and", answers[3].report["failed"]
    )
    assert len(spent(folder, "mood")) == 3
    assert ask(0, 3.0).payload == answers[2].payload  # what was sent before may be sent again


def test_a_damaged_ledger_is_no_empty_ledger(worker: Any) -> None:
    ask, folder = worker
    ask(0)
    ledger = folder / "clients/mood/private/ledger.jsonl"
    for damage in ("no json\n", '{"round": 0}\n', ledger.read_text().replace('"steps": 3', '"steps": -3')):
        ledger.write_text(damage)
        with pytest.raises(RunError, match=r"ledger\.jsonl is damaged"):
            ask(1)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_declares_its_reply_or_is_refused_by_name(name: str, runs: Any) -> None:
    declared = {"fedit", "ffa_lora", "fedsvd", "fedprox", "ditto", "flora", "fedex_lora", "local_only"}
    if name.removesuffix("_ft") in declared:
        assert runs.load(name, *PRIVATE).privacy.epsilon == 8
        return
    with pytest.raises(ConfigError, match=rf"\[privacy\]: the method {name} cannot be made private: "):
        runs.load(name, *PRIVATE)


def test_a_mixture_is_private_with_an_assignment_that_reads_no_embeddings(runs: Any) -> None:
    with pytest.raises(ConfigError, match=r'token_embedding \(mean_embedding\).*set method.assignment = "static"'):
        runs.load("fedamole", *PRIVATE)
    for kind in ("static", "random"):
        runs.fresh("fedamole", f"method.assignment={kind}", "federation.rounds=2", *PRIVATE)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("privacy.epsilon=0", "privacy.epsilon = 0.0: must be above 0"),
        ("privacy.delta=1", "privacy.delta = 1.0: must be at least"),
        ("privacy.clip=0", "privacy.clip = 0.0: must be at least"),
        ("privacy.unit=client", 'privacy.unit = "client" is not available yet'),
        ("federation.patience=2", "federation.patience = 2 stops a run by validation scores"),
        ("evaluation.best_round=mean", 'evaluation.best_round = "mean" chooses by the validation scores'),
        ('deployment.clients=["a","b"]', "not available in a deployment yet"),
        ("training.objective=preference", 'objective = "preference" is not available'),
    ],
)
def test_settings_that_cannot_be_private_are_refused(override: str, message: str, runs: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        runs.load("fedit", "privacy.delta=1e-5", override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.batch_size=64"], r"client \w+ has \d+ training examples, fewer than the 64 of a step"),
        (["privacy.delta=0.09"], r"privacy.delta = 0.09: must be below 1 / \d+, as client"),
        (["privacy.epsilon=0.001"], r"noise of \d+ times the clip in each of 9 steps.*epsilon = [\d.]+ would fit"),
        (["privacy.epsilon=0.005", "federation.rounds=200"], r"would fit or federation.rounds = \d+"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused_with_what_would_fit(
    overrides: list[str], message: str, runs: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(runs.load("fedit", *PRIVATE, *overrides))


def test_the_plan_shows_noise_against_signal(runs: Any, fedamole: Any) -> None:
    """4 values, noise 3 times a clip of 2, batch 2: a norm of 3 * 2 * 2 = 12 against 2 * 2 = 4."""
    config = runs.load("fedit", *PRIVATE, "privacy.clip=2")

    class Fixed(Budget):
        def noise(self, examples: int) -> float:
            return 3.0

    text = Fixed(config.privacy, config.training, config.method, 3).describe("mood", 20, 4)
    assert "Its norm is 12, that of a step's gradients at most 4 (3.0 times as much noise). For less: " in text
    result = fedamole("plan", runs.config, "method.name=fedit", "privacy.epsilon=8")
    assert re.search(r"privacy +epsilon 8 at delta 1e-05 for \w+, with \d+ examples: noise of", result.out)
    assert "privacy" not in fedamole("plan", runs.config, "method.name=fedit").out


def test_a_repeated_answer_brings_its_private_state_back(runs: Any, crash: Any) -> None:
    """A resumed run removes the states of the round; Ditto's own LoRA after it comes back with the answer."""
    folder = crash("private/ledger.jsonl", 5, "ditto", *PRIVATE, "run.group=1", "federation.rounds=2")
    state = folder / "clients/chat/state/round-0001.safetensors"
    before = state.read_bytes()
    resume(folder, ProgressListener())
    assert state.read_bytes() == before
    assert spent(folder, "chat") == [(0, 2), (1, 2)]
