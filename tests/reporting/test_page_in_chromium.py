"""The page as a reader meets it: in a real browser, by mouse and by keyboard, in the light and in the dark."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedamole.errors import RunError
from fedamole.reporting.page.content import content
from fedamole.reporting.page.document import write_page
from fedamole.reporting.page.reading import read_folders
from fedamole.reporting.page.scale import scale_of, tone

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here (apt-get install chromium)")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the dev extra has it)")

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass
class Opened:
    """A page, with all it complained of and all it asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Opened]]:
    """Open a file; in the end nobody may have complained, and nothing but that file may have been asked for."""
    visits: list[tuple[Opened, Path]] = []

    def opened(path: Path, **settings: Any) -> Opened:
        result = Opened(browser.new_page(**{"viewport": {"width": 1200, "height": 900}, **settings}))
        result.page.on("console", lambda message: result.complaints.append(message.text))
        result.page.on("pageerror", lambda error: result.complaints.append(str(error)))
        result.page.on("request", lambda request: result.requests.append(request.url))
        result.page.goto(path.as_uri())
        visits.append((result, path))
        return result

    yield opened
    for result, path in visits:
        result.page.close()
        assert result.complaints == []
        assert result.requests == [path.as_uri()]


@pytest.fixture(scope="module")
def report(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_page(path, content(read_folders([runs("fedamole"), runs("fedit")])))
    return path


def test_every_figure_is_there(visit: Any, report: Path) -> None:
    page = visit(report).page
    assert [element.get_attribute("id") for element in page.query_selector_all("section")] == [
        "about",
        "learning",
        "test",
        "gain",
        "experts",
        "data",
        "costs",
    ]
    for figure, least in (
        ("#learning svg path.model", 2 * 5),
        ("#test figure .mark", 3 * 4),
        ("#test figure .m-plain", 2 * 4),
        ("#gain td[data-client]", 3 * 4),
        ("#experts .heat .cell", 2 * 4),
        ("#sizes .heat .cell", 4 * 4),
        ("#shared .heat .cell", 1),
        ("#data svg .piece", 4 * 3),
        ("#costs .bar", 2 * 4),
    ):
        assert page.locator(figure).count() >= least, figure
    assert page.locator("nav a").count() == 9
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200
    for section in page.query_selector_all("section, #sizes, #shared"):
        assert section.query_selector("h2, h3").inner_text()
        assert section.query_selector(".see").inner_text().endswith(".")


def held(runs: Any, round_: int, module: int, client: str) -> dict[int, float]:
    """What assignment.jsonl says."""
    lines = [json.loads(line) for line in (runs("fedamole") / "assignment.jsonl").read_text().splitlines()]
    modules = list(dict.fromkeys(line["module"] for line in lines))
    [line] = [
        line for line in lines if (line["round"], line["module"], line["client"]) == (round_, modules[module], client)
    ]
    return dict(zip(line["experts"], line["relevance"], strict=True))


def test_pointing_at_a_cell_tells_client_expert_and_relevance(visit: Any, report: Path, runs: Any) -> None:
    page = visit(report).page
    cells, mine = page.locator("#experts figure").first.locator(".cell"), held(runs, 2, 0, "chat")
    cells.first.scroll_into_view_if_needed()
    cells.first.hover()
    output = page.locator("#tip").inner_text()
    first = min(mine)
    assert output.startswith(f"chat holds expert {first}, relevance P = {mine[first]:.4f}; shared with ")
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()


def test_module_and_round_are_chosen(visit: Any, report: Path, runs: Any) -> None:
    page = visit(report).page
    details = page.locator("#experts > div > details")
    details.locator("summary").click()

    def line() -> str:
        return str(details.locator("tbody tr").first.inner_text())

    def expected(round_: int, module: int) -> str:
        return ", ".join(f"{expert} ({p:.4f})" for expert, p in held(runs, round_, module, "chat").items())

    assert re.split(r"\t", line())[1] == expected(2, 0)
    page.select_option("#experts select", index=3)
    assert re.split(r"\t", line())[1] == expected(2, 3)
    page.get_by_role("button", name="previous round").click()
    assert re.split(r"\t", line())[1] == expected(1, 3)
    slider = page.get_by_role("slider", name="round")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#experts output").inner_text() == "round 0 of 0 to 2"
    assert re.split(r"\t", line())[1] == expected(0, 3)
    assert "The relevance is random" in page.locator("#experts").inner_text()
    assert page.get_by_role("button", name="previous round").is_disabled()


def test_the_map_is_read_by_keyboard(visit: Any, report: Path, runs: Any) -> None:
    page = visit(report).page
    slider = page.get_by_role("slider", name="round")
    slider.focus()
    page.keyboard.press("Tab")
    output = page.locator("#experts figure .readout").first
    assert output.inner_text().startswith("chat "), "Tab leads from the controls to the map"
    page.keyboard.press("ArrowDown")
    assert output.inner_text().startswith("entail ")
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    expert = 3 * 4 - 2
    mine = held(runs, 2, 0, "entail")
    does = f"entail holds expert {expert}," if expert in mine else f"entail does not hold expert {expert};"
    assert output.inner_text().startswith(does)
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_the_reference_of_the_gains_is_chosen(visit: Any, report: Path) -> None:
    page = visit(report).page
    cells = page.locator("#gain td[data-client]")
    before = cells.all_inner_texts()
    page.select_option("#gain select", label="fedit")
    after = cells.all_inner_texts()
    pairs = list(zip(before[2::3], after[2::3], strict=True))
    assert all(pair.lstrip("+−±") == other.lstrip("+−±") for pair, other in pairs), "the other way round: signs turn"
    assert any(pair != other for pair, other in pairs)


def test_dark_is_dark_and_paper_is_light(visit: Any, report: Path) -> None:
    def colours(page: Any) -> list[str]:
        return [
            page.evaluate(f"getComputedStyle(document.querySelector('{what}')).{kind}")
            for what, kind in (("body", "backgroundColor"), ("body", "color"), ("#learning .model", "stroke"))
        ]

    light, dark = (visit(report, color_scheme=scheme).page for scheme in ("light", "dark"))
    shown = colours(dark)
    assert colours(light)[0] == "rgb(255, 255, 255)"
    assert all(before != other for before, other in zip(colours(light), shown, strict=True))
    dark.emulate_media(media="print", color_scheme="dark")
    assert colours(dark) == colours(light)
    assert dark.locator("#experts .controls").is_hidden()


def test_it_fits_a_telephone(visit: Any, report: Path) -> None:
    page = visit(report, viewport={"width": 390, "height": 800}).page
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_text_from_a_run_cannot_become_markup(visit: Any, runs: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs("fedamole"), tmp_path / "run", ignore=shutil.ignore_patterns("clients")))
    evil = "</script><img src=x onerror=document['title']='owned'>"
    held_lines = [json.loads(line) for line in (folder / "assignment.jsonl").read_text().splitlines()]
    module = held_lines[0]["module"]
    lines = [{**line, "module": evil if line["module"] == module else line["module"]} for line in held_lines]
    (folder / "assignment.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "routing.json").write_text(json.dumps({"clients": {"chat": {evil: {evil: 0.5}}}}))
    (folder / "clients.json").write_text(json.dumps({"chat": {"labels": {evil: 3, "low": 1}}}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"round": 1, "client": "chat", "split": "train", "bytes_down": 0, "failed": evil}) + "\n")
    write_page(tmp_path / "r.html", content(read_folders([folder])))
    page = visit(tmp_path / "r.html").page
    for summary in page.locator("details summary").all():
        summary.click()
    page.locator("#experts .heat").first.focus()
    assert page.locator("img").count() == 0
    assert page.title() == "Report on fedamole"
    assert page.locator("#experts select option").first.text_content() == evil
    for section in ("routing", "labels", "failed"):
        assert evil in page.locator(f"#{section} table").first.inner_text(), section
    assert page.locator("#labels svg .piece").count() == 2


@pytest.mark.parametrize("file", ["metrics.jsonl", "assignment.jsonl", "summary.json", "manifest.json"])
def test_a_name_that_is_markup_is_refused(runs: Any, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(runs("fedamole"), tmp_path / "run", ignore=shutil.ignore_patterns("clients")))
    evil = json.dumps("</script><img src=x onerror=document.title='owned'>")
    (folder / file).write_text((folder / file).read_text().replace('"chat"', evil))
    with pytest.raises(RunError, match=file):
        read_folders([folder])


def test_unfinished_and_live(visit: Any, runs: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs("fedamole"), tmp_path / "run", ignore=shutil.ignore_patterns("clients")))
    (folder / "summary.json").unlink()
    write_page(tmp_path / "r.html", content(read_folders([folder])), reload_seconds=600)
    page = visit(tmp_path / "r.html").page
    assert "Not finished: run is not finished: 3 of 3 rounds are done." in page.locator("header").inner_text()
    assert page.locator("#test").count() == 0
    page.select_option("#experts select", index=2)
    page.evaluate("dispatchEvent(new Event('resize'))")
    assert page.evaluate("JSON.parse(sessionStorage.getItem(`fedamole ${document.title}`)).module") == 2
    page.get_by_role("button", name="Stop reloading").click()
    assert page.get_by_role("button", name="Resume reloading").is_visible()


def test_without_javascript_texts_and_tables_are_there(browser: Any, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": 400, "height": 800})
    page = context.new_page()
    page.goto(report.as_uri())
    text = page.locator("main").inner_text()
    assert "has a mean test score of" in text
    titles = [
        "Settings of the runs",
        "Learning curves",
        "Test scores",
        "Gains per client",
        "Data of the clients",
        "Costs",
    ]
    assert page.locator("main h2").all_inner_texts() == titles
    assert page.locator("main table").count() == len(titles)
    assert {"chat", "entail", "mood", "plain"} <= set(page.locator("main tbody th").all_inner_texts())
    width = page.locator("main").bounding_box()["width"]
    assert all(box.bounding_box()["width"] <= width for box in page.locator(".wide").all())
    context.close()


def test_long_names_are_short_in_figures_and_full_in_tables(visit: Any, runs: Any, tmp_path: Path) -> None:
    data = content(read_folders([runs("fedamole"), runs("fedit")]))
    text, begin = json.dumps(data), "regional-hospital-network-"
    for name in data["clients"]:
        text = text.replace(f'"{name}"', f'"{begin}{name}"')
    renamed = json.loads(text)
    renamed["short"] = {f"{begin}{name}": f"…{name}" for name in data["clients"]}
    write_page(tmp_path / "r.html", renamed)
    for width in (400, 1280):
        page = visit(tmp_path / "r.html", viewport={"width": width, "height": 800}).page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown = page.locator("#test svg text.name").all_text_contents()
        assert shown == [f"…{name}" for name in data["clients"]]
        assert f"{begin}chat" in page.locator("#test tbody th").all_inner_texts()
        chart = page.locator("#test figure svg").bounding_box()["width"]
        assert chart >= 0.95 * page.locator("#test").bounding_box()["width"], "the chart uses the width"


def test_colours_of_the_assignment_start_at_no_preference(visit: Any, report: Path, runs: Any) -> None:
    page = visit(report).page
    mine = held(runs, 2, 0, "chat")
    scale = scale_of({"method": {"name": "fedamole"}}, clients=4)
    cells = page.locator("#experts figure").first.locator(".cell")
    for index, expert in enumerate(sorted(mine)):
        expected = tone(round(mine[expert], 4), scale)
        assert ("above" if expected >= 0 else "below") in cells.nth(index).get_attribute("class")
        strength = float(cells.nth(index).evaluate("(cell) => cell.style.getPropertyValue('--p')"))
        assert strength == pytest.approx(100 * abs(expected), abs=0.6)
    assert "0.250 (no preference)" in page.locator("#experts .legend").inner_text()
    slider = page.get_by_role("slider", name="round")
    slider.focus()
    page.keyboard.press("Home")
    assert cells.first.evaluate("(cell) => cell.style.getPropertyValue('--p')") == "0", "random values have no colour"


def test_tables_fit_on_paper(visit: Any, report: Path) -> None:
    page = visit(report, viewport={"width": 688, "height": 900}).page
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.scrollWidth") <= 688
    for selector in (".wide > table", "figure svg"):
        for element in page.locator(selector).all():
            if element.is_visible():
                box = element.bounding_box()
                assert box["x"] + box["width"] <= 690, selector
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator(".wide > table").first.evaluate("(table) => table.style.zoom") == ""
