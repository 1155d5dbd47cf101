"""The layout of the house, kept by reading its source."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "fedamole"
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = {path: str(path.relative_to(SOURCE)) for path in FILES}
each_file = pytest.mark.parametrize("path", FILES, ids=NAMES.get)

FLOOR = {
    "errors": -1,
    "terminal": 0,
    "files": 0,
    "received": 0,
    "runs": 1,
    "model": 2,
    "assignment": 2,
    "data": 2,
    "evaluation": 3,
    "merging": 3,
    "synthesis": 3,
    "federation": 4,
    "methods": 5,
    "engine": 6,
    "config": 6,
    "reporting": 6,
    "config_schema": 7,
    "planning": 7,
    "tracking": 7,
    "experiment": 8,
    "personal": 9,
    "auditing": 10,
    "comparison": 10,
    "serving": 10,
    "deployment": 11,
    "cli": 12,
    "api": 13,
    "__main__": 13,
}
"""A room may import from rooms on lower floors; the first three of floor 1 know nothing of each other."""


def imports(path: Path) -> list[tuple[str, bool]]:
    """Modules that a file imports, and whether only for type checking."""
    results: list[tuple[str, bool]] = []

    def visit(node: ast.AST, typing_only: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = typing_only or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test))
            if isinstance(child, ast.Import):
                results.extend((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative imports hide where they lead"
                results.append((child.module or "", inside))
                results.extend((f"{child.module}.{alias.name}", inside) for alias in child.names)
            visit(child, inside)

    visit(ast.parse(path.read_text()), False)
    return results


def room(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def test_the_source_is_found() -> None:
    assert len(FILES) > 30
    assert {room(name) for name in NAMES.values()} - {"__init__"} <= set(FLOOR), "give a new room its floor"


@each_file
def test_imports_point_one_way(path: Path) -> None:
    own = room(NAMES[path])
    if own == "__init__":
        return
    for module, typing_only in imports(path):
        parts = module.split(".")
        if parts[0] != "fedamole" or len(parts) < 2 or typing_only or parts[1] not in FLOOR or parts[1] == own:
            continue
        assert FLOOR[parts[1]] < FLOOR[own], f"{NAMES[path]} imports {module}, which stands above or beside it"


@each_file
def test_flower_is_met_in_one_place(path: Path) -> None:
    """flwr in deployment/flower/; flwr_datasets, the partitioners, is another package and belongs to data."""
    for module, _ in imports(path):
        if module.split(".")[0] == "flwr":
            assert NAMES[path].startswith("deployment/flower/"), NAMES[path]
        if module.split(".")[0] == "flwr_datasets":
            assert NAMES[path].startswith("data/"), NAMES[path]


@each_file
def test_files_are_short(path: Path) -> None:
    most = 250 if NAMES[path].startswith("methods/") else 400
    assert len(path.read_text().splitlines()) <= most


@each_file
def test_no_method_is_known_by_its_name(path: Path) -> None:
    """What tells methods apart is what they declare: no comparison with a name of one, outside the registry."""
    names = {"fedamole", "fedit", "fedit_ft", "local_only"}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            constants = {side.value for side in sides if isinstance(side, ast.Constant) and isinstance(side.value, str)}
            assert not constants & names, f"{NAMES[path]}:{node.lineno}: a comparison with {constants & names}"
            sources = {ast.unparse(side) for side in sides}
            assert not (constants and sources & {"method", "method_name", "self.method_name", "config.method_name"})
    assert not re.search(r"if method ==|isinstance\(.*(FedAmole|FedIT|LocalOnly)\b", path.read_text())


def calls(path: Path) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}


@each_file
def test_nothing_below_the_command_line_prints(path: Path) -> None:
    assert NAMES[path] == "cli/main.py" or "print" not in calls(path)


SPEAKERS = ("terminal.py",)


@each_file
def test_there_is_one_way_to_say_something(path: Path) -> None:
    """Consoles come from terminal.screen, lines from terminal.say: there, text from elsewhere is made harmless."""
    if NAMES[path] in SPEAKERS:
        return
    called = calls(path)
    assert not called & {"Console", "rich.console.Console", "rich.print", "typer.echo", "typer.secho", "click.echo"}
    assert not {
        name
        for name in called
        if name.endswith((".write", "print_json", "Text.from_markup", "Text.from_ansi"))
        and name.startswith(("sys.", "console.", "Text."))
    }
    assert not {module for module, _ in imports(path)} & {"rich.markup", "rich.print", "rich.console.Console"} - {
        module for module, typing_only in imports(path) if typing_only or module == "rich.console.Console"
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("markup", "False") == "False", f"{NAMES[path]}:{node.lineno}: markup"
            if ast.unparse(node.func) == "TextColumn":
                assert options.get("markup") == "False", f"{NAMES[path]}:{node.lineno}: its text is markup by default"


@each_file
def test_text_files_are_utf_8_in_every_locale(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func).split(".")[-1], {keyword.arg for keyword in node.keywords}
        where = f"{NAMES[path]}:{node.lineno}: without encoding"
        if name in ("read_text", "write_text"):
            own = isinstance(node.func, ast.Name)  # received.files.read_text, which is UTF-8 always
            assert own or "encoding" in options, where
        if name in ("open", "fdopen"):
            modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            if modes and re.fullmatch(r"[rwax+]+", modes[-1]):
                assert "encoding" in options, where


@each_file
def test_no_global_generator_and_no_pickle(path: Path) -> None:
    banned = {
        "torch.manual_seed",
        "torch.cuda.manual_seed",
        "torch.cuda.manual_seed_all",
        "np.random.seed",
        "numpy.random.seed",
        "random.seed",
        "torch.load",
        "torch.save",
        "set_seed",
        "transformers.set_seed",
    }
    assert not calls(path) & banned
    assert not {module.split(".")[0] for module, _ in imports(path)} & {"pickle", "cloudpickle", "dill", "random"}
    assert not re.search(r"trust_remote_code=True|weights_only=False", path.read_text())


def test_no_room_for_odds_and_ends() -> None:
    banned = re.compile(r"(utils?|common|helpers?|misc|manager|handler)s?\.py", re.IGNORECASE)
    assert not [name for name in NAMES.values() if banned.fullmatch(Path(name).name)]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert not node.name.endswith(("Manager", "Helper", "Utils")), f"{NAMES[path]}: {node.name}"
