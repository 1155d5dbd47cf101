"""Users' mistakes, full disks and odd locales end in one line; a traceback is for bugs alone."""

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import pytest
import tomli_w
import typer

from fedamole import __version__, experiment
from fedamole.cli import main as cli
from fedamole.cli.options import decoded, describe
from fedamole.comparison.file import load_comparison
from fedamole.config import SECTIONS, load_config, to_config
from fedamole.deployment.security.policy import read_policy
from fedamole.errors import ConfigError
from fedamole.methods import METHODS
from tests.test_cli import SMALL, own, refused
from tests.test_comparison import written

__all__ = ["own"]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "160"}
"""A locale whose encoding is ASCII, for programs and for names of files alike."""


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`python -m fedamole WORDS` as a process of its own."""
    line = [sys.executable, "-m", "fedamole", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, env={**os.environ, **environment}, check=False)


# --- numbers --------------------------------------------------------------------------------------------------


def numbers(kind: type) -> Iterator[tuple[str, type]]:
    """Name and kind of every field of a settings class that holds a number."""
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        for option in get_args(hints[item.name]) or (hints[item.name],):
            if option in (int, float):
                yield item.name, option


SECTIONS_AND_METHODS = [
    *((name, {}, kind) for name, kind in SECTIONS.items() if kind),
    *(("method", {"name": name}, kind) for name, kind in METHODS.items()),
]
SOURCE = {"source": [{"name": "a", "path": "a.jsonl"}]}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_number_of_any_setting_is_nan_or_infinite(value: float) -> None:
    tried = 0
    for section, more, kind in SECTIONS_AND_METHODS:
        for name, _ in numbers(kind):
            tables = {"data": SOURCE} | {section: {**(SOURCE if section == "data" else more), name: value}}
            with pytest.raises(ConfigError, match=f"{name}.* = "):
                to_config(tables)
            tried += 1
    assert tried > 100


CHECKED_WITH_THE_CLIENTS = {"experts", "expert_choices", "min_holders", "min_experts", "max_experts", "assign_every"}
"""Of FedAMoLE, by its `check`, together: test_infeasible_numbers_of_experts."""


def test_no_count_or_share_is_negative() -> None:
    tried = 0
    for section, more, kind in SECTIONS_AND_METHODS:
        for name, option in numbers(kind):
            if name in ("seed", "min_similarity") or name in CHECKED_WITH_THE_CLIENTS:  # a cosine may be negative
                continue
            tables = {"data": SOURCE} | {section: {**(SOURCE if section == "data" else more), name: option(-1)}}
            with pytest.raises(ConfigError, match=name):
                to_config(tables)
            tried += 1
    assert tried > 100


@pytest.mark.parametrize(
    "number", ["federation.rounds=100001", "deployment.deadline=1e9", "run.threads=-1", "run.threads=5000"]
)
def test_numbers_that_no_machine_has(number: str, own: Path, fedamole: Any) -> None:
    refused(fedamole("plan", own, number), 2, number.partition("=")[0])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_none_in_files(value: str, own: Path, tiny: Path, tmp_path: Path, fedamole: Any) -> None:
    own.write_text(own.read_text().replace("learning_rate = 0.01", f"learning_rate = {value}"))
    refused(fedamole("plan", own), 2, str(own), f"training.learning_rate = {value}: must be a finite number")
    path = written(tmp_path, tiny, ["fedit"])
    path.write_text(f"learning_rates = [{value}]\n" + path.read_text())
    refused(fedamole("compare", path, "--dry-run"), 2, str(path), f"learning_rates[0] = {value}")


def options() -> Iterator[tuple[str, click.Parameter]]:
    def every(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield name, command
        if isinstance(command, click.Group):
            for inner in command.commands.values():
                yield from every(f"{name} {inner.name}".strip(), inner)

    for name, command in every("", typer.main.get_command(cli.app)):
        for parameter in command.params:
            yield name, parameter


CHECKED_LATER = {
    "client limit",
    "adapt limit",
    "adapt steps",
    "export rank",
    "export tokens",
    "export ridge",
    "export tolerance",
    "merge rank",
    "merge density",
    "merge off_diagonal",
    "merge examples",
    "merge tokens",
    "certs days",
    "certs client_days",
    "clients extend days",
    "clients replace days",
}
"""Options whose range is checked by the settings that they become, each with a test there."""


def test_every_number_of_the_command_line_has_a_range() -> None:
    plain = {
        f"{command} {parameter.name}"
        for command, parameter in options()
        if isinstance(parameter.type, click.types.IntParamType | click.types.FloatParamType)
        and not isinstance(parameter.type, click.IntRange | click.FloatRange)
    }
    assert plain == CHECKED_LATER


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_of_the_command_line_is_nan_or_infinite(value: str, fedamole: Any) -> None:
    results = [
        (command.split(), parameter.opts[0])
        for command, parameter in options()
        if isinstance(parameter.type, click.types.FloatParamType)
    ]
    assert len(results) >= 4
    for arguments, option in results:
        result = fedamole(*arguments, f"{option}={value}", *(["x"] if arguments == ["export"] else []))
        assert result.code == 2
        assert re.search(r"finite|not in the range", result.err), result.err
    assert "finite" in fedamole("export", "x", "--out", "y", "--ridge=nan").err


# --- names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "a\\b", "", " ", ".", "..", ".hidden", "a\nb", "x" * 121])
def test_a_name_of_a_run_stays_inside_runs(name: str, own: Path, fedamole: Any) -> None:
    refused(fedamole("plan", own, f"run.name={json.dumps(name)}"), 2, "run.name = ", "the name of a folder in runs/")
    tables = {"run": {"name": name}, "data": SOURCE}
    with pytest.raises(ConfigError, match=r"run\.name"):
        to_config(tables)


@pytest.mark.parametrize("name", ["größe", "a b", "2025-11-27", "5", "1e3", "true", "nan", "x-2", "名前"])
def test_names_of_runs_are_text_on_the_command_line(name: str, own: Path) -> None:
    assert load_config(own, [f"run.name={name}"]).run.name == name


def test_numbers_and_tables_of_the_command_line_stay_what_they_are(own: Path) -> None:
    overrides = ["run.seed=5", "data.templates.mine={prompt='{prompt}',answer='{completion}'}", "deployment.max_norm=3"]
    config = load_config(own, [*overrides, "data.templates.mine.prompt=7 {prompt}", "run.device=cpu"])
    assert config.run.seed == 5
    assert config.deployment.max_norm == 3.0
    assert config.data.templates["mine"].prompt == "7 {prompt}"
    with pytest.raises(ConfigError, match="answer = '7': it names no column"):
        load_config(own, [*overrides, "data.templates.mine.answer=7"])
    with pytest.raises(ConfigError, match=r"rank = 'x'.*whole number"):
        load_config(own, ["method.rank=x"])


def test_a_date_or_number_without_quotes_in_a_file(own: Path, fedamole: Any) -> None:
    text = own.read_text()
    for value, message in (
        ("2025-11-27", "2025-11-27 (a date or time): must be text in quotes"),
        ("5", "text in quotes"),
    ):
        own.write_text(text.replace("[run]", f"[run]\nname = {value}"))
        refused(fedamole("plan", own), 2, str(own), "run.name = ", message)


# --- files ----------------------------------------------------------------------------------------------------

MARK = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_skipped_in_every_toml(own: Path, tiny: Path, tmp_path: Path) -> None:
    own.write_bytes(MARK + own.read_bytes())
    child = own.with_name("child.toml")
    child.write_bytes(MARK + b'extends = "config.toml"\n')
    assert load_config(child).training.local_steps == 3
    path = written(tmp_path, tiny, ["fedit"])
    path.write_bytes(MARK + path.read_bytes())
    assert load_comparison(path).settings.name == "small"
    policy = tmp_path / "policy.toml"
    policy.write_bytes(MARK + b"max_rank = 3\n")
    assert read_policy(policy).max_rank == 3


def test_folders_that_cannot_be_made(own: Path, fedamole: Any) -> None:
    arguments = ("run", own, *SMALL)
    inside_a_file = own.parent / "plain.jsonl" / "run"
    refused(fedamole(*arguments, f"run.folder={inside_a_file}"), 1 + 4, str(inside_a_file), "is not a folder")
    if sys.platform == "linux":
        refused(fedamole(*arguments, "run.folder=/proc/run"), 1, "/proc/run: ", "; ")
    refused(fedamole("partition", own, "--out", own.parent / "plain.jsonl" / "x.json"), 5, "is not a folder")
    refused(fedamole("partition", own, "--out", own), 5, "already exists")


def test_a_place_without_permission(own: Path, fedamole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the system's refusal is made here."""

    def mkdir(path: object, *_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "mkdir", mkdir)
    refused(fedamole("run", own, *SMALL), 1, "runs: Permission denied; choose another folder")


def test_a_run_resumes_after_a_full_disk(
    own: Path, fedamole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, 0

    def fsync(file: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    folder = tmp_path / "run"
    arguments = ("run", own, *SMALL, "method.name=fedit", "federation.rounds=1", f"run.folder={folder}")
    refused(fedamole(*arguments), 1, f"{folder}/", "No space left on device; free some space")
    monkeypatch.setattr(os, "fsync", real)
    assert fedamole("resume", folder).code == 0


def test_three_runs_at_once_get_three_folders(own: Path, tmp_path: Path) -> None:
    """Forked children, as libraries are loaded already; each goes through the real command."""
    children = []
    for seed in range(3):
        arguments = [
            "fedamole",
            "run",
            str(own),
            *SMALL,
            "method.name=fedit",
            "federation.rounds=1",
            f"run.seed={seed}",
        ]
        child = os.fork()
        if child == 0:
            try:
                os.chdir(tmp_path)
                sys.argv = arguments
                cli.main()
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name for folder in folders] == ["run", "run-2", "run-3"]
    assert all((folder / "summary.json").exists() for folder in folders)
    assert sorted(load_config(folder / "config.toml").run.seed for folder in folders) == [0, 1, 2]
    for folder in folders:
        assert load_config(folder / "config.toml").run.folder == str(folder)


# --- locales --------------------------------------------------------------------------------------------------


def test_a_locale_that_is_not_utf_8(runs: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs("fedit"), folder)
    tables = load_config(folder / "config.toml", ["run.name=größe"]).tables()
    (folder / "config.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
    completed = process("show", folder, "--json", **ASCII)
    assert completed.returncode == 0, completed.stderr
    assert "größe" in json.loads(completed.stdout.decode("ascii"))[0]["columns"]
    shown = process("show", folder, **ASCII)
    assert shown.returncode == 0, shown.stderr
    assert b"gr\\xf6\\xdfe" in shown.stdout
    assert b"Traceback" not in shown.stderr + completed.stderr
    out = tmp_path / "report.html"
    assert process("report", folder, "--out", out, **ASCII, PYTHONIOENCODING="ascii").returncode == 0
    assert "größe" in out.read_text(encoding="utf-8")


def test_texts_in_a_locale_that_is_not_utf_8(runs: Any, tmp_path: Path) -> None:
    """Prompts of the command line and of standard input are UTF-8, and so is what comes out as JSON."""
    arguments = [sys.executable, "-m", "fedamole", "generate", str(runs("fedit")), "--client", "mood", "--json"]
    environment = {**os.environ, **ASCII}
    given, piped = (
        subprocess.run([*arguments, *more], input="名前\n".encode(), capture_output=True, env=environment, check=False)
        for more in (["größe".encode()], [])
    )
    assert given.returncode == piped.returncode == 0, given.stderr + piped.stderr
    assert json.loads(given.stdout.decode("ascii"))["prompt"] == "größe"
    assert json.loads(piped.stdout.decode("ascii"))["prompt"] == "名前"


def test_words_that_are_no_text() -> None:
    assert decoded("gr\udcc3\udcb6\udcc3\udc9fe") == "größe"
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        decoded("gr\udcf6\udcdfe")
    bad = subprocess.run(
        [sys.executable, "-m", "fedamole", "methods", b"gr\xf6\xdfe"], capture_output=True, check=False
    )
    assert bad.returncode == 2
    assert b"not UTF-8 text" in bad.stderr
    assert b"Traceback" not in bad.stderr


def test_a_name_that_the_locale_lacks() -> None:
    line = (
        "from fedamole.cli.options import describe\n"
        "try: open('gr\\xf6\\xdfe')\n"
        "except Exception as error: print(describe(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, env={**os.environ, **ASCII}, check=False)
    assert b"set LC_ALL=C.UTF-8" in done.stdout, done.stderr


# --- how commands end -----------------------------------------------------------------------------------------


def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """Exit code and error stream of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["fedamole", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr().err


def test_a_bug_shows_its_traceback_and_what_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(experiment, "plan", broken)
    code, err = ended(monkeypatch, capsys, "plan")
    assert code == 1
    assert "Traceback" in err
    assert f"this is a bug in fedamole {__version__}" in err.replace("\n", " ").splitlines()[-1]
    assert "report it" in err


def test_debug_shows_the_traceback_of_any_error(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("plan", str(own), "run.threads=-1")
    assert "Traceback" not in ended(monkeypatch, capsys, *arguments)[1]
    for given in (("--debug", *arguments), (*arguments, "--debug")):
        code, err = ended(monkeypatch, capsys, *given)
        assert code == 2
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("error: ")


def test_no_memory_is_no_bug() -> None:
    assert "not enough memory" in str(describe(MemoryError()))
    assert "not enough memory" in str(describe(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate")))
    assert describe(RuntimeError("x")) is None
    assert describe(UnicodeError("x")) is None, "a bug where the locale is UTF-8"


def test_an_interrupt_before_the_first_round_leaves_nothing(
    own: Path, fedamole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "prepare", interrupted)
    result = fedamole("run", own, *SMALL)
    assert result.code == 130
    assert result.line == "interrupted; no round had begun and nothing was saved: start the run again"
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(experiment, "plan", interrupted)
    assert fedamole("plan", own).code == 130
    assert not fedamole("plan", own).err.strip()


def test_a_reader_that_leaves_early_is_no_error() -> None:
    line = f"{sys.executable} -m fedamole methods | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=False)
    assert done.returncode in (0, 1)
    assert done.stderr == b""


def test_python_dash_m_and_the_version() -> None:
    completed = process("--version")
    assert (completed.returncode, completed.stdout.decode()) == (0, f"fedamole {__version__}\n")


def test_version_and_short_help_everywhere(fedamole: Any) -> None:
    for arguments in {tuple(command.split()) for command, _ in options()}:
        assert fedamole(*arguments, "--version").out == f"fedamole {__version__}\n"
        short, long = fedamole(*arguments, "-h"), fedamole(*arguments, "--help")
        assert short.code == 0
        assert short.out == long.out
        assert "Usage" in short.out
