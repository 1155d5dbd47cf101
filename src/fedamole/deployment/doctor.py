"""Read-only checks for problems that would prevent a server or a client from working.

The texts contain names, columns and counts of data but never their content, so a report can be sent to a coordinator.
"""

import difflib
import errno
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fedamole.deployment.connection_check import TIMEOUT_S, check_connection, without_tls
from fedamole.deployment.security.inspection import Fault, inspect_client, inspect_server
from fedamole.deployment.security.keys import read_passphrase
from fedamole.errors import ConfigError, DataError, FedamoleError

if TYPE_CHECKING:
    from fedamole.data.sources import Table
    from fedamole.data.templates import TemplateSettings

FindingState = Literal["ok", "warning", "problem"]

FLOWER = SpecifierSet("==1.41.*")
"""Supported versions of Flower; its wire format and commands change between minor versions."""
PACKAGES = ("torch", "transformers", "peft")
COMMANDS = ("flower-superexec", "flwr-serverapp")
"""Flower's commands that a server starts; a client starts none."""
MIN_DISK = 5 * 2**30
"""Bytes: enough for a small base and its checkpoints."""


@dataclass(frozen=True)
class Finding:
    """The result of one check; `remedy` is empty if there is nothing to do, or if the text contains it."""

    what: str
    state: FindingState
    text: str
    remedy: str = ""


Check = Callable[[], Iterable[Finding]]


def examine_server(config: Path | None, certs: Path | None, host: str, port: int) -> list[Finding]:
    """Check everything that a server needs; `host` is the name that clients use, or 0.0.0.0 for all addresses.

    `config` names the base ([base] model); without `certs` the server would run without TLS. Never raises.
    """
    checks: list[tuple[str, Check]] = [
        ("python", python_version),
        ("packages", package_versions),
        ("commands", commands),
        ("port", lambda: port_is_free(host, port)),
        ("certificates", lambda: server_certificates(certs, host)),
        ("disk", lambda: disk(Path.cwd())),
    ]
    if config is not None:
        checks.append(("base", lambda: base_of_config(config)))
        checks.append(("exposure", lambda: exposed_by(config)))
    return _run_checks(checks)


def exposed_by(path: Path) -> list[Finding]:
    """List what the coordinator and other clients can compute from the exchanged data of a config."""
    from fedamole.config import load_config, read_tables
    from fedamole.planning import exposure

    if "clients" not in read_tables(path).get("deployment", {}):
        return []
    config = load_config(path)
    config = replace(config, method=config.method.for_deployment())
    return [Finding("exposure", "ok", text) for text in exposure(config, len(config.deployment.clients))]


def examine_client(
    server: str | None,
    certs: Path | None,
    base: str | None,
    data: Path | None,
    template: str = "auto",
    columns: Mapping[str, str] | None = None,
    config: Path | None = None,
) -> list[Finding]:
    """Check everything that an organisation needs; checks whose argument is None are skipped.

    `server` is HOST:PORT, `certs` the folder with ca.crt and node.key, `base` a folder, "bundled" or a hub id;
    `template` and `columns` (new = old) are as in a config's source. Only the templates of `config`, the coordinator's
    config, are read. Never raises.
    """
    checks: list[tuple[str, Check]] = [
        ("python", python_version),
        ("packages", package_versions),
        ("device", device),
        ("disk", lambda: disk(Path.cwd())),
    ]
    if certs is not None:
        checks.append(("certificates", lambda: client_certificates(certs)))
    if server is not None:
        checks.append(("server", lambda: server_answers(server, certs)))
    if base is not None:
        checks.append(("base", lambda: base_is_there(base, Path.cwd())))
    if data is not None:
        checks.append(("data", lambda: data_fit(data, template, columns or {}, config)))
    return _run_checks(checks)


def _run_checks(checks: Sequence[tuple[str, Check]]) -> list[Finding]:
    return [finding for what, check in checks for finding in _run_check(what, check)]


def _run_check(what: str, check: Check) -> list[Finding]:
    """Run a check; an exception becomes a finding."""
    try:
        return list(check())
    except FedamoleError as error:
        return [Finding(what, "problem", str(error))]
    except Exception as error:
        # Error texts of data checks may quote the data.
        reason = type(error).__name__ if what == "data" else f"{type(error).__name__}: {error}".splitlines()[0]
        return [Finding(what, "problem", f"the check itself failed: {reason}", "fix this and run the check again")]


def _findings(what: str, faults: Sequence[Fault], fine: str) -> list[Finding]:
    if not faults:
        return [Finding(what, "ok", fine)]
    return [Finding(what, "problem" if fault.urgent else "warning", fault.text, fault.remedy) for fault in faults]


def python_version() -> list[Finding]:
    """Check Python against the version that the package requires."""
    required = SpecifierSet(metadata("fedamole")["Requires-Python"])
    text = f"Python {platform.python_version()} at {sys.executable}"
    if required.contains(platform.python_version(), prereleases=True):
        return [Finding("python", "ok", text)]
    return [Finding("python", "problem", f"{text} is outside {required}", "create an environment with another Python")]


def package_versions() -> list[Finding]:
    """Check the versions of Flower and the large packages against pyproject.toml, without importing them."""
    required = {need.name: need.specifier for need in map(Requirement, requires("fedamole") or ())}
    return [_package(name, required[name]) for name in PACKAGES] + [_package("flwr", FLOWER)]


def _package(name: str, allowed: SpecifierSet) -> Finding:
    remedy = f"pip install '{name}{allowed}'"
    try:
        installed = version(name)
    except PackageNotFoundError:
        return Finding("packages", "problem", f"{name} is not installed here", remedy)
    if not allowed.contains(installed, prereleases=True):
        return Finding("packages", "problem", f"{name} {installed} is outside {allowed}", remedy)
    return Finding("packages", "ok", f"{name} {installed}")


def commands() -> list[Finding]:
    """Check for Flower's commands next to this Python, where a server looks for them."""
    folder = Path(sys.executable).parent
    missing = [name for name in COMMANDS if shutil.which(name, path=str(folder)) is None]
    if not missing:
        return [Finding("commands", "ok", f"{', '.join(COMMANDS)} in {folder}")]
    remedy = f"install Flower into this environment: {sys.executable} -m pip install 'flwr{FLOWER}'"
    return [Finding("commands", "problem", f"{', '.join(missing)} not found in {folder}", remedy)]


def device() -> list[Finding]:
    """Report the GPU that training would use, or the number of CPU threads."""
    if find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            name = torch.cuda.get_device_name()
            return [Finding("device", "ok", f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [Finding("device", "ok", f"no GPU is visible; training uses the CPU with {threads} threads")]


def disk(folder: Path) -> list[Finding]:
    """Check the free space for runs."""
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**30:.1f} GiB free at {folder}"
    if free >= MIN_DISK:
        return [Finding("disk", "ok", text)]
    return [Finding("disk", "warning", text, f"free some space: a base and its runs need {MIN_DISK / 2**30:.0f} GiB")]


def port_is_free(host: str, port: int) -> list[Finding]:
    """Check whether a server can listen on the port, by listening on it."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        remedy = "correct the name, or use 0.0.0.0 to listen on all addresses"
        return [Finding("port", "problem", f"{host}: this name has no address ({error.strerror})", remedy)]
    try:
        _listen(family, address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            remedy = "stop the program that uses it (perhaps another server), or choose another port"
            return [Finding("port", "problem", f"port {port} is in use", remedy)]
        if error.errno == errno.EACCES:
            return [Finding("port", "problem", f"port {port} needs more privileges", "choose a port above 1023")]
        if error.errno == errno.EADDRNOTAVAIL:
            remedy = "listen on 0.0.0.0 if this machine is behind a router or proxy"
            return [Finding("port", "warning", f"{host} is not an address of this machine", remedy)]
        raise
    return [Finding("port", "ok", f"port {port} is free on {host or 'all addresses'}")]


def _listen(family: int, address: tuple[object, ...]) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        if os.name == "posix":  # as servers do: a recently released port counts as free
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1)


def server_certificates(certs: Path | None, host: str) -> list[Finding]:
    """Check the server's certificate, key and CA."""
    faults = [without_tls(host)] if certs is None else inspect_server(certs, host, read_passphrase(None))
    return _findings("certificates", faults, f"{certs}: valid")


def client_certificates(certs: Path) -> list[Finding]:
    """Check the CA certificate, the coordinator's public order key, and the client's own key."""
    return _findings("certificates", inspect_client(certs, read_passphrase(None)), f"{certs}: valid")


def server_answers(server: str, certs: Path | None) -> list[Finding]:
    """Check whether the server at HOST:PORT can be reached and trusted; without `certs`, only reached."""
    fine, faults = check_connection(server, None if certs is None else certs / "ca.crt")
    return _findings("server", faults, fine)


def base_of_config(config: Path) -> list[Finding]:
    """Check the base that a config names."""
    from fedamole.config import build, read_tables
    from fedamole.model.base import BaseSettings

    settings: BaseSettings = build(BaseSettings, read_tables(config).get("base", {}), "base")
    return base_is_there(settings.model, config.parent)


def base_is_there(base: str, folder: Path) -> list[Finding]:
    """Check whether a base is in `folder` or the hub's cache, or can be downloaded."""
    from fedamole.model.base import locate

    location = locate(base, folder)
    return [_folder_base(base, Path(location)) if Path(location).is_dir() else _hub_base(location)]


def _folder_base(base: str, folder: Path) -> Finding:
    """Check a folder for config and weights; only safetensors files are read."""
    if not (folder / "config.json").is_file():
        return Finding("base", "problem", f"{base}: {folder} has no config.json", "choose the folder with the model")
    if not any(folder.glob("*.safetensors")):
        remedy = "download the model again with its .safetensors files"
        return Finding("base", "problem", f"{base}: {folder} has no weights (*.safetensors)", remedy)
    return Finding("base", "ok", f"{base}: in {folder}")


def _hub_base(base: str) -> Finding:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        cached = try_to_load_from_cache(base, "config.json")
        if isinstance(cached, str):
            return _folder_base(base, Path(cached).parent)
        if not constants.HF_HUB_OFFLINE:
            get_hf_file_metadata(hf_hub_url(base, "config.json"), timeout=TIMEOUT_S)
            return Finding("base", "ok", f"{base}: on the hub; it is downloaded at the first start")
    except HFValidationError:
        return Finding("base", "problem", f"{base!r} is neither a folder nor a hub id", "correct base.model")
    except RepositoryNotFoundError:  # also raised for a model whose licence was not accepted
        remedy = "correct the id, or accept the model's licence on the hub and log in with `hf auth login`"
        return Finding("base", "problem", f"{base}: not found on the hub, or not accessible", remedy)
    except Exception as error:  # network libraries raise many exception types; this machine may be offline permanently
        return _uncached(base, f"and the hub cannot be reached ({type(error).__name__})")
    return _uncached(base, "and HF_HUB_OFFLINE forbids downloads")


def _uncached(base: str, why: str) -> Finding:
    remedy = (
        f"on a machine with network access run `hf download {base}`, then copy the folder here and use it as the base"
    )
    return Finding("base", "warning", f"{base}: not in this machine's cache, {why}", remedy)


def data_fit(
    path: Path, template: str = "auto", columns: Mapping[str, str] | None = None, config: Path | None = None
) -> list[Finding]:
    """Check columns and rows of a data file, the template that matches, and how many rows give an example.

    A template that is neither built in nor in the coordinator's `config` is a problem; without a config it is reported
    as the coordinator's and not checked.
    """
    from fedamole.data.settings import SourceSettings
    from fedamole.data.sources import FORMATS, read_source
    from fedamole.data.templates import BUILT_IN, choose

    if not path.is_file():
        return [Finding("data", "problem", f"there is no file {path}", "correct the path")]
    if not path.name.endswith(FORMATS):
        text = f"{path.name}: unknown file format"
        return [Finding("data", "problem", text, f"use one of {', '.join(FORMATS)}")]
    if path.stat().st_size == 0:
        return [Finding("data", "problem", f"{path.name}: the file is empty", "write one row per line")]
    try:
        source = SourceSettings(name="data", path=str(path.resolve()), template=template, columns=dict(columns or {}))
        table, _ = read_source(source, path.parent)
    except Exception as error:  # the error text may quote a row
        return [_unreadable(path, error)]
    facts = f"{path.name}: {len(table.rows)} rows with the columns {', '.join(table.columns)}"
    config_templates = {} if config is None else templates_of(config)
    if config is None and template not in ("auto", *BUILT_IN):
        text = f"template {template!r} is not built in, so the coordinator must define it; it was not checked"
        remedy = "give the coordinator's config with --config to check it" + _guess(template, BUILT_IN)
        return [Finding("data", "ok", facts), Finding("data", "warning", text, remedy)]
    try:
        chosen = choose(template, config_templates, table.columns, path.name)
    except (ConfigError, DataError) as error:
        return [Finding("data", "ok", facts), Finding("data", "problem", str(error))]
    known = {**BUILT_IN, **config_templates}
    name = template
    if template == "auto":
        name = next((name for name, settings in known.items() if settings == chosen), "classification")
    return [Finding("data", "ok", f"{facts}; template {name!r} would be chosen"), *_rows_fit(table, chosen)]


def templates_of(config: Path) -> "dict[str, TemplateSettings]":
    """Return the [data.templates] of a coordinator's config; ConfigError if they are invalid."""
    from fedamole.config import build, read_tables
    from fedamole.data.settings import DataSettings

    data = read_tables(config).get("data", {})
    templates = data.get("templates", {}) if isinstance(data, dict) else {}
    settings: DataSettings = build(DataSettings, {"templates": templates}, "data")
    return settings.templates


def _guess(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; or did you mean {matches[0]!r}?" if matches else ""


def _rows_fit(table: "Table", template: "TemplateSettings") -> list[Finding]:
    """Check how many rows give an example; the first row that does not is reported by number only."""
    from fedamole.data.answer_options import options_of
    from fedamole.data.templates import render

    try:
        options = options_of(template, table.rows, table.where)
    except DataError:
        text = f"{table.where}: column {template.options_from!r} has fewer than two values to choose from"
        remedy = (
            "add rows with every answer, or ask the coordinator to list all answers as options of a template "
            "under [data.templates], and select it with --template"
        )
        return [Finding("data", "problem", text, remedy)]
    usable, broken = 0, []
    for index, row in enumerate(table.rows):
        try:
            usable += render(template, options, row, table.row_name(index)) is not None
        except DataError:
            broken.append(index)
    if broken:
        first = table.row_name(broken[0])
        text = f"{len(broken)} of {len(table.rows)} rows do not match the template, the first is {first}"
        remedy = "correct or remove them: a column is empty, a label unknown, or the answers of a pair are equal"
        return [Finding("data", "problem", text, remedy)]
    if usable == 0:
        return [Finding("data", "problem", f"{table.where}: no row has an answer", "fill in the answer column")]
    return [Finding("data", "ok", f"{usable} of {len(table.rows)} rows have an answer")]


def _unreadable(path: Path, error: Exception) -> Finding:
    """Report an unreadable file by error type and row, without the error text, which may quote the row."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    row = re.match(r"source 'data', .*?, ((?:row|line) \d+):", str(error))
    where = f"{path.name}, {row[1]}" if row else path.name
    remedy = (
        f"correct the file; its format must match its ending, and every row must be complete ({type(cause).__name__})"
    )
    return Finding("data", "problem", f"{where}: cannot be read as rows", remedy)
