"""The reference page lists every key of every config table, as the settings classes define them."""

import dataclasses
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import typer

from fedamole.cli.main import app
from fedamole.config import SECTIONS
from fedamole.data.settings import DataSettings, PartitionSettings, SourceSettings
from fedamole.data.templates import TemplateSettings
from fedamole.methods import METHODS

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import make_cli_reference
import make_reference

PAGE = make_reference.PAGE.read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text of the page below a heading, up to the next one."""
    return PAGE.partition(f"### {title}\n")[2].partition("\n#")[0]


def test_page_is_up_to_date() -> None:
    assert make_reference.with_tables(PAGE) == PAGE, "run python scripts/make_reference.py"


@pytest.mark.parametrize("table", [name for name in SECTIONS if name != "method"])
def test_every_key_of_a_config_table_has_a_line(table: str) -> None:
    fields = dataclasses.fields(SECTIONS[table])
    assert fields
    for field in fields:
        assert f"\n| `{field.name}` | " in section(f"`[{table}]`"), f"{table}.{field.name}"


def test_every_key_of_a_source_a_partition_and_a_template_has_a_line() -> None:
    titles = {
        "`[[data.source]]`": SourceSettings,
        "`[data.source.partition]`": PartitionSettings,
        "`[data.templates.NAME]`": TemplateSettings,
    }
    for title, settings in titles.items():
        for field in dataclasses.fields(settings):
            assert f"\n| `{field.name}` | " in section(title), f"{title} {field.name}"
    assert sum(len(dataclasses.fields(settings)) for settings in (DataSettings, SourceSettings)) >= 24


@pytest.mark.parametrize("method", [name for name in METHODS if not name.endswith("_ft")])
def test_every_key_of_a_method_has_a_line(method: str) -> None:
    lines = [line.split(" | ") for line in section("`[method]`").splitlines() if line.startswith("| `")]
    documented = {
        cells[0].removeprefix("| ")
        for cells in lines
        if (f"`{method}`" in cells[3]) != cells[3].startswith("all except ") and cells[3] != "all"
    }
    assert documented == {f"`{field.name}`" for field in dataclasses.fields(METHODS[method])}


def test_lines_give_type_default_and_meaning() -> None:
    @dataclasses.dataclass(frozen=True)
    class Undocumented:
        key: int = 1

    assert "| `alpha` | number | unset | Concentration of the" in section("`[data.source.partition]`")
    assert "| `name` | string | required | Name of the source" in section("`[[data.source]]`")
    assert '`"whole"`, `"iid"`, `"dirichlet"`' in section("`[data.source.partition]`")
    with pytest.raises(ValueError, match=r"Undocumented\.key has no docstring"):
        make_reference.keys_of(Undocumented)


def test_tables_are_well_formed() -> None:
    for line in PAGE.splitlines():
        if line.startswith("| "):
            cells = re.split(r"(?<!\\)\|", line)
            assert len(cells) in (5, 6, 7), line
            assert all(cell.strip() for cell in cells[1:-1]), line


@pytest.mark.parametrize("name", re.findall(r"(?m)^::: (\S+)$", PAGE))
def test_names_of_the_python_interface_exist(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert name == "fedamole.errors" or hasattr(import_module(module), attribute)


CLI = make_cli_reference.PAGE.read_text(encoding="utf-8")


def test_page_of_the_command_line_is_up_to_date() -> None:
    assert make_cli_reference.page() == CLI, "run python scripts/make_cli_reference.py"


def test_every_command_and_option_is_on_its_page() -> None:
    command = typer.main.get_command(app)
    assert len(command.commands) > 20  # type: ignore[attr-defined]
    for name, each in command.commands.items():  # type: ignore[attr-defined]
        part = CLI.partition(f"## fedamole {name}\n")[2].partition("\n## ")[0]
        assert part, name
        for parameter in each.params:
            if parameter.name not in ("help", "version") and not getattr(parameter, "hidden", False):
                argument = (parameter.metavar or parameter.name).upper()
                flag = parameter.opts[0] if parameter.param_type_name == "option" else argument
                assert flag in part, f"{name} {flag}"
    assert "| `--port` | integer, 0 to 65535 | `8000` | Port to listen on; 0 picks a free port. |" in CLI
