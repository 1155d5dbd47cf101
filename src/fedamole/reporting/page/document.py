"""The report as an HTML file that contains its data, style and script and loads nothing else."""

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
from fedamole.reporting.page.tables import tables_as_html

MARK = 'content="fedamole report"'
"""Text by which an existing report is recognised."""


def page(content: Mapping[str, Any], reload_seconds: int = 0) -> str:
    """Return the page as HTML.

    The data are embedded as JSON without any `<`, and the script writes them into text nodes only. A content security
    policy allows just the page's own script and style, by their hashes, and no connection. For browsers without
    JavaScript, the page also has its texts and tables as HTML.

    Args:
        content: The content of the report (see `content.content`).
        reload_seconds: Seconds between two reloads of a live page; 0: it does not reload.
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
        "tables": tables_as_html(content),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _part("page.html"))


def write_page(path: Path, content: Mapping[str, Any], reload_seconds: int = 0) -> None:
    """Write the page; replaces an older report, but no other file (RunError)."""
    check_output(path)
    write_atomic(path, page(content, reload_seconds))


def check_output(path: Path) -> None:
    """Raise RunError if the path is a folder or an existing file that is not a report."""
    if path.is_dir():
        raise RunError(f"{path} is a folder: name a file, for example --out {path / 'report.html'}")
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise RunError(f"{path} exists and is not a report, so it is not overwritten: choose another name by --out")


def _part(name: str) -> str:
    return (files("fedamole.reporting.page") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
