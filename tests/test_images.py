"""The whole path on the task of scripts/make_image_task.py: four clients ask different questions about pictures."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from fedamole import load_personal_model
from fedamole.config import load_config
from fedamole.data.tokens import TokenRow
from fedamole.deployment.server_processes import prepare_folder
from fedamole.deployment.shared_config import own_tables, shared_tables
from fedamole.errors import ConfigError, DataError
from fedamole.evaluation.likelihood import mean_losses, option_losses
from fedamole.experiment import prepare, resume, start
from fedamole.federation.local import LocalTask, fit
from fedamole.federation.method import TrainingRequest, TrainingResult
from fedamole.federation.progress import ProgressListener
from fedamole.federation.settings import TrainingSettings
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.media import ImageIds
from fedamole.model.params import Adapter, new_shared
from fedamole.personal.saved_models import find_model, open_bank
from fedamole.received.images import checked_image
from fedamole.runs.identity import Identity
from tests.conftest import CommandResult, Runner

CLIENTS = ("colour", "count", "kind", "side")
SHORT = ("federation.rounds=2", "training.local_steps=2", "run.device=cpu")


@pytest.fixture(scope="module")
def image_runs(image_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(image_task / "images.toml", tmp_path_factory.mktemp("image-runs"), {})


@pytest.mark.parametrize("method", ["fedit", "local_only", "fedamole", "feddat"])
def test_a_run(method: str, image_runs: Runner) -> None:
    """All four clients train, in one group, and all are scored on their own questions."""
    folder = image_runs(method, *SHORT)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rounds"] == 2
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    assert sorted(line["client"] for line in trained if line["round"] == 0) == sorted(CLIENTS)
    assert all(0 < line["loss"] < 20 for line in trained)


def test_the_same_run_interrupted_and_resumed(image_runs: Runner, remains: Callable[[Path], Any]) -> None:
    class InterruptedRunError(Exception):
        pass

    class Listener(ProgressListener):
        def round_done(self, round_: int, validation: Any) -> None:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        image_runs.fresh("fedamole", *SHORT, listener=Listener())
    folder = max(image_runs.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert not (folder / "summary.json").exists()
    resume(folder, ProgressListener())
    assert remains(folder) == remains(image_runs("fedamole", *SHORT))


def test_a_resumed_run_notices_another_image(image_task: Path, tmp_path: Path) -> None:
    """The manifest holds a hash of each split with its images; the rows of the file did not change."""
    shutil.copytree(image_task, tmp_path / "task")
    config = load_config(tmp_path / "task" / "images.toml", [*SHORT, "run.threads=1"])
    manifest = prepare(config).federation.manifest
    number = next(client for client in manifest.clients if client.client == "colour").test.rows[0]
    changed = tmp_path / "task" / "colour" / f"{number:04}.png"
    changed.write_bytes((image_task / "count" / "0000.png").read_bytes())
    with pytest.raises(DataError, match=r"client 'colour', split 'test': .* an image, the template"):
        prepare(config, manifest)


@pytest.mark.parametrize("method", ["fedit", "fedprompt"])
def test_preference_pairs_with_images(method: str, image_task: Path, tmp_path: Path) -> None:
    """The untuned base, which is the reference, reads the same rows without the virtual tokens and with the image."""
    shutil.copytree(image_task, tmp_path / "task")
    path = tmp_path / "task" / "side.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    other = {"left": "right", "right": "left"}
    path.write_text("".join(json.dumps({**row, "other": other[row["answer"]]}) + "\n" for row in rows))
    config = (tmp_path / "task" / "images.toml").read_text().partition("\n[[data.source]]")[0]
    config = config.replace('options_from = "answer"', 'rejected = "{other}"')
    config += '\n[[data.source]]\nname = "side"\npath = "side.jsonl"\ntemplate = "question"\n'
    (tmp_path / "task" / "pairs.toml").write_text(f'{config}\n[method]\nname = "{method}"\n')
    pairs = load_config(tmp_path / "task" / "pairs.toml", ["training.objective=preference", *SHORT])
    summary = start(pairs, tmp_path / "run", ProgressListener())
    assert summary["rounds"] == 2
    assert summary["rows"]["base"]["mean"] == 50


# --- training reads the image ----------------------------------------------------------------------------------------


def shuffled(rows: list[TokenRow]) -> list[TokenRow]:
    """Give each row the image of a row with another answer."""
    others = []
    for row in rows:
        other = next(candidate for candidate in rows[::-1] if candidate.answer != row.answer)
        assert isinstance(other.prompt, ImageIds)
        others.append(replace(row, prompt=ImageIds(row.prompt, other.prompt.picture)))
    return others


def test_after_training_the_right_image_gives_a_lower_loss_than_another(image_runs: Runner) -> None:
    """The prompt's text is the same in all rows of a client, so without the image both losses would be equal.

    The rows are those of validation and test, which were not trained on.
    """
    prepared = prepare(image_runs.load("local_only", "run.device=cpu", "run.threads=1"))
    bank = Bank(prepared.base)
    data = prepared.clients["colour"]
    spec = AdapterSpec(8, 16.0)
    start = Adapter(spec, new_shared(prepared.base.shapes, 8, torch.Generator().manual_seed(0)))
    task = LocalTask("colour", TrainingRequest(start), data.train.pairs(), 5e-3)
    settings = TrainingSettings(local_steps=120, batch_size=4, max_length=64)
    (trained,) = fit(bank, [task], settings, seed=0, round_=0)
    assert isinstance(trained, TrainingResult)
    rows = [*data.validation.rows, *data.test.rows]
    assert len({tuple(row.prompt) for row in rows}) == 1
    bank.load([trained.adapter])
    losses = [
        mean_losses(bank, [[(row.prompt, row.answer) for row in chosen]], 8192)[0] for chosen in (rows, shuffled(rows))
    ]
    assert losses[0] < 0.5 * losses[1]
    ((*by_row,),) = option_losses(bank, [[(row.prompt, row.options) for row in rows]], 8192)
    right = sum(row.options[values.index(min(values))] == row.answer for row, values in zip(rows, by_row, strict=True))
    most_frequent = max(sum(row.answer == answer for row in rows) for answer in {row.answer for row in rows})
    assert right > most_frequent


def test_lock_step_equals_training_alone(image_runs: Runner) -> None:
    prepared = prepare(image_runs.load("local_only", "run.device=cpu", "run.threads=1"))
    prepared.base.model.double()
    bank, settings = Bank(prepared.base), TrainingSettings(local_steps=3, batch_size=2, max_length=64)
    tasks = []
    for seed, name in enumerate(CLIENTS):
        tensors = new_shared(prepared.base.shapes, 2, torch.Generator().manual_seed(seed))
        adapter = Adapter(AdapterSpec(2, 4.0), {key: tensor.double() for key, tensor in tensors.items()})
        tasks.append(LocalTask(name, TrainingRequest(adapter), prepared.clients[name].train.pairs(), 1e-2))
    together = fit(bank, tasks, settings, seed=0, round_=0)
    for task, result in zip(tasks, together, strict=True):
        (alone,) = fit(bank, [task], settings, seed=0, round_=0)
        assert isinstance(alone, TrainingResult)
        assert isinstance(result, TrainingResult)
        for key, tensor in alone.adapter.tensors.items():
            assert torch.allclose(result.adapter.tensors[key], tensor, atol=1e-9)


# --- personal models and commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["local_only", "fedamole"])
def test_a_personal_model_reads_what_the_processor_makes(method: str, image_runs: Runner) -> None:
    folder = image_runs(method, *SHORT)
    model, tokenizer = load_personal_model(folder, client="colour")
    prepared = prepare(image_runs.load(method, *SHORT))
    row = prepared.clients["colour"].test.rows[0]
    image = prepared.federation.shards[0].test[0].image
    assert image is not None
    processor = AutoProcessor.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    text = "<image>What colour are the shapes?\n"
    inputs = processor(text=text, images=[checked_image(image.content, "f")], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == list(row.prompt)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    saved = find_model(folder, "colour")
    bank, adapters = open_bank([saved])
    bank.load(adapters)
    (options,) = row.options[:1]
    ((losses,),) = option_losses(bank, [[(row.prompt, [options[:1]])]], 8192)
    assert losses[0] == pytest.approx(float(-logits.log_softmax(0)[options[0]]), abs=1e-4)
    assert tokenizer.image_reader.token == "<image>"


def test_plan_generate_and_export(
    image_runs: Runner, image_task: Path, fedamole: Callable[..., CommandResult], tmp_path: Path
) -> None:
    plan = fedamole("plan", image_task / "images.toml", *SHORT)
    assert plan.code == 0, plan.err
    assert all(client in plan.out for client in CLIENTS)
    folder = image_runs("local_only", *SHORT)
    answered = fedamole("generate", folder, "--client", "colour", "--file", image_task / "colour.jsonl")
    assert answered.code == 0, answered.err
    exported = fedamole("export", folder, "--client", "colour", "--to", "merged", "--out", tmp_path / "merged")
    assert exported.code == 0, exported.err
    assert (tmp_path / "merged" / "processor_config.json").exists()
    served = fedamole("serve", folder)
    assert "`fedamole serve` answers text requests alone" in served.error


# --- settings --------------------------------------------------------------------------------------------------------


def test_a_template_with_images_needs_such_a_base(image_task: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.templates\.question\.image: .* set base\.images = true"):
        load_config(image_task / "images.toml", ["base.images=false"])


def test_a_deployment_refuses_images(image_task: Path, tmp_path: Path) -> None:
    """The coordinator before it listens, and a client that is sent such settings."""
    overrides = ['deployment.clients=["a", "b"]', "deployment.min_clients=2", *SHORT]
    config = load_config(image_task / "images.toml", overrides)
    with pytest.raises(ConfigError, match="images are supported by `fedamole run`, and not yet by deployments"):
        prepare_folder(config, tmp_path)
    assert not list(tmp_path.iterdir())
    shared = shared_tables(config, Identity("", "", ""))
    with pytest.raises(ConfigError, match=r"the server sets base\.images = true"):
        own_tables(shared, {"name": "a", "path": "a.jsonl"}, {}, str(image_task / "base"))


@pytest.mark.parametrize(
    "method", ["data_engine", "feddm", "fedaf", "fedptr", "codream", "pfedhr", "fed_et", "feddpms"]
)
def test_methods_with_other_rows_refuse_images(method: str, image_task: Path) -> None:
    with pytest.raises(ConfigError, match=f"the method {method} reads or makes rows that have no images"):
        load_config(image_task / "images.toml", [f"method.name={method}"])


def test_a_run_on_text_loads_no_processor(tiny: Path, tmp_path: Path) -> None:
    """transformers imports Pillow itself where it is installed, so this looks at the processors' module."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom fedamole.config import load_config\n"
        "from fedamole.experiment import start\nfrom fedamole.federation.progress import ProgressListener\n"
        f"config = load_config(Path({str(tiny / 'config.toml')!r}), ['method.name=fedit', 'federation.rounds=1'])\n"
        f"start(config, Path({str(tmp_path / 'run')!r}), ProgressListener())\n"
        "names = ('transformers.models.auto.processing_auto', 'transformers.models.auto.image_processing_auto')\n"
        "print('LOADED', [name for name in names if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert "LOADED []" in done.stdout, done.stderr


def test_the_script_gives_the_same_bytes_again(image_task: Path, tmp_path: Path) -> None:
    from make_image_task import write_data  # type: ignore[import-not-found, unused-ignore]

    write_data(tmp_path, rows=40, seed=0)
    for path in sorted(tmp_path.rglob("*.*")):
        assert path.read_bytes() == (image_task / path.relative_to(tmp_path)).read_bytes()
