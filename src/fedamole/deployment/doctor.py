"""What would keep a server or a client from working, looked for before it starts; nothing here changes anything.

Texts hold names, columns and counts of data, never their content, so that a report can be sent to a coordinator.
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
"""Flower's wire format and commands change between minor versions; these are the ones this room was written for."""
PACKAGES = ("torch", "transformers", "peft")
COMMANDS = ("flower-superexec", "flwr-serverapp")
"""Flower's commands that a server starts; a client starts none."""
MIN_DISK = 5 * 2**30
"""Bytes: a small base and its checkpoints."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `remedy` is empty where there is nothing to do, or the text ends with it."""

    what: str
    state: FindingState
    text: str
    remedy: str = ""


Check = Callable[[], Iterable[Finding]]


def examine_server(config: Path | None, certs: Path | None, host: str, port: int) -> list[Finding]:
    """Look at everything that a server needs; `host` is what clients call it, or 0.0.0.0 for all addresses.

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
    """What the coordinator and other clients can compute from what travels, for a config that names its clients."""
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
    """Look at everything that an organisation needs; what is None is left out.

    `server` is HOST:PORT, `certs` the folder with ca.crt and node.key, `base` a folder, "bundled" or a hub id;
    `template` and `columns` (new = old) are as in a config's source. Of `config`, the coordinator's, the templates are
    read and nothing else. Never raises.
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
    """The findings of a check; whatever it raises becomes one."""
    try:
        return list(check())
    except FedamoleError as error:
        return [Finding(what, "problem", str(error))]
    except Exception as error:
        # The text of an error met among data may quote them.
        reason = type(error).__name__ if what == "data" else f"{type(error).__name__}: {error}".splitlines()[0]
        return [Finding(what, "problem", f"the check itself failed: {reason}", "mend that, then look again")]


def _findings(what: str, faults: Sequence[Fault], fine: str) -> list[Finding]:
    if not faults:
        return [Finding(what, "ok", fine)]
    return [Finding(what, "problem" if fault.urgent else "warning", fault.text, fault.remedy) for fault in faults]


def python_version() -> list[Finding]:
    """Python, against what the package asks for."""
    required = SpecifierSet(metadata("fedamole")["Requires-Python"])
    found = f"Python {platform.python_version()} at {sys.executable}"
    if required.contains(platform.python_version(), prereleases=True):
        return [Finding("python", "ok", found)]
    return [Finding("python", "problem", f"{found} is outside {required}", "make an environment with another Python")]


def package_versions() -> list[Finding]:
    """Flower and the large packages, in the ranges of pyproject.toml; none of them is imported."""
    required = {need.name: need.specifier for need in map(Requirement, requires("fedamole") or ())}
    return [_package(name, required[name]) for name in PACKAGES] + [_package("flwr", FLOWER)]


def _package(name: str, allowed: SpecifierSet) -> Finding:
    remedy = f"pip install '{name}{allowed}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding("packages", "problem", f"{name} is not installed here", remedy)
    if not allowed.contains(found, prereleases=True):
        return Finding("packages", "problem", f"{name} {found} is outside {allowed}", remedy)
    return Finding("packages", "ok", f"{name} {found}")


def commands() -> list[Finding]:
    """Flower's commands beside this Python, where a server looks for them."""
    folder = Path(sys.executable).parent
    missing = [name for name in COMMANDS if shutil.which(name, path=str(folder)) is None]
    if not missing:
        return [Finding("commands", "ok", f"{', '.join(COMMANDS)} in {folder}")]
    remedy = f"install Flower into this environment: {sys.executable} -m pip install 'flwr{FLOWER}'"
    return [Finding("commands", "problem", f"{', '.join(missing)} not found in {folder}", remedy)]


def device() -> list[Finding]:
    """The GPU that training would use, or how many CPU threads."""
    if find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            name = torch.cuda.get_device_name()
            return [Finding("device", "ok", f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [Finding("device", "ok", f"no GPU is visible; training takes the CPU, {threads} threads")]


def disk(folder: Path) -> list[Finding]:
    """Free space where runs are written."""
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**30:.1f} GiB free at {folder}"
    if free >= MIN_DISK:
        return [Finding("disk", "ok", text)]
    return [Finding("disk", "warning", text, f"make room: {MIN_DISK / 2**30:.0f} GiB hold a base and its runs")]


def port_is_free(host: str, port: int) -> list[Finding]:
    """Whether a server can listen here, tried as it would."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        remedy = "correct the name, or give 0.0.0.0 to listen on all addresses"
        return [Finding("port", "problem", f"{host}: this name has no address ({error.strerror})", remedy)]
    try:
        _listen(family, address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            remedy = "stop the program that has it (perhaps another server), or choose another port"
            return [Finding("port", "problem", f"port {port} is taken", remedy)]
        if error.errno == errno.EACCES:
            return [Finding("port", "problem", f"port {port} needs more rights", "choose a port from 1024 on")]
        if error.errno == errno.EADDRNOTAVAIL:
            remedy = "listen on 0.0.0.0 if this machine stands behind a router or proxy that leads here"
            return [Finding("port", "warning", f"{host} is no address of this machine", remedy)]
        raise
    return [Finding("port", "ok", f"port {port} is free on {host or 'all addresses'}")]


def _listen(family: int, address: tuple[object, ...]) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as place:
        if os.name == "posix":  # as servers do: a port that was given up a moment ago is free
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
        place.listen(1)


def server_certificates(certs: Path | None, host: str) -> list[Finding]:
    """The server's certificate, key and authority."""
    faults = [without_tls(host)] if certs is None else inspect_server(certs, host, read_passphrase(None))
    return _findings("certificates", faults, f"{certs}: in order")


def client_certificates(certs: Path) -> list[Finding]:
    """The CA's certificate, the order key's public half, and the client's own key."""
    return _findings("certificates", inspect_client(certs, read_passphrase(None)), f"{certs}: in order")


def server_answers(server: str, certs: Path | None) -> list[Finding]:
    """Whether the server at HOST:PORT can be reached and trusted; without `certs`, reached alone."""
    fine, faults = check_connection(server, None if certs is None else certs / "ca.crt")
    return _findings("server", faults, fine)


def base_of_config(config: Path) -> list[Finding]:
    """The base that a config names."""
    from fedamole.config import build, read_tables
    from fedamole.model.base import BaseSettings

    settings: BaseSettings = build(BaseSettings, read_tables(config).get("base", {}), "base")
    return base_is_there(settings.model, config.parent)


def base_is_there(base: str, folder: Path) -> list[Finding]:
    """Whether a base lies in its folder or the hub's cache, or can be downloaded; `folder`: where paths start."""
    from fedamole.model.base import locate

    place = locate(base, folder)
    return [_folder_base(base, Path(place)) if Path(place).is_dir() else _hub_base(place)]


def _folder_base(base: str, folder: Path) -> Finding:
    """Config and weights; only safetensors are ever read."""
    if not (folder / "config.json").is_file():
        return Finding("base", "problem", f"{base}: {folder} has no config.json", "name the folder that has the model")
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
            return Finding("base", "ok", f"{base}: on the hub; it will be downloaded at the first start")
    except HFValidationError:
        return Finding("base", "problem", f"{base!r} is neither a folder nor a hub id", "correct base.model")
    except RepositoryNotFoundError:  # also for a model whose licence was not accepted
        remedy = "correct the id, or accept the model's licence on the hub and log in with `hf auth login`"
        return Finding("base", "problem", f"{base}: the hub does not have it, or not for you", remedy)
    except Exception as error:  # whatever network libraries raise: this machine may well be offline for good
        return _uncached(base, f"and the hub cannot be reached ({type(error).__name__})")
    return _uncached(base, "and HF_HUB_OFFLINE forbids a download")


def _uncached(base: str, why: str) -> Finding:
    remedy = f"where there is a network: `hf download {base}`, then copy the folder here and name it as the base"
    return Finding("base", "warning", f"{base}: not in this machine's cache, {why}", remedy)


def data_fit(
    path: Path, template: str = "auto", columns: Mapping[str, str] | None = None, config: Path | None = None
) -> list[Finding]:
    """Columns and rows of a data file, the template that fits, and how many rows give an example.

    A template that is neither built in nor in the coordinator's `config` is a problem; without a config it is said to
    be the coordinator's, and not checked.
    """
    from fedamole.data.settings import SourceSettings
    from fedamole.data.sources import FORMATS, read_source
    from fedamole.data.templates import BUILT_IN, choose

    if not path.is_file():
        return [Finding("data", "problem", f"there is no file {path}", "correct the path")]
    if not path.name.endswith(FORMATS):
        text = f"{path.name}: the file's kind is not known"
        return [Finding("data", "problem", text, f"store it as one of {', '.join(FORMATS)}")]
    if path.stat().st_size == 0:
        return [Finding("data", "problem", f"{path.name}: the file is empty", "put one row on each line")]
    try:
        source = SourceSettings(name="data", path=str(path.resolve()), template=template, columns=dict(columns or {}))
        table, _ = read_source(source, path.parent)
    except Exception as error:  # its text may quote a row
        return [_unreadable(path, error)]
    facts = f"{path.name}: {len(table.rows)} rows with the columns {', '.join(table.columns)}"
    own = {} if config is None else templates_of(config)
    if config is None and template not in ("auto", *BUILT_IN):
        text = f"template {template!r} is not built in, so it has to come from the coordinator; it was not checked"
        remedy = "give the coordinator's config by --config to check it" + _guess(template, BUILT_IN)
        return [Finding("data", "ok", facts), Finding("data", "warning", text, remedy)]
    try:
        chosen = choose(template, own, table.columns, path.name)
    except (ConfigError, DataError) as error:
        return [Finding("data", "ok", facts), Finding("data", "problem", str(error))]
    known = {**BUILT_IN, **own}
    name = template
    if template == "auto":
        name = next((name for name, one in known.items() if one == chosen), "classification")
    return [Finding("data", "ok", f"{facts}; template {name!r} would be chosen"), *_rows_fit(table, chosen)]


def templates_of(config: Path) -> "dict[str, TemplateSettings]":
    """The [data.templates] of a coordinator's config; ConfigError where they cannot be used."""
    from fedamole.config import build, read_tables
    from fedamole.data.settings import DataSettings

    data = read_tables(config).get("data", {})
    templates = data.get("templates", {}) if isinstance(data, dict) else {}
    settings: DataSettings = build(DataSettings, {"templates": templates}, "data")
    return settings.templates


def _guess(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; or did you mean {near[0]!r}?" if near else ""


def _rows_fit(table: "Table", template: "TemplateSettings") -> list[Finding]:
    """How many rows give an example; a row that does not is told by its number alone."""
    from fedamole.data.templates import options_of, render

    try:
        options = options_of(template, table.rows, table.where)
    except DataError:
        text = f"{table.where}: column {template.options_from!r} has fewer than two values to choose from"
        remedy = (
            "give the file rows of every answer, or have the coordinator list all answers as options of a template "
            "under [data.templates], and name it by --template"
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
        text = f"{len(broken)} of {len(table.rows)} rows do not fit the template, the first is {first}"
        return [Finding("data", "problem", text, "mend or remove them: an empty column, or a label that is not known")]
    if usable == 0:
        return [Finding("data", "problem", f"{table.where}: no row has an answer", "fill in the column of the answer")]
    return [Finding("data", "ok", f"{usable} of {len(table.rows)} rows have an answer")]


def _unreadable(path: Path, error: Exception) -> Finding:
    """A file that cannot be read: the kind of error and the row, without the text, which may quote it."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    row = re.match(r"source 'data', .*?, ((?:row|line) \d+):", str(error))
    where = f"{path.name}, {row[1]}" if row else path.name
    remedy = f"mend the file; its kind is told by its ending, every row must be a whole record ({type(cause).__name__})"
    return Finding("data", "problem", f"{where}: cannot be read as rows", remedy)
