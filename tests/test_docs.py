"""What the documents say can be done is done, or read by the real command line; what they point at is there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from fedamole.cli.main import app
from fedamole.config import load_config
from fedamole.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*/README.md")])
SCRIPT = ROOT / "examples" / "three_hospitals" / "run.sh"
QUICK = "<!-- quick -->\n```bash\n"
"""What stands above a block that is run, in the order of its page."""
COMMAND = typer.main.get_command(app)
each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def blocks(page: Path) -> list[str]:
    """The shell blocks of a page; those inside a list are indented."""
    return [re.sub(r"(?m)^ {2,}", "", block) for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command of a shell text, with its variables as they are; loops and assignments left out."""
    for line in text.replace("\\\n", " ").splitlines():
        for arguments in _split(shlex.shlex(line, posix=True, punctuation_chars=";|&<>()")):
            while arguments and (arguments[0] in ("do", "then", "exec", "!") or re.fullmatch(r"\w+=\S*", arguments[0])):
                arguments = arguments[1:]
            if arguments:
                yield arguments


def _split(lexer: shlex.shlex) -> Iterator[list[str]]:
    lexer.whitespace_split, lexer.commenters = True, "#"
    arguments: list[str] = []
    for argument in lexer:
        if set(argument) <= set(";|&<>()"):
            yield arguments
            arguments = []
        else:
            arguments.append(argument)
    yield arguments


def fedamole(text: str) -> list[list[str]]:
    """What a shell text says to `fedamole`."""
    called = ("fedamole", ".venv/bin/fedamole", "$fedamole")
    return [arguments[1:] for arguments in commands(text) if arguments[0] in called]


def parsed(arguments: list[str]) -> None:
    """Have the real command line read the words; it raises what a user would be told."""
    if arguments[0].startswith("-"):
        COMMAND.make_context("fedamole", arguments, resilient_parsing=True).close()
        return
    own = COMMAND.commands[arguments[0]]  # type: ignore[attr-defined]
    given = [argument.replace("$port", "9092") for argument in arguments[1:] if argument != "$columns"]
    if hasattr(own, "commands"):  # a group, such as `fedamole clients`
        own, given = own.commands[given[0]], given[1:]
    own.make_context(arguments[0], given).close()


@each_page
def test_every_command_is_one_of_the_real_command_line(page: Path) -> None:
    for block in blocks(page):
        for arguments in fedamole(block):
            try:
                parsed(arguments)
            except Exception as error:
                raise AssertionError(f"fedamole {shlex.join(arguments)}: {error}") from error


def test_the_scripts_commands_too() -> None:
    result = fedamole(SCRIPT.read_text())
    assert len(result) == 3
    for arguments in result:
        parsed(arguments)


def test_a_wrong_option_or_command_would_be_seen() -> None:
    assert fedamole("for s in 1 2; do X=1 .venv/bin/fedamole run a.toml seed=$s  # once\ndone | tee x") == [
        ["run", "a.toml", "seed=$s"]
    ]
    with pytest.raises(Exception, match="No such option"):
        parsed(["client", "--no-such-thing"])
    with pytest.raises(Exception, match="No such option"):
        parsed(["clients", "list", "--no-such-thing"])
    for arguments in (["begin"], ["clients", "begin"]):
        with pytest.raises(KeyError):
            parsed(arguments)


def test_every_command_is_in_some_document() -> None:
    by_hand = [page.read_text() for page in PAGES if page.name != "cli.md"]
    output = set(re.findall(r"fedamole ([a-z-]+)", " ".join(by_hand)))
    assert not set(COMMAND.commands) - output  # type: ignore[attr-defined]


@each_page
def test_the_programs_that_are_named_are_there(page: Path) -> None:
    for block in blocks(page):
        for arguments in commands(block):
            if re.fullmatch(r"(\S*/)?python3?", arguments[0]) and len(arguments) > 1 and arguments[1].endswith(".py"):
                assert (ROOT / arguments[1]).exists(), arguments[1]
            elif arguments[0] == "make":
                assert re.search(rf"(?m)^{arguments[1]}:", (ROOT / "Makefile").read_text()), arguments[1]
            elif arguments[0].startswith("examples/"):
                assert (ROOT / arguments[0]).exists(), arguments[0]


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            titles = re.findall(r"(?m)^#+ (.*)$", path.read_text())
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target


def test_the_readme_counts_and_lists_all_methods() -> None:
    text = (ROOT / "README.md").read_text()
    names = {name for name in METHODS if not name.endswith("_ft")}
    assert f"runs {len(names)} federated methods" in text
    table = text[text.index("## Methods") : text.index("## Documentation")]
    assert {name for name in names if f"`{name}`" not in table} == set()


def test_the_lines_of_a_round_stand_in_their_files() -> None:
    result = re.findall(r'```python title="(.*?)"\n(.*?)```', (ROOT / "docs" / "one-round.md").read_text(), re.DOTALL)
    assert len(result) >= 9
    for name, lines in result:
        source = {line.strip() for line in (ROOT / name).read_text().splitlines()}
        for line in lines.splitlines():
            assert line.strip() in source, f"{name}: {line}"


def test_quick_blocks_run_as_they_stand(tmp_path: Path) -> None:
    """In a folder with this Python's environment as .venv, and with docs/; the page's configs are written to files."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    ran = 0
    for page in PAGES:
        for kind, body in re.findall(r"(<!-- quick -->\n```bash|```toml)\n(.*?)```", page.read_text(), re.DOTALL):
            if kind == "```toml":
                name = re.match(r"# (\w+\.toml)\n", body)
                if name is not None and page.name in ("preferences.md", "start.md", "tutorial.md"):
                    (tmp_path / name[1]).write_text(body)
                continue
            done = subprocess.run(["bash", "-e"], input=body, cwd=tmp_path, env=env, text=True, capture_output=True)
            assert done.returncode == 0, f"{page.name}: {body}\n{done.stderr[-2000:]}"
            ran += 1
    assert ran >= 10


def lines_of_code_are_wrapped(page: Path) -> None:
    """Assert that no code of a page reaches beyond its box, so that comments are not cut off."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        return
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the dev extra has it)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for width in (400, 1280):
            opened = browser.new_page(viewport={"width": width, "height": 900})
            opened.goto(page.as_uri())
            boxes = "[...document.querySelectorAll('pre code')].map(code => code.scrollWidth - code.clientWidth)"
            excess = opened.evaluate(boxes)
            assert len(excess) > 5
            assert max(excess) <= 1
        browser.close()


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site is the extra `docs`")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert "load_personal_model" in page
    assert "reverse_selection" in page
    tutorial = (tmp_path / "site" / "tutorial" / "index.html").read_text()
    assert 'rel="prev"' in tutorial
    assert 'rel="next"' in tutorial
    assert "fedamole_peers" in (tmp_path / "site" / "changelog" / "index.html").read_text(), "CHANGELOG.md is included"
    lines_of_code_are_wrapped(tmp_path / "site" / "deploy" / "index.html")
    for path in (tmp_path / "site").rglob("*.html"):
        assert not re.search(r'(?:src|href)="https?://[^"]*\.(?:css|js|woff2?)"', path.read_text()), path


def test_the_config_of_the_readme_is_valid(tmp_path: Path) -> None:
    [text] = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "my.toml").write_text(text)
    config = load_config(tmp_path / "my.toml")
    assert [source.name for source in config.data.source] == ["north", "south"]
    config.method.check(2)


def test_the_citation_names_the_version_and_the_paper() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    cited = yaml.safe_load(text)
    assert {"cff-version", "message", "title", "authors"} <= set(cited), "the keys that the format requires"
    assert cited["version"] == version
    assert cited["preferred-citation"]["url"] == "https://arxiv.org/abs/2411.19128"
