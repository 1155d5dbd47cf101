"""`fedamole explain`: what is printed, what is written, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedamole.personal.explain import ExampleInContext, Expert, Explanation, Module, Token
from fedamole.personal.explain_page import page
from fedamole.personal.explain_terminal import explanation_view, visible
from fedamole.personal.routing import RoutingStats

RAW = '<b>&"\x1b[31m'
"""A text that must be escaped on a page, and must not reach a terminal."""


def explanation(*module_names: str) -> Explanation:
    """Two tokens, the second of the answer, in modules with the experts 3 and 12."""
    experts = (
        Expert(3, 0.6, 0.5, "", ("shop", "bank<1>")),
        Expert(12, 0.4, 0.5, "its own", (), (ExampleInContext("before ", RAW, " after", 0.7),)),
    )
    stats = RoutingStats(2, (0.6, 0.4), (0.5, 0.5), 0.1)
    modules = tuple(Module(name, stats, experts, ((0.9, 0.1), (0.3, 0.7))) for name in module_names)
    return Explanation("shop", "prompt and answer", modules, 8, True, (Token(RAW, False), Token("yes\n", True)))


def printed(explained: Explanation, colours: bool) -> str:
    console = Console(width=100, force_terminal=colours, color_system="truecolor" if colours else None)
    with console.capture() as caught:
        console.print(explanation_view(explained, console))
    return caught.get()


def test_tokens_are_coloured_by_their_experts_on_a_terminal() -> None:
    out = printed(explanation("a.q_proj"), True)
    first, second = "48;2;124;197;240", "48;2;240;178;62"
    assert re.search(rf"\x1b\[[0-9;]*{first}m<b>&\"·\[31m\x1b", out)  # the text's own escape is not obeyed
    assert re.search(rf"\x1b\[1;[0-9;]*{second}myes↵", out)
    assert f"{first}m  \x1b" in out  # and the legend has the same colours
    assert f"{second}m  \x1b" in out


def test_without_colours_tokens_have_their_experts_numbers() -> None:
    out = printed(explanation("a.q_proj"), False)
    assert '<b>&"·[31m[3]' in out
    assert "answer: yes↵[12]" in out
    assert "before [" in out
    assert re.search(r"│ 3 +│ 60% +│ 50% of tokens │ shop, bank<1>", out)
    assert re.search(r"│ 12 +│ 40% +│ 50% of tokens │ its own ", out)
    assert "a.v_proj" in printed(explanation("a.q_proj", "a.v_proj"), False)


class Reader(HTMLParser):
    """Checks that tags are closed in order, and collects text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("modules", [("a.q_proj",), ("a.q_proj", "a.v_proj")])
def test_the_page_is_whole_and_escaped_and_fetches_nothing(modules: tuple[str, ...]) -> None:
    text = page(explanation(*modules))
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert '<b>&"·[31m' in reader.text
    assert "bank<1>" in reader.text
    assert {tag for tag, _ in reader.tags}.isdisjoint({"b", "script", "link", "img", "iframe"})
    assert not re.search(r"https?:|url\(|@import|src=", text)
    assert "prefers-color-scheme: dark" in text
    assert "expert 12  70%\nexpert 3  30%" in reader.text
    tokens = [about for tag, about in reader.tags if about.get("tabindex") == "0"]
    assert [about["class"] for about in tokens] == ["token e0", "token e1"] * len(modules)
    assert [about["style"] for about in tokens[:2]] == ["--w:0.90", "--w:0.70"]


def test_what_cannot_be_seen_is_shown() -> None:
    assert visible("a\n") == "a↵\n"
    assert visible("") == visible("\t") == visible("\x1b") == "·"


# --- the command ----------------------------------------------------------------------------------------------


def test_a_text_and_its_answer(fedamole: Callable[..., Any], runs: Any, tmp_path: Path) -> None:
    run, page_ = runs("fedamole"), tmp_path / "pages" / "one.html"
    done = fedamole(
        "explain", run, "--client", "mood", "--prompt", "Ann has <b>\n", "--html", page_, "--json", "--layer", "all"
    )
    assert done.code == 0
    report = json.loads(done.out)
    assert "".join(token["text"] for token in report["tokens"] if not token["answer"]) == "Ann has <b>\n"
    answered = fedamole("generate", run, "Ann has <b>\n", "--client", "mood").out.strip()
    assert "".join(token["text"] for token in report["tokens"] if token["answer"]).strip() == answered
    for token in report["tokens"]:
        for module, weights in token["weights"].items():
            assert sum(weights.values()) == pytest.approx(1, abs=1e-5)
            assert len(weights) <= 2
            assert set(weights) <= {str(expert["expert"]) for expert in report["modules"][module]["experts"]}
    for module in report["modules"].values():
        assert module["tokens"] == len(report["tokens"])
        assert sum(expert["share"] for expert in module["experts"]) == pytest.approx(1)
        assert all("mood" in expert["clients"] for expert in module["experts"])
    reader = Reader()
    reader.feed(page_.read_text())
    assert reader.open == []
    assert "&lt;" in page_.read_text()
    assert len([about for _, about in reader.tags if about.get("tabindex")]) == 4 * len(report["tokens"])


def test_a_given_answer_the_template_and_the_first_example(fedamole: Callable[..., Any], runs: Any) -> None:
    arguments = ("explain", runs("fedamole"), "--client", "mood", "--json")
    given = json.loads(fedamole(*arguments, "--set", "text=the pie is bad", "--answer", "glad").out)
    assert "".join(token["text"] for token in given["tokens"] if token["answer"]) == "glad"
    assert "Text: the pie is bad\n" in "".join(token["text"] for token in given["tokens"])
    assert len(given["modules"]) == 1
    first = json.loads(fedamole(*arguments).out)
    assert "Which class" in "".join(token["text"] for token in first["tokens"])
    plain = fedamole(*arguments[:-1], "--layer", "1.self_attn.v_proj")
    assert "mood, model.layers.1.self_attn.v_proj: prompt and answer" in plain.out


def test_special_tokens_in_a_given_answer_are_text(fedamole: Callable[..., Any], runs: Any) -> None:
    arguments = ("explain", runs("fedamole"), "--client", "mood", "--json", "--prompt", "a\n", "--answer", "<end>")
    answer = [token["text"] for token in json.loads(fedamole(*arguments).out)["tokens"] if token["answer"]]
    assert len(answer) > 1
    assert "".join(answer) == "<end>"


def test_what_the_experts_are_for(fedamole: Callable[..., Any], runs: Any, tmp_path: Path) -> None:
    arguments = ("explain", runs("fedamole"), "--client", "mood", "--experts", "--top", 2)
    report = json.loads(fedamole(*arguments, "--split", "train", "--json", "--html", tmp_path / "e.html").out)
    assert report["about"] == "mood's train data"
    ((_, module),) = report["modules"].items()
    assert module["tokens"] > 100
    examples = [expert["examples"] for expert in module["experts"]]
    assert all(len(examples) <= 2 for examples in examples)
    assert all(expert["examples"] for expert in module["experts"] if expert["largest"] > 0)
    rows = [json.loads(line) for line in (runs.config.parent / "mood.jsonl").read_text().splitlines()]
    texts = [f"Text: {row['text']}\nWhich class does the text belong to?\nClass:\n{row['label_text']}" for row in rows]
    for example in (example for examples in examples for example in examples):
        assert any(example["before"] + example["text"] + example["after"] in text for text in texts)
    assert "expert " in fedamole(*arguments).out
    assert 'style="--w:1"' in (tmp_path / "e.html").read_text()


def test_all_clients_into_a_file(fedamole: Callable[..., Any], runs: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs("fedamole"), run)
    done = fedamole("explain", run, "--all")
    assert done.code == 0
    assert "entail" in done.out
    result = json.loads((run / "routing.json").read_text())
    assert result["split"] == "validation"
    assert sorted(result["clients"]) == ["chat", "entail", "mood", "plain"]
    for modules in result["clients"].values():
        for shares in modules.values():
            assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
    chat = json.loads(fedamole("explain", run, "--client", "chat", "--experts", "--layer", "all", "--json").out)
    assert result["clients"]["chat"] == {
        module: {str(expert["expert"]): pytest.approx(expert["share"], abs=1e-5) for expert in report["experts"]}
        for module, report in chat["modules"].items()
    }


@pytest.mark.parametrize(
    ("method", "roles"),
    [
        ("fedalt", ["its own", "the mean of the other clients"]),
        ("feddpa", ["its own", "shared by all clients"]),
        ("adaptive_experts", ["its own", "a cluster's", "a cluster's"]),
        ("model_glue", ["a cluster's", "a cluster's"]),
        ("fedlease", None),
    ],
)
def test_other_mixtures(method: str, roles: list[str] | None, fedamole: Callable[..., Any], runs: Any) -> None:
    run = runs(method, "federation.rounds=2")
    report = json.loads(fedamole("explain", run, "--client", "plain", "--json", "--prompt", "Ann has\n").out)
    ((_, module),) = report["modules"].items()
    assert sum(expert["share"] for expert in module["experts"]) == pytest.approx(1)
    results = [expert["role"] for expert in module["experts"]]
    assert results == roles if roles else results.count("its own cluster's") == 1
    own = [expert for expert in module["experts"] if expert["role"].startswith("its own")]
    assert ["plain" in expert["clients"] for expert in own] == [True] * (method != "model_glue")
    if roles:
        assert not any(expert["clients"] for expert in module["experts"] if expert not in own)


@pytest.mark.parametrize(
    ("arguments", "code", "output"),
    [
        (("--client", "mood", "--prompt", "x", "--experts"), 2, "choose one"),
        (("--all", "--client", "mood"), 2, "--all covers all clients"),
        (("--client", "mood", "--html", "x.json"), 2, "must end in .html"),
        (("--client", "mood", "--layer", "v_proj"), 2, "2 modules have names with this ending"),
        (("--client", "mood", "--prompt", "long " * 200), 2, "128"),
        (("--client", "nobody"), 5, "no client 'nobody'"),
        (("--client", "mood", "--split", "test"), 2, "validation"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], code: int, output: str, fedamole: Callable[..., Any], runs: Any) -> None:
    done = fedamole("explain", runs("fedamole"), *arguments)
    assert done.code == code
    assert output in done.err


def test_a_model_without_experts_is_refused(fedamole: Callable[..., Any], runs: Any) -> None:
    for arguments in (("--client", "mood"), ("--client", "mood", "--experts"), ("--all",)):
        done = fedamole("explain", runs("fedit"), *arguments)
        assert done.code == 2
        assert "nothing to route" in done.line
    assert not (runs("fedit") / "routing.json").exists()
