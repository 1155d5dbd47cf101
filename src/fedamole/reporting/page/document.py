"""The page itself: one HTML file with its data, its style and its script inside, and nothing else."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedamole.errors import RunError
from fedamole.files import write_atomic
from fedamole.reporting.page.palette import as_css

MARK = 'content="fedamole report"'
"""What tells a report from other files of the same name."""


def page(content: Mapping[str, Any], reload_seconds: int = 0) -> str:
    """The page as text. A live one reloads itself every so many seconds.

    Data reach the page as JSON without any `<`, and the script puts them into text nodes alone; beyond that the page
    allows no script and no style but its own two, by their hashes, and no connection to anywhere.
    """
    style, script = as_css() + _part("page.css"), _part("draw.js") + _part("page.js")
    allowed = f"script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    text = json.dumps({**content, "live": reload_seconds}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    parts = {
        "policy": policy,
        "title": html.escape(content["title"]),
        "style": style,
        "script": script,
        "data": text,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _part("page.html"))


def write_page(path: Path, content: Mapping[str, Any], reload_seconds: int = 0) -> None:
    """Write the page, over an older report if there is one; any other file is left alone (RunError)."""
    check_place(path)
    write_atomic(path, page(content, reload_seconds))


def check_place(path: Path) -> None:
    """Raise RunError where a report cannot be written without harm."""
    if path.is_dir():
        raise RunError(f"{path} is a folder: name a file, for example --out {path / 'report.html'}")
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise RunError(f"{path} exists and is no report, so it is left alone: choose another name by --out")


def _part(name: str) -> str:
    return (files("fedamole.reporting.page") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
