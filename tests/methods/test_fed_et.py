"""Fed-ET: the consensus by hand, what it is worth on the bundled task, and the second base of the server."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.bundled_rounds import BundledRounds, Replies
from torch import Tensor

from fedamole.config import load_config
from fedamole.data.tokens import TokenRow
from fedamole.deployment.shared_config import own_tables, shared_tables
from fedamole.errors import BaseModelError, ConfigError
from fedamole.experiment import prepare, public_rows, reads_outside, resume
from fedamole.federation.progress import ProgressListener
from fedamole.methods.fed_et import FedEt
from fedamole.methods.shared.ensemble import (
    PromptClasses,
    class_logits,
    consensus,
    ordered_rows,
    prompt_classes,
)
from fedamole.methods.shared.ranks import rank_of
from fedamole.model.params import Adapter, new_shared
from fedamole.runs.identity import Identity
from fedamole.runs.run_folder import RunFolder

BOTH = torch.tensor([[True, True]])


def agreed(*logits: list[float]) -> Any:
    return consensus(torch.tensor([[values] for values in logits]), BOTH)


def test_a_consensus_by_hand() -> None:
    """Variances 2 and 0.5, so weights 0.8 and 0.2; only the second model chooses the second class."""
    result = agreed([2.0, 0.0], [0.5, 1.5])
    assert result.weights[:, 0].tolist() == pytest.approx([0.8, 0.2])
    assert result.logits[0].tolist() == pytest.approx([1.7, 0.3])
    assert result.labels.tolist() == [0]
    assert result.dissent[0].tolist() == pytest.approx([0.2689, 0.7311], abs=1e-4)
    assert not agreed([2.0, 0.0], [1.5, 0.5]).dissent.any(), "both choose the first class"


def test_models_without_a_preference_count_alike_and_broken_ones_not_at_all() -> None:
    assert agreed([1.0, 1.0], [3.0, 3.0]).weights[:, 0].tolist() == [0.5, 0.5]
    for value in (float("nan"), float("inf")):
        result = agreed([value, 0.0], [0.5, 1.5])
        assert result.weights[:, 0].tolist() == [0.0, 1.0]
        assert result.labels.tolist() == [1]
        assert not result.dissent.any()


def test_prompts_may_have_different_classes() -> None:
    """Options that begin alike are one class; without two classes, the most probable tokens of both models are."""
    rows = [TokenRow((1,), (), ((4, 0), (4, 5), (2, 0))), TokenRow((2,), (), ())]
    logits = [torch.tensor([[0.0] * 6, [0, 9, 0, 8, 0, 0]]), torch.tensor([[0.0] * 6, [0, 0, 0, 8, 0, 9]])]
    classes = prompt_classes(rows, logits, 3)
    assert classes.ids[0].tolist() == [4, 2, 0]
    assert sorted(classes.ids[1].tolist()) == [1, 3, 5]
    assert classes.valid.tolist() == [[True, True, False], [True] * 3]
    filled = PromptClasses(torch.tensor([[0, 1, 0]]), torch.tensor([[True, True, False]]))
    three = torch.stack([class_logits(torch.tensor([values]), filled) for values in ([2.0, 0.0], [0.5, 1.5])])
    result = consensus(three, filled.valid)
    assert result.weights[:, 0].tolist() == pytest.approx([0.8, 0.2]), "a class that does not exist has no influence"
    assert result.dissent[0].tolist() == pytest.approx([0.2689, 0.7311, 0.0], abs=1e-4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("diversity_weight", -0.1),
        ("diversity_weight", float("inf")),
        ("server_steps", 0),
        ("transfer_steps", 0),
        ("public_prompts", 0),
        ("free_text_tokens", 1),
    ],
)
def test_wrong_values_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.{key} = {value}: must be at least "):
        FedEt(**{key: value})  # type: ignore[arg-type]


def test_the_servers_steps_are_planned() -> None:
    assert FedEt(ranks=(2, 4, 2), server_steps=10, transfer_steps=3).steps_at_server() == 16


# --- on the bundled base --------------------------------------------------------------------------------------

HOSPITALS = ("hospital_north", "hospital_south")
TASK = Path(__file__).parents[2] / "src" / "fedamole" / "bundled" / "task"


def test_the_consensus_is_at_least_as_good_as_the_mean_model_and_an_untrained_one_counts_less(tmp_path: Path) -> None:
    """Two trained hospitals and an untrained model, on letters of another hospital split whose answers are known."""
    bundled, sent = BundledRounds(tmp_path, HOSPITALS), dict[str, Any]()
    overrides = (
        "training.local_steps=40",
        "method.server_steps=20",
        "method.transfer_steps=5",
        f"data.public={{path='{TASK / 'hospital_north.test.jsonl'}',template='urgency'}}",
    )

    def record(replies: Replies) -> Replies:
        sent.update(replies)
        return replies

    state, _ = bundled.train("fed_et", *overrides, rounds=3, changed=record)
    config = bundled.config("fed_et", 3, overrides)
    method, public = config.method, public_rows(config, bundled.prepared.base, None)
    assert isinstance(method, FedEt)
    assert public is not None
    rows = ordered_rows(public.rows)
    shapes = bundled.prepared.base.shapes
    loras = {**{name: it.tensors for name, it in sent.items()}, "untrained": new_shared(shapes, 2, torch.Generator())}

    from fedamole.federation.prompt_states import prompt_states

    def read(tensors: Any, rank: int) -> Tensor:
        adapter = Adapter(method.spec_of(rank), tensors)
        return prompt_states(bundled.bank, adapter, [row.prompt for row in rows], 4096).logits

    logits = [read(tensors, rank_of(tensors)) for tensors in loras.values()]
    classes = prompt_classes(rows, logits, 8)
    assert classes.ids.shape[1] == 3, "low, medium and high"
    result = consensus(torch.stack([class_logits(each, classes) for each in logits]), classes.valid)
    answers = torch.tensor([row.answer[0] for row in rows]).unsqueeze(1)

    def accuracy(labels: Tensor) -> float:
        return float((classes.ids.gather(1, labels.unsqueeze(1)) == answers).double().mean())

    single = [accuracy(class_logits(each, classes).argmax(1)) for each in logits]
    weights = result.weights.mean(1).tolist()
    server = accuracy(class_logits(read(state.server, method.rank), classes).argmax(1))
    print(f"accuracies {single}, consensus {accuracy(result.labels)}, weights {weights}, server {server}")
    assert accuracy(result.labels) >= sum(single) / len(single)
    assert weights[2] < min(weights[:2])
    assert server > single[2], "the server's model learns from the consensus, without an answer"


def test_rows_are_in_the_order_in_which_they_are_read(tmp_path: Path) -> None:
    from fedamole.federation.prompt_states import prompt_states

    bundled = BundledRounds(tmp_path, HOSPITALS)
    rows = ordered_rows([TokenRow(prompt, (), ()) for prompt in ((9, 8, 7), (5, 6), (9, 3, 4), (5, 6), (4, 6))])
    assert [row.prompt for row in rows] == [(4, 6), (5, 6), (9, 3, 4), (9, 8, 7)]
    together = prompt_states(bundled.bank, None, [row.prompt for row in rows], 4096).logits
    alone = torch.cat([prompt_states(bundled.bank, None, [row.prompt], 4096).logits for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


# --- the second base ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Folders of bases with the tokenizer of the tiny base, and more layers and another width."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    def write(seed: int) -> Path:
        folder = tmp_path_factory.mktemp("larger")
        AutoTokenizer.from_pretrained(tiny / "base").save_pretrained(folder)
        values = json.loads((tiny / "base" / "config.json").read_text())
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            LlamaForCausalLM(
                LlamaConfig(**{**values, "hidden_size": 48, "head_dim": 12, "num_hidden_layers": 3})
            ).save_pretrained(folder)
        return folder

    return write


def test_a_run_with_a_second_base_resumes_to_the_same_bytes(
    larger: Any, runs: Any, crash: Any, remains: Callable[[Path], Any]
) -> None:
    base = larger(3)
    override = f"method.server_base={base}"
    folder = crash("client_done", 6, "fed_et", override)
    resume(folder, ProgressListener())
    finished = runs("fed_et", override)
    assert remains(folder) == remains(finished)
    assert remains(finished) != remains(runs("fed_et")), "another base teaches something else"
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").open()]
    server = [line for line in lines if line["split"] == "server"]
    assert [line["steps"] for line in server] == [3 + 3 * 32] * 3
    assert all(0 <= line["consensus_agreement"] <= 1 for line in server)
    stored = RunFolder.open(finished).second_base
    assert stored is not None
    assert stored.weights != RunFolder.open(finished).about["base"]["weights"]
    assert RunFolder.open(runs("fed_et")).second_base is None


def test_a_run_is_not_resumed_with_other_weights(larger: Any, crash: Any) -> None:
    base, other = larger(3), larger(4)
    folder = crash("round_done", 1, "fed_et", f"method.server_base={base}")
    (base / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(BaseModelError, match=r"^method.server_base = .* is not the base that the run was started with"):
        resume(folder, ProgressListener())


def test_bases_that_are_refused(larger: Any, runs: Any, tmp_path: Path) -> None:
    cases = {
        "bundled": r"^method.server_base = 'bundled': its tokenizer is not that of base.model = ",
        f"{tmp_path}/none": r"^method.server_base = .*none': there is no folder ",
    }
    for base, error in cases.items():
        with pytest.raises(BaseModelError, match=error):
            prepare(runs.load("fed_et", f"method.server_base={base}", "run.device=cpu"))
    base = larger(3)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**values, "max_position_embeddings": 16}))
    with pytest.raises(ConfigError, match=r"^training.max_length = \d+: method.server_base = .* has 16 positions"):
        prepare(runs.load("fed_et", f"method.server_base={base}", "run.device=cpu"))


def test_a_relative_path_starts_at_the_configs_folder_and_is_named_before_a_resume(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "large").mkdir()
    text = f'extends = "{tiny / "config.toml"}"\n[method]\nname = "fed_et"\nserver_base = "large"\n'
    (tmp_path / "config.toml").write_text(text)
    config = load_config(tmp_path / "config.toml")
    assert config.method.second_base() == str((tmp_path / "large").resolve())
    outside = reads_outside(config, tmp_path / "run")
    assert f"base {(tmp_path / 'large').resolve()}" in outside
    assert f"base {(tmp_path / 'large').resolve()}" not in reads_outside(config, tmp_path / "run", sources=())


def test_clients_are_not_sent_its_path_and_load_nothing(tiny: Path) -> None:
    config = load_config(tiny / "config.toml", ["method.name=fed_et", "method.server_base=/secret/large"])
    shared = shared_tables(config, Identity("a", "b", "c"))
    assert "/secret" not in json.dumps(shared)
    source = {"name": "mood", "path": "mood.jsonl"}
    assert "server_base" not in own_tables(shared, source, {}, "bundled")["method"]
    shared["config"]["method"]["server_base"] = "/etc"
    with pytest.raises(ConfigError, match=r"the server sets method.server_base, which every client sets for itself"):
        own_tables(shared, source, {}, "bundled")
