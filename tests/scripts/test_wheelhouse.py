"""The offline install, with the real pip and no index: a wheelhouse with hashes, and a wheel that was changed."""

import base64
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "make_wheelhouse.sh"
SOURCES = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "src")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")


def make_wheel(folder: Path, name: str, version: str, files: dict[str, bytes], metadata: str = "") -> Path:
    """A wheel of pure Python with these files."""
    info = f"{name}-{version}.dist-info"
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    return packed(
        folder / f"{name}-{version}-py3-none-any.whl",
        info,
        {
            **files,
            f"{info}/METADATA": about.encode(),
            f"{info}/WHEEL": wheel.encode(),
        },
    )


def packed(path: Path, info: str, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    record = ""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(content)}\n"
            archive.writestr(name, content)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return path


def repacked(folder: Path, installed: Distribution) -> Path:
    """A wheel of a package that is installed here, as it was before its installation."""
    files: dict[str, bytes] = {}
    for file in installed.files or ():
        name = str(file)
        made_by_pip = name.endswith(("INSTALLER", "REQUESTED", "direct_url.json", "RECORD"))
        if not (name.startswith("..") or "__pycache__" in name or made_by_pip):
            files[name] = Path(str(file.locate())).read_bytes()
    wheel = next(name for name in files if name.endswith(".dist-info/WHEEL"))
    tags = [line[5:].split("-") for line in files[wheel].decode().splitlines() if line.startswith("Tag: ")]
    tag = "-".join(".".join(dict.fromkeys(part)) for part in zip(*tags, strict=True))
    name = canonicalize_name(installed.name).replace("-", "_")
    return packed(folder / f"{name}-{installed.version}-{tag}.whl", wheel.removesuffix("/WHEEL"), files)


def without_network(links: Path | None = None) -> dict[str, str]:
    """An environment in which pip knows no index, no configuration of this machine and no cache.

    Packages are built with the setuptools that is installed here (pip reads "0" as: no isolation), as a new environment
    for each build takes seconds.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") and name != "PYTHONPATH"}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_NO_CACHE_DIR": "1", "PYTHON": sys.executable}
    env["PIP_NO_BUILD_ISOLATION"] = "0"
    return env | ({} if links is None else {"PIP_FIND_LINKS": str(links)})


def environment(folder: Path) -> Path:
    """The Python of a new, empty environment."""
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


def install(python: Path, wheelhouse: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = [
        "--no-index",
        "--find-links",
        str(wheelhouse),
        "--require-hashes",
        "-r",
        str(wheelhouse / "requirements.txt"),
    ]
    return subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-compile", *arguments, *more],
        capture_output=True,
        text=True,
        env=without_network(),
    )


def asked(python: Path, code: str) -> str:
    done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, cwd=python.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an index would have: small wheels in several versions."""
    folder = tmp_path_factory.mktemp("links")
    for name, version in (("torch", "2.0"), ("torch", "2.1"), ("tiny", "1.0"), ("tiny", "2.0"), ("extra", "3.0")):
        make_wheel(folder, name, version, {f"{name}.py": f"version = {version!r}\n".encode()})
    return folder


@pytest.fixture(scope="module")
def wheelhouse(links: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheelhouse that the script has made of a small repository of the same layout."""
    root = tmp_path_factory.mktemp("repository")
    (root / "scripts").mkdir()
    shutil.copy(SCRIPT, root / "scripts")
    (root / "src" / "small").mkdir(parents=True)
    (root / "src" / "small" / "__init__.py").write_text("import tiny, torch, extra\n")
    (root / "README.md").touch()
    (root / "LICENSE").touch()
    (root / "constraints.txt").write_text("torch==2.0\ntiny==1.0\n")
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "small"\nversion = "0.1"\ndependencies = ["tiny", "torch"]\n'
        '[project.optional-dependencies]\nflower = ["extra"]\n[tool.setuptools.packages.find]\nwhere = ["src"]\n'
    )
    before = sorted(path for path in root.rglob("*"))
    done = subprocess.run(
        [str(root / "scripts" / SCRIPT.name), "house"],
        cwd=root,
        capture_output=True,
        text=True,
        env=without_network(links),
    )
    assert done.returncode == 0, done.stderr
    assert "5 wheels" not in done.stdout
    assert "4 wheels in house" in done.stdout
    assert sorted(path for path in root.rglob("*") if "house" not in path.parts) == before  # nothing beside the source
    return root / "house"


def test_the_list_has_every_wheel_in_the_tested_version_with_its_hash(wheelhouse: Path) -> None:
    lines = (wheelhouse / "requirements.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["extra==3.0", "small==0.1", "tiny==1.0", "torch==2.0"]
    for line in lines:
        name, digest = line.split(" --hash=sha256:")
        wheel = next(wheelhouse.glob(f"{name.replace('==', '-')}-*.whl"))
        assert digest == hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_it_is_installed_without_an_index(wheelhouse: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    done = install(python, wheelhouse)
    assert done.returncode == 0, done.stderr
    assert asked(python, "import small; print(small.torch.version, small.tiny.version)") == "2.0 1.0"


def test_a_changed_wheel_is_refused(wheelhouse: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(wheelhouse, tmp_path / "house")
    make_wheel(copy, "tiny", "1.0", {"tiny.py": b"version = 'evil'\n"})
    python = environment(tmp_path / "env")
    done = install(python, copy)
    assert done.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr
    assert asked(python, "import importlib.util; print(importlib.util.find_spec('tiny'))") == "None"


def test_a_wheel_that_is_not_in_the_list_is_refused(wheelhouse: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(wheelhouse, tmp_path / "house")
    listed = copy / "requirements.txt"
    listed.write_text("".join(line for line in listed.read_text().splitlines(True) if not line.startswith("tiny")))
    done = install(environment(tmp_path / "env"), copy)
    assert done.returncode != 0
    assert "tiny" in done.stderr


def test_an_old_folder_is_not_used_again(tmp_path: Path) -> None:
    (tmp_path / "house").mkdir()
    done = subprocess.run([str(SCRIPT), "house"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, "exists already" in done.stderr) == (2, True)
    assert subprocess.run([str(SCRIPT)], capture_output=True).returncode == 2


def own_wheel(folder: Path, links: Path) -> Path:
    """This project's wheel, built from a copy of its source without a network."""
    copy = folder / "copy"
    copy.mkdir()
    for name in SOURCES:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder / "house"), str(copy)],
        capture_output=True,
        text=True,
        env=without_network(links),
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "house").glob("fedamole-*.whl")
    return wheel


def listed(house: Path) -> None:
    """Write the list of a wheelhouse by the program inside the script."""
    program = SCRIPT.read_text().split("<<'PYTHON'\n")[1].split("\nPYTHON\n")[0]
    subprocess.run([sys.executable, "-", str(house)], input=program, text=True, check=True)


def test_this_projects_wheel_has_all_that_it_needs(links: Path, tmp_path: Path) -> None:
    wheel = own_wheel(tmp_path, links)
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    expected = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "fedamole").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= inside
    assert not [name for name in inside if name.startswith("tests") or "__pycache__" in name]
    repacked(tmp_path / "house", distribution("wrapt"))
    listed(tmp_path / "house")
    python = environment(tmp_path / "env")
    done = install(python, tmp_path / "house", "--no-deps")
    assert done.returncode == 0, done.stderr
    assert asked(python, "import fedamole; print(fedamole.__version__)") == distribution("fedamole").version


@pytest.mark.faults
def test_the_whole_package_without_a_network(links: Path, tmp_path: Path) -> None:
    """Full size: this package, torch and all others as wheels, of what is installed here; then the demo's plan."""
    own_wheel(tmp_path, links)
    for name in sorted(needed("fedamole", {"flower"}) - {"fedamole"}):
        repacked(tmp_path / "house", distribution(name))
    listed(tmp_path / "house")
    python = environment(tmp_path / "env")
    done = install(python, tmp_path / "house")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "house")
    env = {**without_network(), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    output = subprocess.run(
        [str(python.with_name("fedamole")), "plan", "--json"], cwd=tmp_path, capture_output=True, text=True, env=env
    )
    assert output.returncode == 0, output.stderr
    assert '"clients"' in output.stdout
    assert str(python.parent.parent) in asked(python, "import torch; print(torch.__file__)")


def needed(name: str, extras: set[str]) -> set[str]:
    """The packages that one needs, with those that they need, of what is installed here."""
    result: set[str] = set()
    waiting = [(name, frozenset(extras))]
    seen = set()
    while waiting:
        name, more = waiting.pop()
        if (name, more) in seen:
            continue
        seen.add((name, more))
        result.add(name)
        for text in distribution(name).requires or ():
            need = Requirement(text)
            markers = [{**default_environment(), "extra": extra} for extra in ("", *more)]
            if need.marker is None or any(need.marker.evaluate(dict[str, Any](each)) for each in markers):
                waiting.append((canonicalize_name(need.name), frozenset(need.extras)))
    return result
