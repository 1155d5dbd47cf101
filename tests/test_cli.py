"""The command line: every mistake is one line and an exit code, every table is JSON on request."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer

from fedamole.cli import main as cli
from tests.conftest import CommandResult, heeding_interrupts

COMMANDS = ("run", "resume", "show", "compare", "plan", "partition", "methods", "demo")
SMALL = ["method.rank=2", "method.alpha=4"]


@pytest.fixture
def own(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny federation that a test may spoil; its config."""
    shutil.copytree(tiny, tmp_path / "mine")
    return tmp_path / "mine" / "config.toml"


def refused(result: CommandResult, code: int, *parts: str) -> None:
    """One line that begins with error: and holds these parts."""
    assert result.code == code, result.err
    assert result.line.startswith("error: "), result.err
    assert result.err.count("error:") == 1
    for part in parts:
        assert part in result.line


# --- mistakes -------------------------------------------------------------------------------------------------


def test_an_unknown_key(fedamole: Any, own: Path) -> None:
    refused(fedamole("run", own, "training.local_stepz=3"), 2, str(own), "training.local_stepz", "'local_steps'")


def test_infeasible_numbers_of_experts(fedamole: Any, own: Path) -> None:
    parts = ("no expert assignment exists", "20 x 2 = 40 > 8 x 4 = 32", "experts to 16")
    refused(fedamole("run", own, "method.experts=20"), 2, *parts)
    refused(fedamole("plan", own, "method.experts=20"), 2, *parts)
    assert not Path("runs").exists(), "refused before anything is written"


def test_more_experts_asked_of_a_token_than_a_client_holds(fedamole: Any, own: Path) -> None:
    refused(fedamole("run", own, "method.top_k=3"), 2, "top_k = 3", "min_experts to 3")


def test_a_missing_column(fedamole: Any, own: Path) -> None:
    path = own.parent / "plain.jsonl"
    path.write_text(path.read_text().replace('"completion"', '"complation"'))
    parts = ("plain", "completion", "complation")
    refused(fedamole("run", own, "data.templates.mine={prompt='{prompt}',answer='{completion}'}"), 3, "plain")
    text = own.read_text().replace('path = "plain.jsonl"', 'path = "plain.jsonl"\ntemplate = "plain"')
    own.write_text(text)
    refused(fedamole("run", own), 3, "there is no column 'completion'", *parts)


def test_an_empty_client(fedamole: Any, own: Path) -> None:
    path = own.parent / "mood.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    refused(fedamole("partition", own), 3, "client 'mood' has an empty split", "give it more rows")
    path.write_text("")
    refused(fedamole("run", own), 3, "mood", "empty")


def test_a_label_outside_the_options(fedamole: Any, own: Path) -> None:
    path = own.parent / "entail.jsonl"
    path.write_text(path.read_text().replace('"label": 2', '"label": 7', 1))
    refused(fedamole("run", own), 3, "entail.jsonl, row", "the label '7' is outside the template's labels")


def test_a_run_folder_that_exists(fedamole: Any, own: Path, runs: Any) -> None:
    folder = runs("fedit")
    refused(fedamole("run", own, f"run.folder={folder}"), 5, str(folder), "exists already", "fedamole resume")


def test_a_base_whose_vocabulary_does_not_fit_its_tokenizer(fedamole: Any, own: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(own.parent / "base")
    tokenizer.add_tokens([f"<more-{number}>" for number in range(50)])
    tokenizer.save_pretrained(own.parent / "base")
    refused(fedamole("run", own), 4, "its tokenizer produces ids up to", "its embedding has 340 rows")


def test_no_base(fedamole: Any, own: Path) -> None:
    refused(fedamole("run", own, "base.model=./nowhere"), 4, "there is no folder", "nowhere")


def test_prompts_longer_than_the_base(fedamole: Any, own: Path) -> None:
    refused(fedamole("plan", own, "training.max_length=4096"), 2, "this base has 128 positions")


def test_diverged_training_is_reported_and_the_run_continues(fedamole: Any, own: Path, caplog: Any) -> None:
    result = fedamole("run", own, *SMALL, "method.name=fedit", "training.learning_rate=1e30", "federation.rounds=1")
    assert result.code == 5, "no update was left"
    assert "failed: client mood, round 0: its loss became" in result.err
    assert "lower training.learning_rate" in caplog.text
    assert "fedit" in result.out


def test_a_corrupt_checkpoint(fedamole: Any, crash: Any) -> None:
    folder = crash("group_started", 5, "fedit")
    for path in folder.glob("checkpoints/*.safetensors"):
        os.truncate(path, 10)
    refused(fedamole("resume", folder), 5, "no checkpoint is intact", "start the run anew")


def test_a_foreign_checkpoint(fedamole: Any, crash: Any, runs: Any) -> None:
    folder = crash("group_started", 5, "fedit")
    for part in ("checkpoints", "clients"):
        shutil.rmtree(folder / part)
        shutil.copytree(runs("fedit") / part, folder / part)
    refused(fedamole("resume", folder), 5, "belongs to another run")


def test_a_base_that_changed_under_a_run(fedamole: Any, own: Path, crash: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = crash("group_started", 3, "fedit", f"base.model={own.parent / 'base'}")
    model = AutoModelForCausalLM.from_pretrained(own.parent / "base")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(own.parent / "base")
    refused(fedamole("resume", folder), 4, "made on another base: its weights hash is")


def test_a_base_named_relatively_on_the_command_line(fedamole: Any, own: Path, tmp_path: Path) -> None:
    """Stored absolute: the run is used from another folder. Where the base has moved, --base names it."""
    overrides = ["method.name=fedit", "base.model=./mine/base", "run.folder=./out", "federation.rounds=1"]
    assert fedamole("run", own, *overrides).code == 0
    stored = tomllib.loads((tmp_path / "out" / "config.toml").read_text())
    assert stored["base"]["model"] == str(own.parent / "base")
    assert stored["run"]["folder"] == str(tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    arguments = ("generate", "../out", "--client", "mood", "--max-new-tokens", "2", "all is well")
    assert fedamole(*arguments).code == 0
    (own.parent / "base").rename(tmp_path / "moved")
    refused(fedamole(*arguments), 4, "is not on this machine", "--base")
    assert fedamole(*arguments, "--base", "../moved").code == 0


def test_a_run_whose_base_moved_is_resumed_on_it(fedamole: Any, own: Path, crash: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = crash("group_started", 3, "fedit", f"base.model={own.parent / 'base'}")
    moved, other = tmp_path / "moved", tmp_path / "other"
    (own.parent / "base").rename(moved)
    refused(fedamole("resume", folder), 4, str(own.parent / "base"), "is not here: name a copy of it by --base")
    shutil.copytree(moved, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(other)
    config, about = (folder / "config.toml").read_bytes(), (folder / "run.json").read_bytes()
    refused(fedamole("resume", folder, "--base", other), 4, f"run in {folder} was made on another base: its weights")
    assert (folder / "run.json").read_bytes() == about
    resumed = fedamole("resume", folder, "--base", "./moved")
    assert resumed.code == 0, resumed.err
    assert str(own.parent / "base") not in resumed.err, "it is not read"
    assert (folder / "summary.json").exists()
    assert (folder / "config.toml").read_bytes() == config
    assert json.loads((folder / "run.json").read_text())["base_model"] == str(moved)
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    arguments = ("generate", folder, "--client", "mood", "--max-new-tokens", "2", "all is well")
    later = fedamole(*arguments)
    assert later.code == 0, "the run's folder knows where its base is now"
    assert f"reads files outside {folder}: base {moved}" in later.err
    moved.rename(tmp_path / "again")
    refused(fedamole(*arguments), 4, f"{moved}, the base of", "--base")
    refused(fedamole("resume", folder, "--base", other), 4, "made on another base")
    assert fedamole("resume", folder, "--base", "../again").code == 0, "a finished run records it too"
    assert fedamole(*arguments).code == 0


def test_data_that_changed_under_a_run(fedamole: Any, crash: Any, tiny: Path, own: Path) -> None:
    folder = crash("group_started", 3, "fedit")
    config = folder / "config.toml"
    config.write_text(config.read_text().replace(str(tiny / "mood.jsonl"), str(own.parent / "mood.jsonl")))
    mood = own.parent / "mood.jsonl"
    mood.write_text(mood.read_text().replace("good", "fine", 1))
    refused(fedamole("resume", folder), 3, "mood.jsonl is not what the partition was drawn from")


@pytest.mark.parametrize("command", ["resume", "show"])
def test_a_folder_that_is_no_run(command: str, fedamole: Any, tmp_path: Path) -> None:
    refused(fedamole(command, tmp_path), 5, str(tmp_path))
    refused(fedamole(command, tmp_path / "nowhere"), 5, "nowhere")


def test_an_unfinished_run_is_not_shown(fedamole: Any, crash: Any) -> None:
    folder = crash("group_started", 3, "fedit")
    refused(fedamole("show", folder), 5, "is not finished", f"fedamole resume {folder}")


def test_no_such_config(fedamole: Any) -> None:
    refused(fedamole("run", "nowhere.toml"), 2, "nowhere.toml", "cannot be read")


def test_brackets_in_an_error_are_not_markup(fedamole: Any, own: Path) -> None:
    refused(fedamole("run", own, "base.targets=[1]"), 2, "base.targets[0] = 1")


def test_wrong_words(fedamole: Any) -> None:
    assert fedamole("runn").code == 2
    assert fedamole("run", "--nonsense").code == 2
    assert fedamole("show").code == 2


# --- commands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, fedamole: Any) -> None:
    result = fedamole(command, "--help")
    assert result.code == 0
    assert "Usage" in result.out
    assert f"fedamole {command}" in result.out


def test_help_names_every_command_and_exit_code(fedamole: Any) -> None:
    result = fedamole("--help")
    assert result.code == 0
    assert all(command in result.out for command in COMMANDS)
    assert "130" in result.out


def test_help_explains_every_argument_and_option(fedamole: Any) -> None:
    command = typer.main.get_command(cli.app)
    assert isinstance(command, click.Group)
    for name, subcommand in command.commands.items():
        assert subcommand.help, name
        for parameter in [] if isinstance(subcommand, click.Group) else subcommand.params:
            assert getattr(parameter, "help", None), f"{name}: {parameter.name}"
    text = fedamole("run", "--help").out
    assert "A TOML config" in text
    assert "\n   fedamole run my.toml " in text, "examples have lines of their own"


def test_run_and_resume_print_their_table_as_json(fedamole: Any, own: Path, tmp_path: Path, crash: Any) -> None:
    overrides = [*SMALL, "method.name=fedit", "run.name=mine", "federation.rounds=1"]
    result = fedamole("run", own, *overrides, "--json")
    assert result.code == 0, result.err
    [comparison] = json.loads(result.out)
    assert set(comparison["columns"]) == {"base", "majority", "mine"}
    assert set(comparison["columns"]["mine"]["clients"]) == {"chat", "entail", "mood", "plain"}
    assert (tmp_path / "runs/mine/summary.json").exists()
    again = fedamole("run", own, *overrides, "--json")
    assert again.code == 0
    assert (tmp_path / "runs/mine-2/summary.json").exists(), "a new run takes the next free folder"
    folder = crash("group_started", 3, "fedit")
    [resumed] = json.loads(fedamole("resume", folder, "--json").out)
    assert "fedit" in resumed["columns"]


def test_plan(fedamole: Any, own: Path) -> None:
    result = fedamole("plan", own, *SMALL, "--json")
    planned = json.loads(result.out)
    assert [row["client"] for row in planned["clients"]] == ["chat", "entail", "mood", "plain"]
    assert {row["task"] for row in planned["clients"]} == {"classification", "generation"}
    assert planned["targets"] == 4
    # 12 experts x 2 choices over 4 clients: 6 on average, the shared one and W_t (r x d_in) beside them; rank 2,
    # q 32 -> 32 and v 32 -> 16: two layers x ((7 x 2 x (32 + 32) + 64) + (7 x 2 x (32 + 16) + 64)) = 3392.
    assert planned["adapter_parameters"] == 3392
    assert planned["steps"] == 3
    assert not Path("runs").exists()
    text = fedamole("plan", own, *SMALL).out
    assert "3,392 trainable parameters" in text
    assert "feasible" in text


def test_the_plans_traffic_is_the_runs(fedamole: Any, own: Path, runs: Any) -> None:
    planned = json.loads(fedamole("plan", own, *SMALL, "method.name=fedit", "--json").out)
    assert (
        planned["bytes_down"] == json.loads((runs("fedit") / "summary.json").read_text())["bytes_down_per_client_round"]
    )


def test_partition(fedamole: Any, own: Path, tmp_path: Path, runs: Any) -> None:
    rows = json.loads(fedamole("partition", own, "--json").out)
    assert {row["client"]: row["task"] for row in rows} == {
        "entail": "classification",
        "mood": "classification",
        "chat": "generation",
        "plain": "generation",
    }
    assert sum(row[split] for row in rows for split in ("train", "embedding", "validation", "test")) == 195
    assert fedamole("partition", own, "--out", tmp_path / "m.json").code == 0
    refused(fedamole("partition", own, "--out", tmp_path / "m.json"), 5, "already exists")
    drawn, stored = (json.loads(path.read_text()) for path in (tmp_path / "m.json", runs("fedit") / "manifest.json"))
    assert drawn["clients"] == stored["clients"]
    assert json.loads(fedamole("partition", own, f"data.manifest={tmp_path / 'm.json'}", "--json").out) == rows


def test_methods(fedamole: Any) -> None:
    from fedamole.methods import METHODS

    listed = json.loads(fedamole("methods", "--json").out)
    assert [entry["name"] for entry in listed] == list(METHODS)
    assert all(
        entry["paper"] and entry["communicates"] and entry["stays_local"] and entry["parameters"] for entry in listed
    )
    text = fedamole("methods").out
    assert all(name in text for name in METHODS)


def test_methods_explains_one(fedamole: Any) -> None:
    text = fedamole("methods", "ditto").out
    assert "takes half of the round's" in text, "the deviations"
    assert '[method]\nname = "ditto"\nrank = 8\n' in text
    assert "fedit" in fedamole("methods", "fedit_ft").out.lower()
    assert [entry["name"] for entry in json.loads(fedamole("methods", "flora", "--json").out)] == ["flora"]
    failed = fedamole("methods", "ditt0")
    assert failed.code == 2
    assert "did you mean 'ditto'?" in failed.line


@pytest.mark.parametrize("as_json", [False, True])
def test_run_tells_peak_memory_beside_its_results(as_json: bool, fedamole: Any, own: Path, tmp_path: Path) -> None:
    overrides = [
        "method.name=local_only",
        *SMALL,
        "federation.rounds=1",
        "run.group=3",
        *(["--json"] if as_json else []),
    ]
    done = fedamole("run", own, *overrides)
    summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").open()]
    peaks = [line["peak_memory_mib"] for line in lines if line["split"] == "train"]
    assert summary["peak_memory_mib"] == max(peaks) > 10
    assert summary["group"] == 3
    assert done.line == f"peak memory {max(peaks):,.0f} MiB with 3 clients in lock-step"
    assert "peak memory" not in done.out


def test_show_puts_methods_side_by_side_and_groups_seeds(fedamole: Any, runs: Any) -> None:
    folders = [runs("fedit"), runs("fedit", "run.seed=1"), runs("local_only")]
    [table] = json.loads(fedamole("show", *folders, "--json").out)
    assert table["seeds"] == [0, 1]
    assert {name: len(column["mean"]) for name, column in table["columns"].items()} == {
        "base": 1,
        "majority": 1,
        "fedit": 2,
        "local_only": 1,
    }
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    means = [result["rows"]["fedit"]["mean"] for result in summaries[:2]]
    assert table["columns"]["fedit"]["mean"] == means
    text = fedamole("show", *folders).out
    assert "±" in text
    assert f"{sum(means) / 2:.1f}" in text
    assert "worst client" in text


def test_show_lists_values_in_the_order_of_the_seeds(fedamole: Any, runs: Any) -> None:
    folders = [runs("fedit", "run.seed=1"), runs("fedit")]  # as s10 stands before s2 in a folder
    [table] = json.loads(fedamole("show", *folders, "--json").out)
    rows = [json.loads((folder / "summary.json").read_text())["rows"]["fedit"] for folder in reversed(folders)]
    losses = [[client["loss"] for client in row["clients"].values()] for row in rows]
    assert table["seeds"] == [0, 1]
    assert table["columns"]["fedit"]["mean loss"] == [sum(result) / len(result) for result in losses]


def test_show_of_a_folder_with_runs(fedamole: Any, runs: Any, tmp_path: Path) -> None:
    shutil.copytree(runs("fedit"), tmp_path / "all" / "one")
    shutil.copytree(runs("local_only"), tmp_path / "all" / "two")
    [table] = json.loads(fedamole("show", tmp_path / "all", "--json").out)
    assert list(table["columns"]) == ["base", "majority", "fedit", "local_only"]


def test_show_markdown(fedamole: Any, runs: Any) -> None:
    lines = fedamole("show", runs("fedit"), runs("local_only"), "--markdown").out.strip().splitlines()
    assert lines[0] == "| client | base | majority | fedit | local_only |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert {line.count("|") for line in lines[:-2]} == {6}
    assert lines[-2] == ""
    assert re.match(r"(fedit, the best|fedit is better|Training alone is better)", lines[-1]), "the verdict"
    assert [line.split("|")[1].strip() for line in lines[2:6]] == ["chat", "entail", "mood", "plain"]


def test_show_without_clients(fedamole: Any, runs: Any) -> None:
    text = fedamole("show", runs("fedit"), "--no-clients").out
    assert "entail" not in text
    assert "mean" in text


def test_a_client_that_brings_a_key_and_is_made_one(fedamole: Any, tmp_path: Path) -> None:
    result = fedamole("certs", "--client", "a", "--admit", "a=a.pub")
    refused(result, 2, "a: --admit uses the client's key", "give one of the two")
    assert not (tmp_path / "certs").exists()


# --- as a process ---------------------------------------------------------------------------------------------


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, tiny: Path) -> None:
    arguments = ["run", str(tiny / "config.toml"), *SMALL, "federation.rounds=500", f"run.folder={tmp_path / 'run'}"]
    arguments = [sys.executable, "-m", "fedamole", *arguments]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, preexec_fn=heeding_interrupts)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("run/checkpoints/*.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "fedamole resume" in err.splitlines()[-1]


CLINICS = ("北京市朝阳区医院", "مستشفى المدينة", "Nord/Süd", "nord/süd")


def by_clinic(own: Path) -> Path:
    """A config whose only source has a client for each clinic."""
    talk = [
        {
            "prompt": "raw",
            "messages": [
                {"role": "user", "content": f"q {index}"},
                {"role": "assistant", "content": f"a {index % 3}"},
            ],
            "clinic": CLINICS[index % len(CLINICS)],
        }
        for index in range(80)
    ]
    (own.parent / "clinics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk), encoding="utf-8")
    text = own.read_text()
    source = '[[data.source]]\nname = "c"\npath = "clinics.jsonl"\npartition = { kind = "value", by = "clinic" }\n'
    head = text[: text.index("[[data.source]]")]
    own.write_text(head + source + 'template = "messages"\n', encoding="utf-8")
    return own


def test_a_federation_of_clients_whose_names_are_in_other_scripts(fedamole: Any, own: Path) -> None:
    config = by_clinic(own)
    rows = json.loads(fedamole("partition", config, "--json").out)
    values = {row["client"]: row["value"] for row in rows}
    assert sorted(values.values()) == sorted(CLINICS)
    assert all(value in fedamole("partition", config).out for value in CLINICS)
    assert fedamole("run", config, *SMALL, "method.name=fedit", "federation.rounds=1", "run.folder=out").code == 0
    assert {path.name for path in Path("out/clients").iterdir()} == set(values)
    summary = json.loads(Path("out/summary.json").read_text())
    assert set(summary["rows"]["fedit"]["clients"]) == set(values)
    generated = fedamole("generate", "out", "--client", CLINICS[0], "--max-new-tokens", "1", "hm")
    assert generated.code == 0
    assert json.loads(fedamole("generate", "out", "--client", CLINICS[0], "--json", "hm").out)["client"] in values
    refused(fedamole("generate", "out", "--client", "上海", "hm"), 5, "has no client '上海'")


def test_a_single_label_says_how_to_write_the_options(fedamole: Any, own: Path) -> None:
    """The answer in the error, written into the config, gives a federation in which all have the same options."""
    for name, labels in (("a", ("yes", "no")), ("b", ("no",))):
        rows = [{"text": f"note {index}", "label": labels[index % len(labels)]} for index in range(40)]
        (own.parent / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = own.read_text().partition("[[data.source]]")[0]
    sources = "".join(f'[[data.source]]\nname = "{name}"\npath = "{name}.jsonl"\nMORE\n' for name in "ab")
    own.write_text(head + sources.replace("MORE", ""))
    refusal = fedamole("partition", own)
    refused(refusal, 3, "b.jsonl: column 'label' has only the values ['no']", 'options = ["no", ...]')
    table = refusal.line.partition("under [data.templates], ")[2].partition(". Then use it")[0].replace("...", '"yes"')
    own.write_text(head + sources.replace("MORE", 'template = "task"') + f"[data.templates]\n{table}\n")
    result = json.loads(fedamole("partition", own, "--json").out)
    assert {row["client"]: row["task"] for row in result} == {"a": "classification", "b": "classification"}
