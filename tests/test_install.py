"""Nobody is told to install this package by its name from an index, where it was never published."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedamole.errors import FedamoleError, how_to_install

ROOT = Path(__file__).parents[1]
BY_NAME = re.compile(
    r"""\b(?:pip3?|uv|pipx|poetry|pdm|conda|mamba)\b[^\n#;&|]*?\b(?:install|add)\b[^\n#;&|]*?[\s"'`(]fedamole(?![\w/-])"""
)
"""A command that installs `fedamole`; a path that holds the word, as of a wheel, does not count."""
KINDS = {".py", ".md", ".toml", ".sh", ".txt", ".html", ".js", ".service", ".env", ".yaml", ".yml", ""}
PLACES = (
    "src",
    "docs",
    "deploy",
    "examples",
    "scripts",
    "benchmarks",
    "experiments",
    "README.md",
    "Makefile",
    "mkdocs.yml",
)
FILES = sorted(
    path
    for name in PLACES
    for path in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))
    if path.is_file()
    and path.suffix in KINDS
    and not {"__pycache__", "bundled"} & set(path.parts)
    and ".egg-info" not in str(path)
)


def told_by_name(text: str) -> list[str]:
    return BY_NAME.findall(text.replace("\\\n", " "))


def test_no_text_says_to_install_this_package_by_its_name() -> None:
    assert len(FILES) > 200
    results = {str(path.relative_to(ROOT)): commands for path in FILES if (commands := told_by_name(path.read_text()))}
    assert not results


@pytest.mark.parametrize(
    "text",
    [
        "pip install fedamole",
        'pip install "fedamole[flower]"',
        "python -m pip install -U 'fedamole'",
        "uv add fedamole",
        "uv pip install fedamole==0.1.0",
        "`pip install fedamole[serve]`",
        "pip3 install \\\n  fedamole",
        "pipx install fedamole",
        'pip install torch "fedamole>=0.1"',
    ],
)
def test_what_would_be_found(text: str) -> None:
    assert told_by_name(text)


@pytest.mark.parametrize(
    "text",
    [
        'pip install -e ".[flower]"',
        'pip install "./fedamole-0.1.0-py3-none-any.whl[flower]"',
        "pip install torch; fedamole run",
        "pip install -r wheelhouse/requirements.txt",
        "/opt/fedamole/bin/pip install x",
        'pip install "PATH-TO-WHEEL[serve]"',
        "pip install -e . && fedamole doctor",
        "pip install mkdocs  # fedamole's site",
    ],
)
def test_what_would_not(text: str) -> None:
    assert not told_by_name(text)


def test_a_missing_extra_is_named_with_both_ways_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedamole.deployment.requirements import require_flower

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FedamoleError) as caught:
        require_flower()
    assert str(caught.value) == (
        'this command needs flwr, which is not installed; in the clone: pip install -e ".[flower]"; '
        'from a wheel: pip install "PATH-TO-WHEEL[flower]"'
    )
    from fedamole.cli.main import app

    output = CliRunner().invoke(app, ["serve", "runs/x"]).exception
    assert isinstance(output, FedamoleError)
    assert how_to_install("serve") in str(output)


def test_the_extras_of_the_page_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "docs" / "install.md").read_text()
    assert set(re.findall(r"(?m)^\| `(\w+)` \|", text)) == set(project["optional-dependencies"])
    assert f"fedamole-{project['version']}-py3-none-any.whl" in text
