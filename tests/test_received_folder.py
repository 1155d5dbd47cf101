"""Run folders from elsewhere: their content is checked, and nothing outside of them is touched."""

import json
import os
import re
import shutil
import socket
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedamole.config import load_config, load_run_config
from fedamole.data.manifest import read_manifest
from fedamole.errors import BaseModelError, ConfigError, DataError, FedamoleError, RunError
from fedamole.experiment import reads_outside
from fedamole.files import write_atomic
from fedamole.model.params import expert_ids
from fedamole.model.pretrained import load_adapter
from fedamole.personal.saved_models import load_personal_model
from fedamole.received import files
from fedamole.received.names import LONGEST_NAME, as_name, checked_name, checked_names
from fedamole.runs import checkpoint
from fedamole.runs.adapter_folder import MOST_EXPERTS
from fedamole.runs.run_files import MOST_ROUNDS
from fedamole.runs.run_folder import RunFolder
from tests.received import ReceivedRun, call, received_run

WORD = ["federation.rounds=2"]


@pytest.fixture
def received(runs: Any, tmp_path: Path) -> ReceivedRun:
    return received_run(tmp_path / "arena", runs("fedamole", *WORD))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def begin_again(run: Path) -> None:
    """Reset a finished run to its start."""
    (run / "summary.json").unlink()
    for name in ("clients", "checkpoints"):
        shutil.rmtree(run / name)
    (run / "metrics.jsonl").write_text("")


# --- the attack b5_run_folder ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["{outside}", "../../outside", "..", "a/b", "a\\b", "", "\u202egnp", "x\x1b[2J", "-rf"]
)
def test_a_name_in_a_manifest_leads_nowhere(received: ReceivedRun, name: str) -> None:
    before, name = received.seen(), name.format(outside=received.outside)
    begin_again(received.run)
    text = (received.run / "manifest.json").read_text()
    (first, *_) = re.findall(r'"client": "([^"]+)"', text)
    (received.run / "manifest.json").write_text(text.replace(f'"client": "{first}"', f'"client": {json.dumps(name)}'))
    result = call("resume", received.run)
    assert result.code == 3
    assert "manifest.json is damaged" in result.error
    assert received.seen() == before


def test_names_that_differ_in_case_alone_would_be_one_folder(received: ReceivedRun) -> None:
    begin_again(received.run)
    text = (received.run / "manifest.json").read_text()
    (received.run / "manifest.json").write_text(text.replace('"client": "chat"', '"client": "MOOD"'))
    result = call("resume", received.run)
    assert result.code == 3
    assert "'MOOD'" in result.error
    assert "case-insensitive file system" in result.error


def test_a_better_adapter_replaces_an_adapter_and_nothing_else(runs: Any, received: ReceivedRun) -> None:
    """`worker.keep` removes the folder of the model that was the best before: what is no adapter folder stays."""
    begin_again(received.run)
    other = received.run / "clients" / "mood" / "adapter"
    other.mkdir(parents=True)
    (other / "thesis.tex").write_text("years of work")
    result = call("resume", received.run)
    assert result.code == 5
    assert "'thesis.tex'" in result.error
    assert (other / "thesis.tex").read_text() == "years of work"


# --- links ----------------------------------------------------------------------------------------------------

PLACES = (
    "clients",
    "clients/mood",
    "clients/mood/adapter",
    "clients/mood/adapter/adapter_model.safetensors",
    "clients/mood/state",
    "checkpoints",
    "checkpoints/round-0001.json",
    "metrics.jsonl",
    "summary.json",
    ".lock",
    ".metrics.jsonl.writing",
    "clients/mood/.adapter.writing",
)


@pytest.mark.parametrize("command", ["resume", "show", "report"])
def test_a_link_out_of_the_folder_is_named_and_not_followed(
    received: ReceivedRun, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(received.path.parent)
    for location in PLACES:
        folder = received_run(received.path.parent / location.replace("/", "-"), received.run)
        path = folder.run / location
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        os.symlink(
            "../" * (len(Path(location).parts)) + "outside" + ("" if "." not in path.name else "/secret.json"), path
        )
        before = folder.seen()
        result = call(command, folder.run)
        assert result.code == 5, location
        assert str(path) in result.error, location
        assert folder.seen() == before, location


def test_a_link_that_stays_inside_and_a_linked_folder_itself_are_fine(received: ReceivedRun) -> None:
    (received.run / "notes.json").symlink_to("run.json")
    (received.path / "named").symlink_to("run")
    assert call("show", received.path / "named").code == 0


def test_a_pipe_does_not_hold_a_command_up(received: ReceivedRun) -> None:
    (received.run / "metrics.jsonl").unlink()
    os.mkfifo(received.run / "metrics.jsonl")
    assert "neither a file nor a folder" in call("show", received.run).error


def test_a_temporary_file_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".a.json.writing").symlink_to("precious")
    write_atomic(tmp_path / "a.json", "new")
    assert ((tmp_path / "precious").read_text(), (tmp_path / "a.json").read_text()) == ("precious", "new")


def test_paths_of_a_folder_stay_in_it(received: ReceivedRun) -> None:
    folder = RunFolder.open(received.run)
    for wrong in ("../outside", str(received.outside), "..", ".", "a/../../x", "a" * (LONGEST_NAME + 1)):
        with pytest.raises(RunError):
            folder.client(wrong)
        with pytest.raises(RunError):
            folder.adapter("mood", wrong)
        if wrong != "a" * (LONGEST_NAME + 1):
            with pytest.raises(RunError, match="points outside"):
                folder.place(wrong)
    assert folder.client("mood") == received.run / "clients" / "mood"


def test_names() -> None:
    assert checked_names(["a", "b.c-d_E", "9"], "x") == ("a", "b.c-d_E", "9")
    for wrong in ("", ".", "..", ".a", "-a", "a/b", "a b", "é", "a\n", 3, None, "a" * (LONGEST_NAME + 1)):
        with pytest.raises(RunError, match="is invalid"):
            checked_name(wrong, "x")
    with pytest.raises(RunError, match="1 to 120 ASCII letters"):
        checked_name("é", "x")
    with pytest.raises(DataError, match="case-insensitive file system"):
        checked_names(["a", "A"], "x", DataError)
    assert as_name("../../etc/passwd") == "etc-passwd"
    assert as_name("\x1b[31m") == "31m"
    assert as_name("//") == "run"


def test_the_name_of_a_run_leads_nowhere(received: ReceivedRun, tiny: Path) -> None:
    """`adapt` names the newcomer's folder after the run, whose config may name no other place."""
    config = tomllib.loads((received.run / "config.toml").read_text())
    config["run"]["name"] = "../../outside/x"
    (received.run / "config.toml").write_text(tomli_w.dumps(config))
    before = received.seen()
    result = call(
        "adapt",
        received.run,
        "--data",
        tiny / "mood.jsonl",
        "--name",
        "new",
        "--steps",
        0,
        "--folder",
        received.path / "out",
    )
    assert result.code == 2
    assert "run.name = '../../outside/x'" in result.err
    assert not (received.path / "out").exists()
    assert received.seen() == before


# --- files ----------------------------------------------------------------------------------------------------


def test_json_is_read_within_bounds(received: ReceivedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    path = received.run / "summary.json"
    good = path.read_text()
    for text, why in {
        "[" * 100_000: "nested too deeply",
        good.replace('"rounds"', '"method": "fedit", "rounds"', 1): "is repeated",
        good.replace('"fedamole"', '"\\ud800"', 1): "a lone surrogate",
        good[:-9]: "not valid JSON",
        "": "not valid JSON",
        good.replace('"best_round": 1', '"best_round": 1e999', 1): "a whole number from -1",
        good.replace('"best_round": 1', f'"best_round": {10**30}', 1): "a whole number from -1",
    }.items():
        assert text != good
        path.write_text(text)
        result = call("show", received.run)
        assert (result.code, why in result.error, "summary.json" in result.error) == (5, True, True), (
            why,
            result.error,
        )
    path.write_bytes(good.encode("utf-16"))
    assert "not UTF-8 text" in call("show", received.run).error
    monkeypatch.setattr("fedamole.received.files.MIB", 1)
    monkeypatch.setattr(RunFolder.read_json.__globals__["read_json"], "__defaults__", (100, RunError))
    path.write_text(good)
    assert "the maximum for such a file" in call("show", received.run).error


def test_a_line_of_metrics_is_checked(received: ReceivedRun) -> None:
    path = received.run / "metrics.jsonl"
    good = path.read_text()
    for key, value, why in (
        ("round", 10**9, "round is"),
        ("round", 7, "round 7 does not exist"),
        ("client", "../x", "client is"),
        ("split", "all", "split is"),
        ("loss", "low", "loss is"),
        ("bytes_down", -1, "bytes_down is"),
    ):
        first, *others = good.splitlines()
        line = {**json.loads(others[0]), "split": "train", "bytes_down": 1, "bytes_up": 1, key: value}
        path.write_text("\n".join([first, json.dumps(line), *others]) + "\n")
        result = call("report", received.run, "--out", received.path / "out")
        assert (result.code, why in result.error) == (5, True), (key, result.error)
        assert "line 2" in result.error
    path.write_text(good + '{"round": 1, "spl')
    assert call("report", received.run, "--out", received.path / "out").code == 0, "a torn last line is left out"


def test_expert_ids_are_bounded(received: ReceivedRun) -> None:
    path = received.run / "assignment.jsonl"
    good = path.read_text()
    for experts, why in (([MOST_EXPERTS], "experts[0] is"), ([-1], "experts[0] is"), (["0"], "experts[0] is")):
        line = {**json.loads(good.splitlines()[0]), "experts": experts, "relevance": [0.5]}
        path.write_text(json.dumps(line) + "\n")
        assert why in call("report", received.run, "--out", received.path / "out").error
    config = tomllib.loads((received.run / "config.toml").read_text())
    config["method"]["experts"] = 5
    (received.run / "config.toml").write_text(tomli_w.dumps(config))
    path.write_text(json.dumps({**line, "experts": [5]}) + "\n")
    assert "expert 5 does not exist" in call("report", received.run, "--out", received.path / "out").error
    for name in (
        "m/expert-x/A",
        "m/expert-1/A",
        "m/expert-001/A",
        f"m/expert-{MOST_EXPERTS}/A",
        "m/expert-99999999999/B",
    ):
        with pytest.raises(RunError, match="no tensor of an expert"):
            expert_ids([name])
    assert expert_ids(["m/expert-00/A", "m/expert-120/B", "n/shared/A"]) == {"m": [0, 120], "n": []}


def test_a_checkpoint_names_states_of_its_own_run_alone(received: ReceivedRun) -> None:
    """A path in it is opened to be hashed."""
    (received.run / "summary.json").unlink()
    for path in (received.run / "checkpoints").glob("*.json"):
        edit(path, lambda content: content["clients"].update({"../outside/secret.json": "0" * 64}))
    result = call("resume", received.run)
    assert result.code == 5
    assert "no checkpoint is intact" in result.error


def test_files_that_are_no_rounds_are_left_alone(received: ReceivedRun) -> None:
    (received.run / "summary.json").unlink()
    odd = [
        received.run / "checkpoints" / "round-final.safetensors",
        received.run / "clients/mood/state/round-x.safetensors",
    ]
    for path in odd:
        path.write_text("mine")
    assert checkpoint.load_latest(RunFolder.open(received.run)) is not None
    assert all(path.read_text() == "mine" for path in odd)


@pytest.mark.parametrize(
    "location",
    [
        ".lock",
        ".summary.json.writing",
        ".metrics.jsonl.writing",
        "checkpoints/round-0001.json",
        "clients/mood/state/round-0001.safetensors",
        "metrics.jsonl",
    ],
)
def test_a_folder_in_the_place_of_a_file_is_one_error(received: ReceivedRun, location: str) -> None:
    (received.run / "summary.json").unlink()
    path = received.run / location
    path.unlink(missing_ok=True)
    path.mkdir()
    result = call("resume", received.run)
    assert result.code == 5
    assert str(path) in result.error


# --- adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("fedit", "megatron_config", {"tensor_model_parallel_size": 1}),
        ("fedit", "megatron_core", "os"),
        ("fedit", "auto_mapping", {"base_model_class": "X", "parent_library": "os"}),
        ("fedit", "modules_to_save", ["x"]),
        ("fedit", "target_modules", ".*"),
        ("fedit", "r", 10**9),
        ("fedit", "r", 3),
        ("fedit", "peft_type", "MIXED"),
        ("fedprompt", "tokenizer_name_or_path", "somebody/model"),
        ("fedprompt", "num_virtual_tokens", 10**9),
        ("fedamole", "expert_pattern", {"model.layers.0.self_attn.q_proj": [10**9]}),
        ("fedamole", "top_k", -1),
        ("fedamole", "expert_pattern", {"../x": [0]}),
        ("fedamole", "revision", "main"),
    ],
)
def test_a_setting_that_fedamole_does_not_write_is_refused(
    runs: Any, tmp_path: Path, method: str, key: str, value: Any
) -> None:
    """PEFT imports the module `megatron_core`, downloads a tokenizer, and draws a pool up to the largest id."""
    run = Path(shutil.copytree(runs(method, *WORD), tmp_path / "run"))
    edit(run / "clients/mood/adapter/adapter_config.json", lambda content: content.update({key: value}))
    for load in (lambda: load_adapter(run / "clients/mood/adapter"), lambda: load_personal_model(run, "mood")):
        with pytest.raises(RunError, match=r"adapter_(config\.json|model\.safetensors)"):
            load()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"])
def test_pickled_weights_of_an_adapter_are_never_read(runs: Any, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(runs("fedit", *WORD), tmp_path / "run"))
    adapter = run / "clients/mood/adapter"
    (adapter / "adapter_model.safetensors").rename(adapter / name)
    with pytest.raises(RunError, match=r"no other kind of weights is read"):
        load_personal_model(run, "mood")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_of_a_base_are_never_read(runs: Any, tiny: Path, tmp_path: Path, name: str) -> None:
    base = Path(shutil.copytree(tiny / "base", tmp_path / "base"))
    (base / "model.safetensors").rename(base / name)
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_personal_model(runs("fedit", *WORD), "mood", base=str(base))


def test_code_of_a_base_is_never_run(runs: Any, tiny: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny / "base", tmp_path / "base"))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w').close()")
    edit(
        base / "config.json",
        lambda content: content.update(
            auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, model_type="evil"
        ),
    )
    with pytest.raises(BaseModelError):
        load_personal_model(runs("fedit", *WORD), "mood", base=str(base))
    assert not (tmp_path / "owned").exists()


def test_weights_that_do_not_fit_are_refused(runs: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = Path(shutil.copytree(runs("fedit", *WORD), tmp_path / "run"))
    path = run / "clients/mood/adapter/adapter_model.safetensors"
    good = load_file(path)
    name = min(good)
    less = {key: tensor for key, tensor in good.items() if key != name}
    for changed, why in (
        ({**good, "x": good[name].clone()}, "is not expected"),
        (less, "is missing"),
        ({**less, name: good[name].double()}, "is of F64"),
        ({**less, name: good[name][:1]}, "has the shape"),
        ({**less, name: good[name].flatten()}, "has the shape"),
        ({**less, name: good[name][:, :1].contiguous()}, "values"),
    ):
        save_file(changed, path)
        with pytest.raises(FedamoleError, match=why):
            load_personal_model(run, "mood")


# --- what a config names --------------------------------------------------------------------------------------


def test_a_run_config_extends_nothing(received: ReceivedRun) -> None:
    text = (received.run / "config.toml").read_text()
    (received.run / "config.toml").write_text(f'extends = "{received.outside}/secret.json"\n' + text)
    for arguments in (("resume", received.run), ("generate", received.run, "x", "--client", "mood")):
        if arguments[0] == "resume":
            (received.run / "summary.json").rename(received.run / "kept")
        result = call(*arguments)
        assert result.code == 2
        assert "extends no other file" in result.error
        assert "hunter2" not in result.err


def test_files_outside_the_folder_are_announced_before_they_are_read(received: ReceivedRun, tiny: Path) -> None:
    (received.run / "summary.json").unlink()
    config = tomllib.loads((received.run / "config.toml").read_text())
    config["data"]["source"][0]["path"] = str(received.outside / "secret.json")
    (received.run / "config.toml").write_text(tomli_w.dumps(config))
    result = call("resume", received.run)
    line = next(line for line in result.err.splitlines() if line.startswith("reads files outside "))
    for path in (received.outside / "secret.json", tiny / "mood.jsonl", tiny / "base"):
        assert str(path) in line
    assert result.code == 3
    assert "hunter2" not in result.err
    result = call("generate", received.run, "x", "--client", "mood")
    assert f"reads files outside {received.run}: base {tiny / 'base'}\n" in result.err
    assert "reads " not in call("generate", received.run, "x", "--client", "mood", "--base", tiny / "base").err


def test_data_and_hub_names_are_reported_too(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        '[base]\nmodel = "somebody/model"\n[[data.source]]\nname = "a"\nhub = "somebody/data"\nsplit = "train"\n'
        f'[[data.source]]\nname = "b"\npath = "{tmp_path}/inside.jsonl"\ntest = "/elsewhere/test.jsonl"\n'
    )
    config = load_config(tmp_path / "config.toml")
    hub = "base somebody/model of the Hugging Face hub", "data set somebody/data of the Hugging Face hub"
    assert reads_outside(config, tmp_path) == (*hub, "data /elsewhere/test.jsonl")
    assert reads_outside(config, tmp_path, ["b"], base=False) == ("data /elsewhere/test.jsonl",)


@pytest.mark.parametrize(
    "arguments",
    [
        ("show",),
        ("report", "--out", "{out}"),
        ("generate", "x", "--client", "mood"),
        ("export", "--client", "mood", "--out", "{out}"),
    ],
)
def test_no_config_starts_a_download(
    received: ReceivedRun, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    """A base on the hub is taken from what was downloaded before, or named by the user."""
    config = tomllib.loads((received.run / "config.toml").read_text())
    config["base"]["model"] = "somebody/model"
    (received.run / "config.toml").write_text(tomli_w.dumps(config))
    for name in ("HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        if "." in name:
            monkeypatch.setattr(name, False)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    command, *options = (argument.format(out=received.path / "out") for argument in arguments)
    result = call(command, received.run, *options)
    if command in ("show", "report"):
        assert result.code == 0
    else:
        assert result.code == 4
        assert "a run's files may not start a download" in result.error


def test_numbers_of_a_config_are_bounded(received: ReceivedRun) -> None:
    text = (received.run / "config.toml").read_text()
    for wrong in (str(10**30), "nan", "inf", "-inf"):
        (received.run / "config.toml").write_text(re.sub(r"learning_rate = \S+", f"learning_rate = {wrong}", text))
        with pytest.raises(ConfigError, match=r"must be a (finite|whole) number"):
            load_run_config(RunFolder.open(received.run))


def test_a_manifest_of_an_honest_run_is_unchanged(runs: Any) -> None:
    path = runs("fedamole", *WORD) / "manifest.json"
    assert read_manifest(path).to_json() == path.read_text()


def test_the_document_names_the_bounds() -> None:
    text = " ".join((Path(__file__).parents[1] / "docs" / "run-folder.md").read_text().split())
    for bound in (
        f"has 1 to {LONGEST_NAME} ASCII letters",
        f"{files.MOST_JSON // files.MIB} MiB for a JSON file",
        f"{files.MOST_LINE // files.MIB} MiB for a line of",
        f"{files.MOST_CONFIG // files.MIB} MiB for `config.toml`, and {files.MOST_FILES:,} files",
        f"rounds up to {MOST_ROUNDS:,}",
        f"from 0 to {MOST_EXPERTS - 1:,}",
    ):
        assert bound in text, bound
