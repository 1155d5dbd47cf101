"""The report shows the content of the run folders, and escapes everything in them."""

import base64
import fnmatch
import hashlib
import json
import re
import shutil
import threading
import time
import tomllib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tomli_w
from tests.deployment.direct import direct_deployment
from typer.testing import CliRunner

from fedamole.cli import main as cli
from fedamole.cli import report as commands
from fedamole.errors import RunError
from fedamole.reporting import figures
from fedamole.reporting.figures import draw_all
from fedamole.reporting.page import palette
from fedamole.reporting.page.content import content
from fedamole.reporting.page.document import page, write_page
from fedamole.reporting.page.reading import read_folders
from fedamole.reporting.page.words import TITLES, short_module_names
from fedamole.reporting.run_table import as_text, run_tables
from fedamole.reporting.runs import read_runs
from fedamole.reporting.significance import gain
from fedamole.reporting.work import short_count

SOURCE = Path(__file__).parents[2] / "src" / "fedamole"
CLIENTS = ["chat", "entail", "mood", "plain"]


def content_of(*paths: Path) -> dict[str, Any]:
    return content(read_folders(paths))


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """Copy a run's folder, to be changed by a test; `unfinished`: with its first two rounds only."""

    def copy(run: Path, unfinished: bool = False) -> Path:
        folder = Path(shutil.copytree(run, tmp_path / "copies" / run.name, ignore=shutil.ignore_patterns("clients")))
        if unfinished:
            (folder / "summary.json").unlink()
            for name in ("metrics.jsonl", "assignment.jsonl"):
                lines = (folder / name).read_text().splitlines(keepends=True)
                kept = [
                    line
                    for line in lines
                    if (record := json.loads(line))["round"] < 2 and record.get("split") != "test"
                ]
                (folder / name).write_text("".join(kept))
        return folder

    return copy


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_and_gains_are_those_of_the_tables(runs: Any) -> None:
    paths = [runs("fedamole"), runs("fedit")]
    result = content_of(*paths)
    [comparison] = run_tables(read_runs(paths))
    assert [result["test"]["head"], *result["test"]["body"]] == as_text(comparison)
    assert result["models"] == ["fedit", "fedamole"]
    ours, theirs = (column.clients for column in (comparison.columns[-1], comparison.columns[2]))
    differences = {(name, 0): ours[name][0] - theirs[name][0] for name in CLIENTS}
    [_, chosen] = result["gain"]
    assert [chosen["reference"], [column["other"] for column in chosen["columns"]]] == [
        "fedamole",
        ["base", "majority", "fedit"],
    ]
    column = chosen["columns"][-1]
    assert column["clients"] == {name: value for (name, _), value in differences.items()}
    expected = gain(differences, higher=True)
    assert [column[key] for key in ("mean", "low", "wins")] == [expected.mean, expected.low, expected.wins]


def test_seeds_of_a_method_are_one_column_and_pairs_by_seed(runs: Any) -> None:
    result = content_of(runs("fedit"), runs("fedit", "run.seed=1"), runs("local_only"))
    assert result["about"]["head"] == ["fedit", "local_only"]
    assert {(line["model"], line["seed"]) for line in result["learning"]["lines"]} == {(0, 0), (0, 1), (1, 0)}
    [against] = [pair for pair in result["gain"] if pair["reference"] == "fedit"]
    assert {column["other"]: column["pairs"] for column in against["columns"]} == {
        "base": 8,
        "majority": 8,
        "local_only": 4,
    }


def test_learning_curves_and_assignment_equal_the_run_files(runs: Any) -> None:
    path = runs("fedamole")
    result = content_of(path)
    for line in json_lines(path / "metrics.jsonl"):
        if line["split"] == "validation" and line["method"] == "fedamole":
            assert result["learning"]["lines"][0]["values"]["loss"][line["client"]][line["round"]] == line["loss"]
        if line["split"] == "validation" and line["method"] == "base":
            assert result["learning"]["before"][line["client"]] == line["loss"]
    [run] = result["experts"]
    lines = json_lines(path / "assignment.jsonl")
    modules = list(dict.fromkeys(line["module"] for line in lines))
    for line in lines:
        flat = run["held"][line["round"]][modules.index(line["module"])][result["clients"].index(line["client"])]
        assert flat[::2] == line["experts"]
        assert [value / 10_000 for value in flat[1::2]] == pytest.approx(line["relevance"], abs=1e-4)
    amounts = {name: counts for name, _, counts in result["data"]["lines"]}
    for client in json.loads((path / "manifest.json").read_text())["clients"]:
        assert amounts[client["client"]][0] == len(client["train"]["rows"])


def test_a_method_without_experts_has_no_section_on_them(runs: Any) -> None:
    result = content_of(runs("fedit"))
    assert "a run of local_only would show what sharing adds" in result["verdict"]
    assert "experts" not in result
    assert "routing" not in result
    assert "labels" not in result, "a simulation's folder tells amounts, but no labels"
    assert set(result) & set(TITLES) == {"about", "learning", "test", "gain", "data", "costs"}


def test_the_work_of_clients_is_among_the_costs(runs: Any, copy_of: Any) -> None:
    """As metrics.jsonl has it, a mean over the clients; a run of an earlier version has empty cells."""
    paper = runs("ditto", "training.budget=paper", "federation.rounds=1")
    lines = [json.loads(line) for line in (paper / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(line.get("backward_tokens", 0) for line in lines) / 4
    older = copy_of(runs("local_only"))
    counts = ("forward_tokens", "backward_tokens", "trained_parameters")
    kept = [json.loads(line) for line in (older / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key not in counts} for line in kept]
    (older / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    result = content_of(paper, older)
    costs = result["costs"]
    column = costs["columns"].index("tokens trained on, per client")
    (label, values, texts), (_, _, others) = costs["lines"]
    assert label == "ditto"
    assert values[column] == tokens > 0
    assert texts[column] == short_count(tokens)
    assert others[column] == ""
    assert "trained parameters per client" in costs["columns"]
    assert "as many as the method's paper takes" in str(dict(result["about"]["lines"])["Local training"])
    assert "no star with one seed" in result["test"]["caption"]


def test_an_unfinished_run_is_shown_up_to_its_last_round(runs: Any, copy_of: Any) -> None:
    result = content_of(copy_of(runs("fedamole"), unfinished=True), runs("fedit"))
    text = f"{runs('fedamole').name} is not finished: 2 of 3 rounds are done. It has no test scores and is not in the "
    assert result["states"] == [["Not finished", text + "verdict."]]
    assert result["unfinished"] == ["fedamole"]
    assert result["test"]["head"] == ["client", "base", "majority", "fedit"]
    assert result["experts"][0]["rounds"] == [0, 1]
    assert len(result["learning"]["lines"]) == 2
    assert dict(result["about"]["lines"])["Rounds done"] == ["all 3", "2 of 3"]
    alone = content_of(copy_of(runs("local_only"), unfinished=True))
    assert "test" not in alone
    assert "costs" in alone


def test_a_run_that_stopped_early_says_after_which_round(runs: Any, copy_of: Any) -> None:
    path = copy_of(runs("local_only"))
    summary = json.loads((path / "summary.json").read_text()) | {"stopped": {"rounds": 9, "patience": 2}}
    (path / "summary.json").write_text(json.dumps(summary))
    config = (path / "config.toml").read_text().replace("patience = 0", "patience = 2")
    (path / "config.toml").write_text(config.replace("rounds = 3", "rounds = 9"))
    about = dict(content_of(path)["about"]["lines"])
    assert about["Rounds done"] == ["stopped after 3 of 9 rounds: no improvement for 2 rounds"]
    assert "9 rounds, fewer if none of 2 in a row improved, all clients" in about["Federation"][0]


def test_the_folders_of_a_deployment(tiny: Path, tmp_path: Path) -> None:
    """A coordinator knows who holds what and what clients tell; a client knows itself."""
    created = direct_deployment(
        tiny / "config.toml", tmp_path, "federation.rounds=2", "method.rank=2", "training.local_steps=1"
    )
    created.run()
    server = created.server_folder
    (server / "config.toml").write_text(tomli_w.dumps(created.config.tables()))
    (server / "manifest.json").write_text(json.dumps({"clients": CLIENTS}))
    mood = {"examples": {"train": 30, "test": 4}, "labels": {"glad": 20, "sad": 10}}
    (server / "clients.json").write_text(json.dumps({"mood": mood, "chat": {"examples": {"train": 38}}}))
    result = content_of(server)
    assert result["clients"] == CLIENTS
    assert [expert["label"] for expert in result["experts"]] == ["fedamole, seed 0"]
    assert result["labels"] == {"labels": ["glad", "sad"], "lines": [["mood", [20, 10]]]}
    assert result["data"]["lines"] == [["chat", "", [38, 0]], ["mood", "", [30, 4]]]
    [own] = (tmp_path / "mood").glob("*/run.json")
    at_client = content_of(own.parent)
    assert at_client["clients"] == ["mood"]
    assert "experts" not in at_client
    assert {"learning", "test", "data", "costs"} <= set(at_client)
    page(result), page(at_client)


def test_failed_updates_and_values_that_are_not_finite(runs: Any, copy_of: Any) -> None:
    folder = copy_of(runs("fedit"), unfinished=True)
    lost = {"round": 1, "client": "mood", "split": "train", "failed": "diverged", "bytes_down": 1, "bytes_up": 0}
    bad = {"round": 1, "client": "mood", "split": "validation", "method": "fedit", "loss": float("nan")}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(lost) + "\n" + json.dumps(bad) + "\n")
    result = content_of(folder)
    assert result["failed"] == [["fedit", 1, "mood", "diverged"]]
    assert [mark for mark, _ in result["states"]] == ["Not finished", "Failed updates"]
    assert "left out 1 update of a client (mood); see Failed updates" in result["states"][1][1]
    assert result["learning"]["lines"][0]["values"]["loss"]["mood"][1] is None
    page(result)


def test_routing_is_shown_where_it_was_worked_out(runs: Any, copy_of: Any) -> None:
    folder = copy_of(runs("fedamole"))
    modules = {"model.layers.0.self_attn.q_proj": {"10": 0.25, "2": 0.75}, "model.layers.1.self_attn.q_proj": {"2": 1}}
    (folder / "routing.json").write_text(json.dumps({"clients": {"mood": modules}}))
    [result] = content_of(folder)["routing"]
    assert result["experts"] == ["2", "10"], "by number"
    assert result["modules"] == ["layer 0 q_proj", "layer 1 q_proj"]
    assert result["shares"][0] == {"mood": {"10": 0.25, "2": 0.75}}
    (folder / "routing.json").write_text('{"clients": ["mood"]}')
    with pytest.raises(RunError, match=r"routing\.json is damaged"):
        content_of(folder)


def test_names_of_modules_stay_apart() -> None:
    assert short_module_names(["a.layers.3.q_proj", "a.layers.3.o_proj"]) == ["layer 3 q_proj", "layer 3 o_proj"]
    assert short_module_names(["enc.0.q", "dec.0.q"]) == ["enc.0.q", "dec.0.q"]


class Reader(HTMLParser):
    """Collects the elements of a page, and the texts of its scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.texts.setdefault(self.tags[-1][0], []).append(data)


EVIL = "</script><img src=x onerror=alert(1)>&amp;[link=http://x]\x1b[31m\u202e\u2028"
SHOWN = "</script><img src=x onerror=alert(1)>&amp;[link=http://x]\\x1b[31m\\u202e\\u2028"


def test_client_names_with_markup_are_refused(runs: Any, copy_of: Any) -> None:
    for name in ("metrics.jsonl", "assignment.jsonl", "summary.json", "manifest.json"):
        folder = copy_of(runs("fedamole"))
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('"mood"', json.dumps(EVIL)))
        with pytest.raises(RunError, match=rf"{name}.* is damaged"):
            content_of(folder)
        shutil.rmtree(folder)


def test_texts_from_a_run_are_escaped(runs: Any, copy_of: Any) -> None:
    folder = copy_of(runs("fedamole"))
    (folder / "clients.json").write_text(json.dumps({"mood": {"labels": {EVIL: 3}}}))
    (folder / "routing.json").write_text(json.dumps({"clients": {"mood": {EVIL: {EVIL: 0.5}}}}))
    text = (folder / "assignment.jsonl").read_text()
    (folder / "assignment.jsonl").write_text(text.replace("model.layers.0", json.dumps(EVIL)[1:-1]))
    failed = {"round": 0, "client": "mood", "split": "train", "failed": EVIL, "bytes_down": 1, "bytes_up": 1}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(failed) + "\n")
    config = tomllib.loads((folder / "config.toml").read_text())
    config["run"]["name"], config["base"]["model"] = "</title><script>alert(2)</script>", EVIL
    config["method"][EVIL] = EVIL
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    result = content_of(folder)
    text = page(result)
    reader = Reader()
    reader.feed(text)
    assert "img" not in [tag for tag, _ in reader.tags]
    assert [tag for tag, _ in reader.tags].count("script") == 2
    (content,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', text, re.DOTALL)
    kept = json.loads(content)
    assert kept["labels"]["labels"] == [SHOWN]
    assert kept["failed"] == [["</title><script>alert(2)</script>", 0, "mood", SHOWN]]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2028\u2066-\u2069]", text)
    assert {**result, "live": 0} == kept


def test_only_its_own_script_and_style_run_and_nothing_is_loaded(runs: Any) -> None:
    text = page(content_of(runs("fedamole")))
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        [inside] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"\b(src|href)\s*=\s*[\"'](?!#)", text)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|innerHTML|eval\(", text)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)\S+", text)
    assert page(content_of(runs("fedamole"))) == text, "the same runs make the same page"


def test_no_path_of_this_machine_is_disclosed(runs: Any, tiny: Path) -> None:
    """A page is sent on: it names the base and the run, but not where they lie."""
    text = page(content_of(runs("fedamole")))
    assert str(tiny.parent) not in text
    assert str(runs.folder) not in text


def test_everything_of_the_page_is_in_the_package() -> None:
    patterns = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    parts = [path for path in (SOURCE / "reporting" / "page").iterdir() if path.is_file() and path.suffix != ".py"]
    assert {path.suffix for path in parts} == {".html", ".css", ".js"}
    for path in parts:
        name = str(path.relative_to(SOURCE))
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns["fedamole"]), name


def luminance(colour: str) -> float:
    parts = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, other: str) -> float:
    dark, light = sorted((luminance(first), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_colours_and_text_stand_out_in_both_schemes() -> None:
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for what a figure is made of."""
    style = (SOURCE / "reporting" / "page" / "page.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in blocks]
    assert len(schemes) == 2
    for scheme, models in zip(schemes, (palette.LIGHT, palette.DARK), strict=True):
        for key in ("ink", "soft", "link"):
            assert contrast(scheme[key], scheme["page"]) >= 4.5, key
        assert contrast(scheme["soft"], scheme["wash"]) >= 4.5
        for colour in models:
            assert contrast(colour, scheme["page"]) >= 3, colour
        for key in ("focus", "split0", "split1", "split2", "split3"):
            assert contrast(scheme[key], scheme["page"]) >= 2.9, key


def test_figures_for_a_paper(runs: Any, tmp_path: Path) -> None:
    result = content_of(runs("fedamole", "federation.rounds=1"))
    result["experts"][0]["modules"] = result["experts"][0]["modules"][:1]  # one of the maps is enough here
    written = draw_all(tmp_path / "one", result)
    names = {path.stem for path in written}
    assert {"learning-loss", "test", "gain", "sizes", "experts-layer-0-q_proj", "data", "costs"} <= names
    assert {path.suffix for path in written} == {".svg", ".png"}
    for path in written:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            assert path.read_bytes().startswith(b"\x89PNG")
    again = draw_all(tmp_path / "two", {key: result[key] for key in ("titles", "short", "data")})
    assert [path.read_bytes() for path in again] == [(tmp_path / "one" / path.name).read_bytes() for path in again]


def test_figures_of_runs_in_other_scripts_do_not_replace_each_other(tmp_path: Path, monkeypatch: Any) -> None:
    labels = ("北京", "上海", "unnamed", "a b", "A-b", "unnamed-2")
    drawn = [(f"{figures._plain(label)}-sizes", label) for label in labels]
    monkeypatch.setattr(figures, "_figures", lambda content: iter(drawn))
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: path.write_text(figure))
    written = draw_all(tmp_path, {})
    assert len({path.name.lower() for path in written}) == 2 * len(labels)
    assert [path.read_text() for path in written if path.suffix == ".svg"] == list(labels)


def report(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["report", *map(str, arguments)])


def test_the_command(runs: Any, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "r.html"
    done = report(runs("fedit"), "--out", out)
    assert (done.exit_code, done.output.strip()) == (0, str(out))
    assert '"live":0' in out.read_text()
    assert report(runs("fedit"), "--out", out).exit_code == 0, "a report is written over"
    other = tmp_path / "config.toml"
    other.write_text("precious")
    for arguments, what in (
        ((runs("fedit"), "--out", other), "is not a report"),
        ((runs("fedit"), "--out", tmp_path), "is a folder"),
        ((tmp_path,), "neither a run folder"),
        ((runs("fedit"), runs("fedit", "data.partition_seed=1"), "--out", out), "a report is on one federation"),
        ((runs("fedit"), "--out", out, "--figures", other), "this is a file"),
    ):
        failed = report(*arguments)
        assert isinstance(failed.exception, RunError), arguments
        assert what in str(failed.exception)
    assert other.read_text() == "precious"


def test_live_follows_a_run_to_its_end(
    runs: Any, copy_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "POLL_SECONDS", 0.05)
    folder, finished, out = copy_of(runs("fedit"), unfinished=True), runs("fedit"), tmp_path / "r.html"
    seen: list[str] = []

    def go_on() -> None:
        def wait(what: str) -> None:
            end = time.monotonic() + 20
            while time.monotonic() < end and not (out.exists() and what in out.read_text()):
                time.sleep(0.02)
            seen.append(out.read_text())

        wait('"live":5')
        shutil.copy(finished / "metrics.jsonl", folder)
        wait("3 of 3")
        shutil.copy(finished / "summary.json", folder)

    thread = threading.Thread(target=go_on)
    thread.start()
    done = report(folder, "--out", out, "--live")
    thread.join()
    assert done.exit_code == 0
    assert out.as_uri() in done.output
    assert '"live":5' in seen[0]
    assert '"live":5' in seen[1]
    assert "3 of 3" in seen[1]
    final = out.read_text()
    assert '"live":0' in final, "a finished run's page does not reload itself"
    assert '"test":' in final


def test_ctrl_c_leaves_a_page_that_does_not_reload(runs: Any, copy_of: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    done = report(copy_of(runs("fedit"), unfinished=True), "--out", tmp_path / "r.html", "--live")
    assert done.exit_code == 0
    assert '"live":0' in (tmp_path / "r.html").read_text()


def test_a_live_page_has_its_reload_interval(runs: Any, tmp_path: Path) -> None:
    write_page(tmp_path / "r.html", content_of(runs("fedit")), reload_seconds=7)
    assert '"live":7' in (tmp_path / "r.html").read_text()
