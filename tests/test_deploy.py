"""Container file, compose file, systemd units and their settings: what can be checked without running them."""

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from fedamole.cli.main import app
from fedamole.deployment.log_files import MAX_BYTES, MAX_OLD_LOGS

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
COMMAND = typer.main.get_command(app)
each_unit = pytest.mark.parametrize("unit", UNITS, ids=[unit.stem for unit in UNITS])
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def parsed(arguments: list[str]) -> None:
    """Parse the words after `fedamole` with the real command line; raises the user's error."""
    if arguments[0].startswith("-"):
        COMMAND.make_context("fedamole", list(arguments), resilient_parsing=True).close()
        return
    COMMAND.commands[arguments[0]].make_context(arguments[0], list(arguments[1:])).close()  # type: ignore[attr-defined]


def coordinated(arguments: list[str], folder: Path) -> list[list[str]]:
    """The commands that coordinate.sh starts before and after the run exists."""
    fake = folder / "bin" / "fedamole"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}"}

    def said() -> list[str]:
        done = subprocess.run(
            [str(DEPLOY / "coordinate.sh"), *arguments], cwd=folder, env=env, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    first = said()
    settings = folder / arguments[1] / "server" / "config.toml"
    settings.parent.mkdir(parents=True)
    settings.touch()
    return [first, said()]


def test_the_coordinator_starts_once_and_then_resumes(tmp_path: Path) -> None:
    arguments = ["/etc/run.toml", "runs/a b", "--certs", "c d", "--port", "1"]
    first, then = coordinated(arguments, tmp_path)
    assert first == ["server", "/etc/run.toml", "run.folder=runs/a b", "--certs", "c d", "--port", "1"]
    assert then == ["server", "--resume", "runs/a b", "--certs", "c d", "--port", "1"]
    parsed(first)
    parsed(then)
    assert subprocess.run([str(DEPLOY / "coordinate.sh")], capture_output=True).returncode != 0


# The container file.


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of every instruction of the container file, in order."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (DEPLOY / "Containerfile").read_text()).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def last_stage() -> list[tuple[str, str]]:
    result = instructions()
    start = max(at for at, (name, _) in enumerate(result) if name == "FROM")
    return result[start:]


def ignored(path: str) -> bool:
    """Whether .dockerignore excludes a path; the last matching pattern decides."""
    result = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        if pattern == "*" or path == pattern or path.startswith(f"{pattern}/"):
            result = not line.startswith("!")
    return result


def test_every_instruction_is_known() -> None:
    known = {
        "ARG",
        "FROM",
        "WORKDIR",
        "COPY",
        "RUN",
        "LABEL",
        "ENV",
        "USER",
        "VOLUME",
        "EXPOSE",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }
    assert {name for name, _ in instructions()} == known


def test_every_copied_path_exists_and_reaches_the_build() -> None:
    stages = {arguments.split()[-1] for name, arguments in instructions() if name == "FROM" and " AS " in arguments}
    copied = []
    for name, arguments in instructions():
        if name != "COPY":
            continue
        *sources, _ = [argument for argument in arguments.split() if not argument.startswith("--")]
        stage = re.search(r"--from=(\S+)", arguments)
        if stage is not None:
            assert stage[1] in stages
            continue
        for source in sources:
            assert (ROOT / source).exists(), source
            assert not ignored(source), source
            copied.append(source)
    assert {"src", "constraints.txt", "pyproject.toml"} <= set(copied)
    for secret in ("certs/ca.key", "runs/demo/x", "deploy/certs/node.key", "deploy/data/rows.jsonl", ".git/config"):
        assert ignored(secret), secret
    assert (DEPLOY / "coordinate.sh").stat().st_mode & 0o111


def test_the_last_stage_has_no_root_and_no_tools() -> None:
    stage = last_stage()
    users = [arguments for name, arguments in stage if name == "USER"]
    assert users == ["10001:10001"]
    assert all(int(part) > 0 for part in users[0].split(":"))
    after = [name for name, _ in stage[[name for name, _ in stage].index("USER") :]]
    assert not {"RUN", "COPY"} & set(after)
    for name, arguments in stage:
        if name == "RUN":
            assert not re.search(r"\b(pip|apt|apt-get|gcc|make|curl|git)\b", arguments), arguments
    assert any(name == "COPY" and "--from=environment" in arguments for name, arguments in stage)
    labels = next(arguments for name, arguments in stage if name == "LABEL")
    assert {"org.opencontainers.image.title", "org.opencontainers.image.licenses"} <= set(
        pair.partition("=")[0] for pair in shlex.split(labels)
    )


def test_what_it_installs_is_hashed_and_from_the_wheelhouse() -> None:
    pips = [arguments for name, arguments in instructions() if name == "RUN" and "pip install" in arguments]
    assert len(pips) == 1
    assert "--no-index --find-links /wheelhouse --require-hashes -r /wheelhouse/requirements.txt" in pips[0]


def test_torchs_build_is_chosen_and_not_guessed() -> None:
    run = next(arguments for name, arguments in instructions() if name == "RUN")
    refused = subprocess.run(["sh", "-c", run], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert refused.returncode != 0
    assert "give --build-arg TORCH_INDEX=URL" in refused.stderr


def test_what_the_image_starts() -> None:
    stage = dict(last_stage())
    entry, command = json.loads(stage["ENTRYPOINT"]), json.loads(stage["CMD"])
    assert entry == ["fedamole"]
    parsed(command)
    check = re.fullmatch(r"(--[a-z-]+=\S+ )+CMD (\[.*\])", stage["HEALTHCHECK"])
    assert check is not None
    name, *arguments = json.loads(check[2])
    assert name == "fedamole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDAMOLE_HEALTH", "127.0.0.1:9092")
        parsed(arguments)
    variables = dict(pair.split("=", 1) for pair in shlex.split(stage["ENV"]))
    assert variables["HOME"] == stage["WORKDIR"] == stage["VOLUME"]
    assert variables["HF_HOME"].startswith(variables["HOME"])


def test_the_compose_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert set(services) == {"coordinator", "client"}
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["user"] == "10001:10001"
        assert not service.get("privileged")
        monkeypatch.setenv("FEDAMOLE_HEALTH", service["environment"]["FEDAMOLE_HEALTH"])
        parsed(["health"])
        for volume in service["volumes"]:
            source, target, *mode = volume.split(":")
            assert mode == ["ro"] or target == "/var/lib/fedamole", (source, target)
    assert "ports" not in services["client"]
    parsed(services["client"]["command"])
    for arguments in coordinated(["run.toml", *services["coordinator"]["command"][1:]], tmp_path):
        parsed(arguments)


def test_the_page_starts_containers_with_real_commands(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "operate.md").read_text().replace("\\\n", " ")
    started = [line.split() for line in text.splitlines() if line.startswith("podman run")]
    assert len(started) == 2
    for arguments in started:
        image = arguments.index("fedamole")
        assert {"--read-only", "--cap-drop", "no-new-privileges"} <= set(arguments[:image])
        if "fedamole-coordinate" in arguments:
            for output in coordinated(["run.toml", *arguments[image + 2 :]], tmp_path):
                parsed(output)
        else:
            parsed(arguments[image + 1 :])


def test_the_files_and_numbers_of_the_page() -> None:
    text = (ROOT / "docs" / "operate.md").read_text()
    beside = re.findall(r"`([\w-]+\.(?:service|yaml))`", text)
    named = {*re.findall(r"\bdeploy/[\w.-]+", text), *(f"deploy/{name}" for name in beside)}
    assert len(named) >= 6
    for name in named:
        assert (ROOT / name).exists(), name
    assert (MAX_BYTES, MAX_OLD_LOGS) == (10 * 2**20, 3)
    assert "larger than 10 MiB" in text
    assert "three older files are kept" in text
    within = next(it for it in COMMAND.commands["health"].params if it.name == "within")  # type: ignore[attr-defined]
    assert f"at most {within.default:.0f} seconds ago" in text


# The systemd units.


def settings(unit: Path) -> dict[str, list[str]]:
    """The keys of [Service] with all their values."""
    results: dict[str, list[str]] = {}
    section = ""
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and line and not line.startswith("#"):
            key, _, value = line.partition("=")
            results.setdefault(key, []).append(value)
    return results


def example(unit: Path) -> dict[str, str]:
    """The example settings that belong to a unit."""
    text = (DEPLOY / f"{unit.stem.removeprefix('fedamole-')}.env").read_text()
    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(f"[env]\n{text}")
    return dict(parser["env"])


@each_unit
def test_a_units_command_is_one_of_the_real_command_line(
    unit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {**example(unit), "CREDENTIALS_DIRECTORY": "/run/credentials/x"}
    (started,) = settings(unit)["ExecStart"]
    program, *arguments = [re.sub(r"\$\{(\w+)\}", lambda name: env[name[1]], argument) for argument in started.split()]
    if program.endswith("/coordinate.sh"):
        for output in coordinated(arguments, tmp_path):
            parsed(output)
    else:
        assert program == "/opt/fedamole/bin/fedamole"
        parsed(arguments)
    assert f"EnvironmentFile=/etc/fedamole/{unit.stem.removeprefix('fedamole-')}.env" in unit.read_text()
    monkeypatch.setenv("FEDAMOLE_HEALTH", env["FEDAMOLE_HEALTH"])
    parsed(["health"])
    # Each setting is used by the unit or by a program that it starts.
    used = set(re.findall(r"\$\{(\w+)\}", started)) | {"FEDAMOLE_HEALTH", "HF_HUB_OFFLINE"}
    assert set(example(unit)) <= used


@each_unit
def test_a_unit_is_hardened(unit: Path) -> None:
    expected = {
        "User": "fedamole",
        "UMask": "0077",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateTmp": "yes",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "LimitCORE": "0",
        "Restart": "on-failure",
        "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
        "StateDirectoryMode": "0700",
    }
    options = settings(unit)
    assert {key: options[key] for key in expected} == {key: [value] for key, value in expected.items()}
    assert options["SystemCallFilter"] == ["@system-service", "~@privileged @resources"]
    assert "MemoryMax" in options
    assert ("LoadCredential" in options) == (unit.stem == "fedamole-client")


def test_a_clients_credentials_are_the_files_of_its_certs() -> None:
    options = settings(DEPLOY / "fedamole-client.service")["LoadCredential"]
    assert [argument.partition(":")[0] for argument in options] == ["ca.crt", "coordinator.pub", "node.key"]


def test_exit_codes_that_a_restart_does_not_mend() -> None:
    from fedamole.errors import BaseModelError, ConfigError, DataError

    for unit in UNITS:
        codes = {str(kind.exit_code) for kind in (ConfigError, DataError, BaseModelError)}
        assert set(settings(unit)["RestartPreventExitStatus"][0].split()) == codes


def installed(unit: Path, folder: Path) -> Path:
    """A copy of a unit whose programs are those of this checkout."""
    fedamole = Path(sys.executable).with_name("fedamole")
    text = unit.read_text().replace("ExecStart=/opt/fedamole/bin/fedamole ", f"ExecStart={fedamole} ")
    text = text.replace("/opt/fedamole/libexec/coordinate.sh", str(DEPLOY / "coordinate.sh"))
    (folder / unit.name).write_text(text)
    return folder / unit.name


@needs_systemd
@each_unit
def test_systemd_accepts_a_unit(unit: Path, tmp_path: Path) -> None:
    copy = installed(unit, tmp_path)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True)
    output = [line for line in done.stderr.splitlines() if copy.name in line or str(copy) in line]
    assert (done.returncode, output) == (0, []), done.stderr
    copy.write_text(copy.read_text().replace("ProtectSystem=strict", "ProtectSystem=stricter"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True)
    assert "stricter" in done.stderr  # so a wrong value would be seen


@needs_systemd
@each_unit
def test_systemd_judges_a_unit_as_well_protected(unit: Path, tmp_path: Path) -> None:
    """`systemd-analyze security` gives 0 (closed) to 10 (open); the units of this project have 1.3."""
    arguments = ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager"]
    done = subprocess.run([*arguments, str(installed(unit, tmp_path))], capture_output=True, text=True)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze judges no unit files")
    assert done.returncode == 0, done.stdout[-500:]
    open_ = subprocess.run(
        [*arguments[:-2], "--threshold=5", str(tmp_path / unit.name)], capture_output=True, text=True
    )
    assert open_.returncode != 0  # so a threshold is kept
