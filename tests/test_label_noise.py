"""Label noise from a config to what a user reads: plan, training, model card, report; and where it is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedamole.config import Config, load_config
from fedamole.deployment.server_processes import prepare_folder
from fedamole.errors import ConfigError, RunError
from fedamole.experiment import plan, plan_without_data, resume, start
from fedamole.federation.progress import ProgressListener
from fedamole.federation.settings import DeploymentSettings
from fedamole.reporting.page.content import content
from fedamole.reporting.page.reading import read_folders
from fedamole.reporting.runs import label_noise, read_run
from fedamole.runs.run_folder import RunFolder


def noisy(config: Config, name: str = "mood", share: float = 0.25) -> Config:
    """The config with wrong answers in one source."""
    sources = tuple(replace(it, label_noise=share) if it.name == name else it for it in config.data.source)
    return replace(config, data=replace(config.data, source=sources))


@pytest.fixture(scope="module")
def folder(runs: Any) -> Path:
    """A finished run with wrong answers at one of four clients."""
    path: Path = runs.free()
    start(noisy(runs.load("fedit", "federation.rounds=1")), path, ProgressListener())
    return path


def test_it_changes_the_training_of_its_client_alone(folder: Path, runs: Any, facts: Any) -> None:
    clean = runs("fedit", "federation.rounds=1")

    def losses(path: Path) -> dict[str, float]:
        return {line["client"]: line["loss"] for line in facts(path) if line["split"] == "train"}

    assert {name for name, loss in losses(folder).items() if loss != losses(clean)[name]} == {"mood"}


def test_the_model_card_says_it(folder: Path) -> None:
    texts = {name: (folder / "clients" / name / "adapter" / "README.md").read_text() for name in ("mood", "chat")}
    assert "25% of the answers of the training and the embedding split are wrong on purpose" in texts["mood"]
    assert "wrong on purpose" not in texts["chat"]


def test_the_report_says_it_and_does_not_compare_it_with_a_clean_run(folder: Path, runs: Any) -> None:
    lines = content(read_folders([folder]))["data"]
    assert lines["sources"] is True
    assert {name: source for name, source, _ in lines["lines"]} == {
        "chat": "chat",
        "entail": "entail",
        "mood": "mood (25% wrong answers)",
        "plain": "plain",
    }
    clean = runs("fedit", "federation.rounds=1")
    assert read_run(folder).partition != read_run(clean).partition
    with pytest.raises(RunError, match="had different data"):
        read_folders([folder, clean])


def test_a_run_is_resumed_with_its_wrong_answers(folder: Path, runs: Any, remains: Any) -> None:
    """The run stops in its second round; the answers come from the config and the manifest in its folder."""

    class Stop(ProgressListener):
        def round_started(self, round_: int, *_: Any) -> None:
            if round_ == 1:
                raise KeyboardInterrupt

    stopped, straight = runs.free(), runs.free()
    config = noisy(runs.load("fedit", "federation.rounds=2"))
    with pytest.raises(KeyboardInterrupt):
        start(config, stopped, Stop())
    assert label_noise(RunFolder.open(stopped).tables()) == {"mood": 0.25}
    resume(stopped, ProgressListener())
    start(config, straight, ProgressListener())
    assert remains(stopped) == remains(straight)


def test_the_plan_says_it_with_and_without_data(runs: Any, tiny: Path, fedamole: Any) -> None:
    config = noisy(runs.load("fedit"))
    assert plan(config).label_noise == {"mood": 0.25}
    assert plan_without_data(replace(config, base=replace(config.base, model="bundled"))).label_noise == {"mood": 0.25}
    assert plan(runs.load("fedit")).label_noise == {}
    text = (tiny / "config.toml").read_text().replace('path = "mood.jsonl"', 'path = "mood.jsonl"\nlabel_noise = 0.25')
    for name in ("base", "entail.jsonl", "mood.jsonl", "chat.jsonl", "plain.jsonl"):
        text = text.replace(f'"{name}"', f'"{tiny / name}"')
    Path("noisy.toml").write_text(text)
    assert load_config(Path("noisy.toml"), []).data.noise() == {"mood": 0.25}
    planned = fedamole("plan", "noisy.toml", "method.name=fedit")
    assert "label noise  mood: 25% of the training and embedding answers are wrong on purpose" in planned.out


def test_a_coordinator_refuses_it_and_a_simulation_does_not(runs: Any, tmp_path: Path) -> None:
    deployment = DeploymentSettings(clients=("chat", "entail", "mood", "plain"))
    config = replace(noisy(runs.load("fedit")), deployment=deployment)
    with pytest.raises(ConfigError, match=r"data\.source\[mood\]\.label_noise = 0.25: is for experiments in a simul"):
        prepare_folder(config, tmp_path / "server")
    assert not (tmp_path / "server").exists()
    prepare_folder(config, tmp_path / "simulation", one_owner=True)


@pytest.mark.parametrize("value", ['"x"', "2.0", "[]"])
def test_a_damaged_value_in_a_received_run_folder_is_one_error(folder: Path, tmp_path: Path, value: str) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = copy / "config.toml"
    config.write_text(config.read_text().replace("label_noise = 0.25", f"label_noise = {value}"))
    with pytest.raises(RunError, match=r"config\.toml is damaged .*label_noise"):
        read_run(copy)
