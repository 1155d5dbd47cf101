"""What the examples' scripts and texts say can be done, word by word, with the real command line."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from fedamole.cli import app
from fedamole.config import load_config
from fedamole.data.manifest import load_federation
from fedamole.data.settings import DataSettings, SourceSettings

ROOT = Path(__file__).parents[1]
HOSPITALS = ROOT / "examples" / "three_hospitals"
SCRIPT = HOSPITALS / "run.sh"
NAMES = ("cancer_centre", "eye_hospital", "genetics_clinic")
COLUMNS = {"genetics_clinic": {"instruction": "question", "response": "answer"}}


def test_every_example_is_found() -> None:
    assert [path.name for path in (ROOT / "examples").iterdir()] == ["three_hospitals"]


def test_the_config_names_the_hospitals_of_the_script() -> None:
    config = load_config(HOSPITALS / "config.toml")
    assert config.deployment.clients == NAMES
    assert 'hospitals="' + " ".join(NAMES) + '"' in SCRIPT.read_text()
    config.method.check(len(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_a_hospitals_rows_become_examples(name: str) -> None:
    path = HOSPITALS / "data" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert 60 <= len(rows) <= 100
    assert len({next(iter(row.values())) for row in rows}) == len(rows), "no question comes twice"
    source = SourceSettings(name, path=str(path), columns=COLUMNS.get(name, {}))
    (shard,) = load_federation(DataSettings(source=(source,)), ROOT).shards
    assert shard.client == name


COMMAND = re.compile(
    r'(?:^|[ `(])(?:"\$fedamole"|fedamole) ((?:server|client|certs|doctor|show|plan) [^`)>#]*)'
)


def commands(text: str) -> Iterator[list[str]]:
    """The `fedamole` commands of a text, with shell variables left as they are."""
    for line in text.replace("\\\n", " ").splitlines():
        found = COMMAND.search(line)
        if found and not line.lstrip().startswith("#"):
            yield shlex.split(found[1])


def parsed(words: list[str]) -> None:
    """Have the real command line read the words; it raises what a user would be told."""
    command = typer.main.get_command(app)
    own = command.commands[words[0]]  # type: ignore[attr-defined]
    words = [word for word in words[1:] if word != "$columns"]
    numbers = [word.replace("$port", "9092") for word in words]
    own.make_context(words[0] if words else "", numbers).close()


@pytest.mark.parametrize(
    ("path", "least"), [(SCRIPT, 3), (HOSPITALS / "README.md", 7), (ROOT / "docs" / "deploy.md", 8)],
    ids=["script", "README", "deploy"],
)
def test_every_command_is_one_of_the_real_command_line(path: Path, least: int) -> None:
    text = path.read_text()
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    found = list(commands(text))
    assert len(found) >= least, found
    for words in found:
        parsed(words)


def test_a_wrong_option_would_be_seen() -> None:
    with pytest.raises(Exception, match="No such option"):
        parsed(["client", "--no-such-thing"])


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_the_script_is_one() -> None:
    assert SCRIPT.stat().st_mode & 0o100, "it can be started"
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
