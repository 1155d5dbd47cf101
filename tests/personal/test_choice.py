"""The models that clients chose with `fedamole choose`, and standard errors from losses that are computed again."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedamole.errors import RunError
from fedamole.personal.choice_folder import write_choice
from fedamole.personal.paired_losses import PairedErrors, standard_error
from fedamole.personal.saved_models import find_model, outside_reads, saved_models
from fedamole.reporting.choosing import Candidate, Choice, choose, read_candidates

ALONE = "local_only"
RULES = ("federation.rounds=1", "evaluation.select=loss")


@pytest.fixture
def candidates(runs: Any) -> list[Candidate]:
    return read_candidates([runs(method, *RULES) for method in (ALONE, "fedit", "fedamole")], ALONE)


def none_needed(*_: Any) -> float:
    raise AssertionError


def test_the_standard_error_of_a_difference() -> None:
    """Equal lengths: that of a mean. Differences 1, 2, 6 per token: deviation sqrt(7), error sqrt(7 / 3)."""
    zero = [0.0, 0.0, 0.0]
    assert standard_error([1.0, 2.0, 6.0], zero, [1, 1, 1]) == pytest.approx(math.sqrt(7 / 3))
    # Two tokens each halve it.
    assert standard_error([1.0, 2.0, 6.0], zero, [2, 2, 2]) == pytest.approx(math.sqrt(7 / 3) / 2)
    # Lengths 1 and 3 with differences 2 and 2: the ratio is 1, so 1 and -1 remain: sqrt(2 * 2) / 4.
    assert standard_error([2.0, 2.0], [0.0, 0.0], [1, 3]) == pytest.approx(0.5)
    # A constant difference per token has no error, and the pairs matter, not the spread of each model.
    assert standard_error([5.0, 20.0], [4.0, 18.0], [1, 2]) == 0.0
    assert standard_error([1.0], [0.0], [1]) == math.inf


def test_losses_of_examples_add_up_to_the_stored_validation(candidates: list[Candidate]) -> None:
    """Of every method and client: the saved model is that of the best round, scored on the same examples."""
    errors = PairedErrors("cpu")
    alone = candidates[0]
    for candidate in candidates[1:]:
        for client in ("chat", "mood"):
            results = errors(client, candidate, alone)
            assert 0 < results < math.inf
            assert results == errors(client, alone, candidate)
            tokens = sum(len(row.answer) for row in errors.rows[client])
            for item in (candidate, alone):
                total = sum(errors.losses[item.run.path, item.variant, client])
                assert total / tokens == pytest.approx(item.validation[client], abs=1e-4)


def test_a_margin_brings_clients_back_to_training_alone(candidates: list[Candidate]) -> None:
    by_margin = [choose(candidates, margin, PairedErrors("cpu")) for margin in (0.0, 1e6)]
    others = [[choice.client for choice in choices if not choice.chosen.alone] for choices in by_margin]
    assert others[0], "choose other runs: here nobody leaves training alone"
    assert others[1] == []


def test_an_untuned_model_is_scored_on_the_base(runs: Any) -> None:
    absent = runs("fedamole", "federation.cohort=0.25", "federation.rounds=1")
    candidates = read_candidates([runs(ALONE, *RULES), absent], ALONE)
    [client, *_] = sorted(candidates[1].untuned)
    errors = PairedErrors("cpu")
    errors(client, candidates[1], candidates[0])
    tokens = sum(len(row.answer) for row in errors.rows[client])
    total = sum(errors.losses[absent, "fedamole", client])
    assert total / tokens == pytest.approx(candidates[1].validation[client], abs=1e-4)


@pytest.fixture
def mixed(candidates: list[Candidate], tmp_path: Path) -> Path:
    """chat and plain take training alone, entail fedit, mood fedamole."""
    names = ("chat", "entail", "mood", "plain")
    choices = [Choice(name, candidates[location % 3], candidates[0]) for location, name in enumerate(names)]
    write_choice(tmp_path / "mine", choices)
    return tmp_path / "mine"


def test_chosen_models_are_found_in_their_runs(mixed: Path, candidates: list[Candidate]) -> None:
    models = saved_models(mixed)
    assert [model.client for model in models] == ["chat", "entail", "mood", "plain"]
    paths = [candidates[location % 3].run.path for location in range(4)]
    assert [model.folder for model in models] == [
        path / "clients" / model.client / "adapter" for path, model in zip(paths, models, strict=True)
    ]
    assert find_model(mixed, "mood").folder == models[2].folder
    assert f"reads files outside {mixed}: model {models[2].folder}" in outside_reads(models[2], False)
    with pytest.raises(RunError, match=r"mine has no client 'nobody'"):
        find_model(mixed, "nobody")
    with pytest.raises(RunError, match=r"mine has one chosen model for each client: leave out --variant"):
        saved_models(mixed, "fedit")


def test_commands_use_the_chosen_models(mixed: Path, fedamole: Any, tmp_path: Path) -> None:
    answered = [
        fedamole("generate", folder, "--client", "mood", "--set", "text=a cup", "--json", "--device", "cpu").out
        for folder in (mixed, find_model(mixed, "mood").folder.parents[2])
    ]
    assert json.loads(answered[0]) == json.loads(answered[1])
    fedamole("export", mixed, "--client", "chat", "--to", "lora", "--out", tmp_path / "lora", "--device", "cpu")
    assert (tmp_path / "lora" / "adapter_config.json").exists()


def test_a_client_with_the_untuned_base_has_no_model(runs: Any, tmp_path: Path) -> None:
    absent = runs("fedamole", "federation.cohort=0.25", "federation.rounds=1")
    candidates = read_candidates([absent], "fedamole")
    write_choice(tmp_path / "mine", choose(candidates, 0.0, none_needed))
    [client, *_] = sorted(candidates[0].untuned)
    assert len(saved_models(tmp_path / "mine")) == 1
    with pytest.raises(RunError, match=rf"{client} did not train in any round .* its model is the untuned base"):
        find_model(tmp_path / "mine", client)


def test_a_folder_that_cannot_be_written(candidates: list[Candidate], mixed: Path, tmp_path: Path, runs: Any) -> None:
    choices = choose(candidates, 0.0, none_needed)
    with pytest.raises(RunError, match="mine"):
        write_choice(mixed, choices)
    copy = tmp_path / "copy"
    shutil.copytree(runs(ALONE, *RULES), copy)
    shutil.rmtree(copy / "clients" / "mood")
    missing = choose(read_candidates([copy], ALONE), 0.0, none_needed)
    with pytest.raises(RunError, match=r"copy has no saved model 'local_only' of mood: put it back from a copy"):
        write_choice(tmp_path / "other", missing)
    assert not (tmp_path / "other").exists()


def test_a_choice_of_another_run_or_a_damaged_one(runs: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs(ALONE, *RULES), copy)
    write_choice(tmp_path / "mine", choose(read_candidates([copy], ALONE), 0.0, none_needed))
    assert json.loads((tmp_path / "mine" / "choice.json").read_text())["clients"]["mood"]["run"] == "../copy"
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("mine", "copy"):  # both together: the paths are relative
        shutil.move(tmp_path / name, moved / name)
    assert len(saved_models(moved / "mine")) == 4
    about = json.loads((moved / "copy" / "run.json").read_text()) | {"id": "another"}
    (moved / "copy" / "run.json").write_text(json.dumps(about))
    with pytest.raises(RunError, match=r"copy is not the run that chat chose any more: repeat `fedamole choose`"):
        saved_models(moved / "mine")
    shutil.rmtree(moved / "copy")
    with pytest.raises(RunError, match=r"copy, the run that \w+ chose, is missing: move the runs together with .*mine"):
        saved_models(moved / "mine")
    file = moved / "mine" / "choice.json"
    file.write_text(file.read_text().replace('"variant": "local_only"', '"variant": "../x"'))
    with pytest.raises(RunError, match=r"choice\.json"):
        saved_models(moved / "mine")


def test_the_choice_is_by_validation_alone(candidates: list[Candidate]) -> None:
    """With the stored numbers: no other candidate of a client has a lower validation loss."""
    for choice in choose(candidates, 0.0, none_needed):
        values = [candidate.validation[choice.client] for candidate in candidates]
        assert choice.chosen.validation[choice.client] == min(values)
