"""Training on preference pairs: DPO against a plain loop, groups, counts, and runs of several methods."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.federation.test_distillation import plain_logits
from tests.pairs import double_bank, preference_overrides, training_pairs

from fedamole.data.examples import Shard
from fedamole.errors import ConfigError, RunError
from fedamole.evaluation.preferences import AnswerPair
from fedamole.experiment import prepare, resume
from fedamole.federation.local import LocalTask
from fedamole.federation.method import TrainingRequest, TrainingResult
from fedamole.federation.objective import check_objective, objective_of
from fedamole.federation.preferences import rows_of_pairs
from fedamole.federation.probe import count_tokens
from fedamole.federation.progress import ProgressListener
from fedamole.federation.randomness import torch_generator
from fedamole.federation.settings import TrainingSettings
from fedamole.methods.fedit import FedIT
from fedamole.model.bank import Bank
from fedamole.model.batch import collate
from fedamole.model.params import Adapter, new_shared
from fedamole.model.prompt import PromptSpec, new_prompt
from fedamole.personal.paired_losses import PairedErrors
from fedamole.reporting.choosing import read_candidates

SETTINGS = TrainingSettings(local_steps=4, batch_size=2, learning_rate=1e-2, objective="preference", beta=0.3)
OBJECTIVE = objective_of(SETTINGS)
LORA = FedIT(rank=2, alpha=4.0, dropout=0.0).spec()


@pytest.fixture(scope="module")
def bank(runs: Any) -> Bank:
    return double_bank(runs)


@pytest.fixture(scope="module")
def pairs(runs: Any) -> dict[str, list[AnswerPair]]:
    return training_pairs(runs)


def lora(bank: Bank) -> Adapter:
    tensors = new_shared(bank.base.shapes, 2, torch.Generator().manual_seed(0))
    return Adapter(LORA, {key: (t if t.any() else t + 0.01).double() for key, t in tensors.items()})


def fit(bank: Bank, tasks: list[LocalTask], settings: TrainingSettings = SETTINGS) -> list[TrainingResult]:
    results = OBJECTIVE.fit(bank, tasks, settings, seed=3, round_=1)
    assert all(isinstance(result, TrainingResult) for result in results)
    return [result for result in results if isinstance(result, TrainingResult)]


def tasks(bank: Bank, pairs: dict[str, list[AnswerPair]], adapter: Adapter | None = None) -> list[LocalTask]:
    request = TrainingRequest(adapter or lora(bank))
    return [LocalTask(name, request, rows, 1e-2) for name, rows in pairs.items()]  # type: ignore[arg-type]


def assert_close(result: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-6, atol=1e-8)


def log_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(1).gather(1, labels[:, None]).sum()


def plainly(bank: Bank, task: LocalTask) -> tuple[dict[str, torch.Tensor], float]:
    """The same training, sequence by sequence, by autograd on named tensors."""
    named = {name: t.clone().requires_grad_() for name, t in task.fit.adapter.tensors.items()}
    adam, queue, losses = torch.optim.Adam(named.values(), lr=1e-2), list[int](), list[float]()
    generator = torch_generator(3, "order", task.client, 1)
    for _ in range(4):
        if len(queue) < 2:
            queue += torch.randperm(len(task.rows), generator=generator).tolist()
        chosen_pairs, queue = [task.rows[i] for i in queue[:2]], queue[2:]
        loss = torch.zeros((), dtype=torch.float64)
        for prompt, answers in chosen_pairs:
            ratios = []
            for answer in answers:
                batch = collate([[(prompt, answer)]], bank.base.pad_id)  # type: ignore[list-item]
                own = log_probability(plain_logits(bank, task.fit.adapter, named, batch), batch.labels)
                with torch.no_grad(), bank.forward(batch) as logits:
                    reference = log_probability(logits, batch.labels)
                ratios.append(own - reference)
            loss = loss - torch.log(torch.sigmoid(0.3 * (ratios[0] - ratios[1]))) / 2
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    return {name: t.detach() for name, t in named.items()}, sum(losses) / 4


def test_training_is_that_of_a_plain_loop(bank: Bank, pairs: dict[str, list[AnswerPair]]) -> None:
    results = fit(bank, tasks(bank, pairs))
    for task, result in zip(tasks(bank, pairs), results, strict=True):
        expected, loss = plainly(bank, task)
        assert_close(result.adapter.tensors, expected)
        assert result.loss == pytest.approx(loss, rel=1e-5)
    assert results[0].loss != results[1].loss


def test_a_group_trains_as_each_client_alone(bank: Bank, pairs: dict[str, list[AnswerPair]]) -> None:
    together = fit(bank, tasks(bank, pairs))
    for task, result in zip(tasks(bank, pairs), together, strict=True):
        (single,) = fit(bank, [task])
        assert_close(single.adapter.tensors, result.adapter.tensors)
        assert (single.tokens, single.teacher_tokens) == (result.tokens, result.teacher_tokens)


def test_the_first_step_starts_at_ln_2(bank: Bank, pairs: dict[str, list[AnswerPair]]) -> None:
    """B = 0 is the base: no log ratio. Accumulation and batch size do not change it."""
    fresh = Adapter(LORA, {name: t.double() for name, t in new_shared(bank.base.shapes, 2, torch.Generator()).items()})
    settings = replace(SETTINGS, local_steps=1, accumulation=2)
    (first, _) = fit(bank, tasks(bank, pairs, fresh), settings)
    assert first.loss == pytest.approx(math.log(2))


def test_both_answers_and_the_reference_are_counted(bank: Bank, pairs: dict[str, list[AnswerPair]]) -> None:
    """In four steps of two pairs each the policy reads 16 sequences, and the reference reads them too."""
    rows = pairs["pairs-fond"][:2]
    (result,) = fit(bank, [LocalTask("pairs-fond", TrainingRequest(lora(bank)), rows, 1e-2)])  # type: ignore[arg-type]
    once = count_tokens(rows_of_pairs(rows))
    assert (result.tokens, result.teacher_examples, result.teacher_tokens) == (4 * once, 8, 4 * once)


def test_virtual_tokens_are_hidden_from_the_reference(bank: Bank, pairs: dict[str, list[AnswerPair]]) -> None:
    spec = PromptSpec(3)
    tensors = new_prompt(spec, bank.base.width, 0.02, torch.Generator().manual_seed(0))
    prompt = Adapter(spec, {name: tensor.double() for name, tensor in tensors.items()})
    rows = pairs["pairs-fond"][:2]
    (result,) = fit(bank, [LocalTask("pairs-fond", TrainingRequest(prompt), rows, 1e-2)])  # type: ignore[arg-type]
    once = count_tokens(rows_of_pairs(rows))
    assert (result.tokens, result.teacher_tokens) == (4 * (once + 4 * 3), 4 * once)
    assert not torch.equal(result.adapter.tensors["prompt/embedding"], prompt.tensors["prompt/embedding"])


def test_dropout_is_that_of_the_model_alone(bank: Bank, pairs: dict[str, list[AnswerPair]]) -> None:
    """With B = 0 dropout changes nothing, so the loss is ln 2 unless dropout touched the reference."""
    spec = replace(LORA, dropout=0.5)
    fresh = new_shared(bank.base.shapes, 2, torch.Generator().manual_seed(0))
    adapter = Adapter(spec, {name: tensor.double() for name, tensor in fresh.items()})
    (result, _) = fit(bank, tasks(bank, pairs, adapter), replace(SETTINGS, local_steps=1))
    assert result.loss == pytest.approx(math.log(2))


# --- runs -----------------------------------------------------------------------------------------------------

STEPS = ("training.local_steps=8", "training.learning_rate=0.02", "training.batch_size=4")


@pytest.mark.parametrize("method", ["local_only", "fedamole"])
def test_personal_models_learn_opposite_preferences(method: str, runs: Any) -> None:
    folder = runs(method, *preference_overrides(runs), *STEPS)
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    scores = {client: values["preference"] for client, values in rows[method]["clients"].items()}
    assert set(scores) == {"pairs-fond", "pairs-stern"}
    assert min(scores.values()) >= 75, scores
    for base in rows["base"]["clients"].values():
        assert (base["preference"], base["score"]) == (50, 50)
        assert base["loss"] == pytest.approx(math.log(2))
    assert {values["score"] for values in rows["majority"]["clients"].values()} == {50}
    assert all(values["loss"] < 0.6 for values in rows[method]["clients"].values())


def test_one_shared_lora_cannot_have_opposite_preferences(runs: Any) -> None:
    rows = json.loads((runs("fedit", *preference_overrides(runs), *STEPS) / "summary.json").read_text())["rows"]
    alone = json.loads((runs("local_only", *preference_overrides(runs), *STEPS) / "summary.json").read_text())["rows"]
    losses = [
        [values["loss"] for values in summary["clients"].values()] for summary in (rows["fedit"], alone["local_only"])
    ]
    assert sum(losses[0]) / 2 > 0.6
    assert sum(losses[1]) / 2 < 0.4
    lines = list(map(json.loads, (runs("fedit", *preference_overrides(runs), *STEPS) / "metrics.jsonl").open()))
    train = [line for line in lines if line["split"] == "train"]
    assert {line["probed"] for line in train} == {8 * 4}, "the reference model read each pair"
    assert all(line["forward_tokens"] == line["backward_tokens"] for line in train)


def test_a_resumed_run_equals_an_uninterrupted_run(crash: Callable[..., Path], runs: Any, remains: Any) -> None:
    overrides = preference_overrides(runs)
    folder = crash("round-0001.safetensors", 1, "local_only", *overrides)
    resume(folder, ProgressListener())
    assert remains(folder) == remains(runs("local_only", *overrides))


# --- objective and rows ---------------------------------------------------------------------------------------


def test_objective_and_rows_must_fit(runs: Any) -> None:
    message = "the rows of client 'entail' have no rejected answers; use a template"
    with pytest.raises(ConfigError, match=re.escape('training.objective = "preference": ' + message)):
        prepare(runs.load("fedit", "training.objective=preference"))
    message = "the rows of client 'pairs-fond' are preference pairs; set"
    with pytest.raises(ConfigError, match=re.escape('training.objective = "answer": ' + message)):
        prepare(runs.load("fedit", *preference_overrides(runs), "training.objective=answer"))


def test_a_client_of_a_deployment_checks_its_own_rows(runs: Any) -> None:
    from fedamole.data.examples import Example

    example = Example("p", "", "", "a", rejected="b")
    shard = Shard("own", *[(example,)] * 4)
    check_objective(SETTINGS, [shard])
    with pytest.raises(ConfigError, match="the rows of client 'own' are preference pairs"):
        check_objective(TrainingSettings(), [shard])


def test_a_model_card_says_what_its_loss_and_score_are(runs: Any) -> None:
    folder = runs("local_only", *preference_overrides(runs), *STEPS)
    text = (folder / "clients" / "pairs-fond" / "adapter" / "README.md").read_text()
    assert "prompts with pairs of a chosen and a rejected answer" in text
    assert "| preference |" in text.replace("\\", "")
    assert "losses in nats of DPO per pair" in text


def test_the_margin_of_a_choice_is_that_of_pairs(runs: Any) -> None:
    """The losses of the validation pairs have the stored mean, each pair counts once, and betas must be equal."""
    overrides = (*preference_overrides(runs), *STEPS)
    folders = [runs("local_only", *overrides), runs("fedit", *overrides)]
    first, second = read_candidates(folders, "local_only")
    errors, client = PairedErrors("cpu"), "pairs-fond"
    result, losses = errors(client, first, second), []
    for candidate in (first, second):
        values = errors.losses[candidate.run.path, candidate.variant, client]
        assert sum(values) / len(values) == pytest.approx(candidate.validation[client], abs=1e-4)
        losses.append(torch.tensor(values))
    differences = losses[0] - losses[1]
    assert result == pytest.approx(float(differences.std() / len(differences) ** 0.5), rel=1e-4)
    (other,) = read_candidates([runs("local_only", *overrides, "training.beta=0.5")], "local_only")
    with pytest.raises(RunError, match=r"different training\.beta, so their validation losses are not comparable"):
        PairedErrors("cpu")(client, first, other)
