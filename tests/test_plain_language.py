"""Plain language: phrases and names that were replaced by standard terms do not come back."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "scripts").glob("*.py")])
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])
"""Decisions are history and keep their words."""

PHRASES = (
    "what makes the lower value",
    "nats that a token tells",
    "places of what can share",
    "what a row has reached so far",
    "told, when a run goes on",
    "the sooner after work, the shorter",
    "whoever has done it, or is at it",
    "nobody runs on unseen",
    "its own words are above",
    "has a life after training",
    "so that skewed data fool nobody",
    "exactly as it stands",
    "p over the clients",
)
NAMES = (
    "Watcher",
    "Seat",
    "Teller",
    "Story",
    "Sight",
    "Offer",
    "Wanted",
    "Growing",
    "Running",
    "Tape",
    "Shares",
    "Told",
    "Sheet",
    "Cell",
    "Guest",
    "Door",
    "Fit",
    "Trained",
    "boxed",
    "unboxed",
    "first_keep",
    "base_of",
    "as_it_is",
    "asked_for",
)
VARIABLES = frozenset(("found", "told", "said", "wanted", "whole", "gone", "torn", "struck", "place", "one"))
"""Names of variables that say nothing of what they hold."""
CHECKED_VARIABLES = sorted(
    [
        *(path for folder in ("tests", "benchmarks", "scripts") for path in (ROOT / folder).rglob("*.py")),
        *(ROOT / "src" / "fedamole" / "evaluation").glob("*.py"),
        ROOT / "src" / "fedamole" / "model" / "base.py",
    ]
)


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_replaced_phrases_do_not_come_back(path: Path) -> None:
    text = re.sub(r"\s+", " ", path.read_text(encoding="utf-8")).lower()
    assert not [phrase for phrase in PHRASES if phrase in text]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_replaced_names_do_not_come_back(path: Path) -> None:
    result = set(re.findall(r"\b(?:class|def) (\w+)", path.read_text(encoding="utf-8"))) & set(NAMES)
    assert not result, f"the glossary (docs/glossary.md) has another term for {', '.join(sorted(result))}"


def variables(source: str) -> Iterator[str]:
    """Names of the variables and parameters that a source assigns; attributes and functions are not among them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


@pytest.mark.parametrize("path", CHECKED_VARIABLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_variables_say_what_they_hold(path: Path) -> None:
    vague = VARIABLES & set(variables(path.read_text(encoding="utf-8")))
    assert not vague, f"name them by what they hold (result, expected, message, path, index): {sorted(vague)}"


def test_a_vague_variable_would_be_seen() -> None:
    source = "def f(told, *words):\n    for one in words:\n        found = told.found(place=one)\n"
    assert VARIABLES & set(variables(source)) == {"told", "one", "found"}
