"""Steerable: two groups with opposite preferences share one LoRA, and a few pairs decide whose model it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pairs import preference_overrides

from fedamole import load_personal_model
from fedamole.config import load_config
from fedamole.data.settings import SourceSettings
from fedamole.errors import ConfigError
from fedamole.evaluation.preferences import pair_log_probabilities, preference_scores
from fedamole.experiment import prepare, start
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import unpack
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.methods.steerable import Steerable
from fedamole.model.bank import Bank
from fedamole.model.params import Adapter
from fedamole.model.pretrained import load_adapter
from fedamole.model.steering import STEERING, example_states, rank_scales, steered
from fedamole.personal.adapt import SENT, adapt
from fedamole.personal.export import export
from fedamole.personal.export_settings import ExportSettings
from fedamole.personal.saved_models import find_model

ITEMS = (
    "the red house",
    "a new law",
    "the old bridge",
    "the mayor",
    "a long war",
    "the school",
    "her book",
    "the king",
)
QUESTIONS = ("Tell me about {}.", "What do you think of {}?", "Write a line on {}.", "Describe {}.", "And {}?")
GOOD = ("I like {} very much.", "{} is good and fine.", "We are glad of {}.")
BAD = ("I do not like {} at all.", "{} is bad and poor.", "We are sorry about {}.")


def rows_of(client: str, fond: bool) -> list[dict[str, str]]:
    """40 pairs of a praise and a complaint; a `fond` client prefers the praise."""
    rows = []
    for index, (question, item) in enumerate((question, item) for question in QUESTIONS for item in ITEMS):
        chosen, rejected = GOOD[index % 3].format(item), BAD[(index * 7 + len(client)) % 3].format(item)
        pair = (chosen, rejected) if fond else (rejected, chosen)
        rows.append({"client": client, "prompt": question.format(item) + "\n", "chosen": pair[0], "rejected": pair[1]})
    return rows


CONFIG = """
[run]
threads = 1
device = "cpu"
[training]
objective = "preference"
local_steps = 5
batch_size = 4
learning_rate = 0.005
max_length = 64
[federation]
rounds = 5
[method]
name = "steerable"
[data]
embedding_share = 0.15
[[data.source]]
name = "pairs"
path = "pairs.jsonl"
partition = {kind = "value", by = "client"}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the bundled base: two clients prefer praise, two complaints."""
    folder = tmp_path_factory.mktemp("steerable")
    clients = {"fond-a": True, "fond-bb": True, "stern-a": False, "stern-bb": False}
    rows = [row for client, fond in clients.items() for row in rows_of(client, fond)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of("new-ccc", False)))
    (folder / "config.toml").write_text(CONFIG)
    start(load_config(folder / "config.toml"), folder / "run", ProgressListener())
    return folder


def test_four_pairs_steer_one_lora_to_opposite_preferences(folder: Path) -> None:
    """With four pairs of its own each client's preference is met; without, one answer for all: 50 % of two groups.

    The pairs of a client with the opposite preference turn the model round.
    """
    prepared = prepare(load_config(folder / "config.toml"))
    method, bank = prepared.config.method, Bank(prepared.base)
    assert isinstance(method, Steerable)
    tensors = unpack(SharedTensors, sorted(folder.glob("run/checkpoints/*.safetensors"))[-1].read_bytes()).tensors
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith(STEERING)}
    lora = {name: tensor for name, tensor in tensors.items() if name not in encoder}
    examples = {name: data.embedding.answer_pairs()[:4] for name, data in prepared.clients.items()}
    targets = {
        name: data.test.answer_pairs() + data.validation.answer_pairs() for name, data in prepared.clients.items()
    }
    assert {len(pairs) for pairs in examples.values()} == {4}

    def score(client: str, context: str | None) -> float:
        states = torch.empty(0, 2, bank.base.width)
        if context is not None:
            states = example_states(bank, examples[context])[0]
        scales = rank_scales(encoder, states, method.heads, method.rank)
        assert context is not None or torch.equal(scales, torch.ones_like(scales))
        bank.load([Adapter(method.spec(), steered(lora, scales))])
        (own,) = pair_log_probabilities(bank, [targets[client]], 4096)
        (untuned,) = pair_log_probabilities(bank, [targets[client]], 4096, reference=True)
        return preference_scores(own, untuned)["preference"]

    conditioned = {client: score(client, client) for client in targets}
    unconditioned = {client: score(client, None) for client in targets}
    opposite = {"fond": "stern", "stern": "fond"}
    swapped = {}
    for client in targets:
        group, _, rest = client.removeprefix("pairs-").partition("-")
        swapped[client] = score(client, f"pairs-{opposite[group]}-{rest}")
    assert min(conditioned.values()) >= 70, conditioned
    assert sum(unconditioned.values()) / 4 == pytest.approx(50, abs=15), unconditioned
    assert max(swapped.values()) <= 30, swapped


def test_the_saved_models_are_plain_loras(folder: Path, tmp_path: Path) -> None:
    """They have the scores of the run, load with PEFT, and can be exported."""
    rows = json.loads((folder / "run" / "summary.json").read_text())["rows"]["steerable"]["clients"]
    assert min(scores["preference"] for scores in rows.values()) >= 70
    saved = {path.parent.name: load_adapter(path) for path in folder.glob("run/clients/*/adapter")}
    assert len(saved) == 4
    tensors = [saved[name].tensors for name in ("pairs-fond-a", "pairs-stern-a")]
    for name in tensors[0]:
        assert torch.equal(tensors[0][name], tensors[1][name]) == name.endswith("/B"), "the scales are in A"
    model, _ = load_personal_model(folder / "run", client="pairs-fond-a")
    assert type(model).__name__ == "PeftModelForCausalLM"
    export(find_model(folder / "run", "pairs-fond-a"), tmp_path / "lora", ExportSettings("lora"))
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()


def test_a_new_client_is_steered_without_training(folder: Path, tmp_path: Path) -> None:
    report = adapt(folder / "run", SourceSettings("new", path=str(folder / "new.jsonl")), tmp_path, steps=0)
    assert report["kept"] == SENT
    assert report["test"][SENT]["preference"] >= 70


def test_what_is_sent_is_lora_and_encoder_alone(runs: Any) -> None:
    """The reply has the names and shapes of the message, in which the scales of a client are not to be found."""
    prepared = prepare(runs.load("steerable", *preference_overrides(runs)))
    folder = runs("steerable", *preference_overrides(runs))
    state = unpack(SharedTensors, sorted(folder.glob("checkpoints/*.safetensors"))[-1].read_bytes())
    method = prepared.config.method
    assert isinstance(method, Steerable)
    names = {name for name in state.tensors if name.startswith(STEERING)}
    assert names == {STEERING + part for part in ("input", "attention", "output", "hidden", "condition", "scales")}
    assert state.tensors[STEERING + "scales"].shape == (len(prepared.base.shapes) * method.rank, 16)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("context_pairs", 0, "method.context_pairs = 0: must be at least 1"),
        ("heads", 0, "method.condition_size = 64: must be a multiple of method.heads = 0"),
        ("condition_size", 20, "method.condition_size = 20: must be a multiple of method.heads = 8"),
    ],
)
def test_sizes_are_checked(field: str, value: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Steerable(**{field: value})  # type: ignore[arg-type]
