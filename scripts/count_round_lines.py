"""Count the lines of all functions of this package that one training round enters: how much code a reader follows.

    python scripts/count_round_lines.py [METHOD ...]

Each method runs two rounds of the bundled demo in this process, and the second round is traced. A function counts once,
with its decorators, its docstring and the functions inside it. The column "code" counts statements: one line each,
without docstrings and comments.
"""

import argparse
import ast
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import fedamole
from fedamole.config import load_config
from fedamole.experiment import start
from fedamole.federation.loop import Loop
from fedamole.federation.progress import ProgressListener

SOURCE = Path(fedamole.__file__).parent
DEMO = SOURCE / "bundled" / "demo.toml"


@dataclasses.dataclass(frozen=True)
class Count:
    """Lines and files of the functions that a round enters."""

    lines: int
    code: int
    """Lines with one statement each and without docstrings: a measure that the formatter does not change."""
    files: int


def entered_in_second_round(method: str, folder: Path, config: Path = DEMO) -> set[CodeType]:
    """Run two rounds of `method` in `folder`; return the code objects of this package that the second one enters."""
    entered: set[CodeType] = set()
    whole_round = Loop._round

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(SOURCE)):
            entered.add(frame.f_code)

    def traced_round(self: Loop, round_: int, state: Any) -> Any:
        if round_ != 1:
            return whole_round(self, round_, state)
        sys.setprofile(trace)
        try:
            return whole_round(self, round_, state)
        finally:
            sys.setprofile(None)

    overrides = [f"method.name={method}", "federation.rounds=2", "run.threads=1", "run.device=cpu"]
    Loop._round = traced_round  # type: ignore[method-assign]
    try:
        start(load_config(config, overrides), folder, ProgressListener())
    finally:
        Loop._round = whole_round  # type: ignore[method-assign]
    return entered


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Yield the outermost functions of a file."""

    def visit(node: ast.AST) -> Iterator[ast.FunctionDef]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield child
            else:
                yield from visit(child)

    yield from visit(tree)


def statements(function: ast.FunctionDef) -> int:
    """Count the lines of a function with one statement per line, however long, and without docstrings."""
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return len(ast.unparse(function).splitlines())


def count(entered: set[CodeType], without: str | None = None) -> Count:
    """Count the lines of the functions that these code objects belong to, leaving out one package if it is named."""
    by_file: dict[Path, set[int]] = {}
    for entry in entered:
        path = Path(entry.co_filename)
        if without is None or path.relative_to(SOURCE).parts[0] != without:
            by_file.setdefault(path, set()).add(entry.co_firstlineno)
    lines = code = files = 0
    for path, first_lines in by_file.items():
        total = 0
        for function in functions_of(ast.parse(path.read_text(encoding="utf-8"))):
            first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
            last = function.end_lineno or first
            if any(first <= line <= last for line in first_lines):
                total += last - first + 1
                code += statements(function)
        lines += total
        files += bool(total)
    return Count(lines, code, files)


def main() -> None:
    """Print the counts as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", default=["fedit", "fedamole"])
    parser.add_argument("--list", action="store_true", help="also print every file with its lines")
    options = parser.parse_args()
    print("method      all: lines   code  files   without model/: lines   code  files")
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            entered = entered_in_second_round(method, Path(folder) / "run")
        total, rest = count(entered), count(entered, without="model")
        counts = f"{total.lines:>11} {total.code:>6} {total.files:>6} {rest.lines:>23} {rest.code:>6} {rest.files:>6}"
        print(f"{method:<10} {counts}")
        if options.list:
            for path in sorted({Path(code.co_filename) for code in entered}):
                own = count({code for code in entered if Path(code.co_filename) == path})
                print(f"    {path.relative_to(SOURCE)!s:<40} {own.lines:>5}")


if __name__ == "__main__":
    main()
