"""Answers of a personal model: those that evaluation would generate, to prompts as training made them."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedamole.cli.personal import renamed
from fedamole.data.layouts import conversation_prompt
from fedamole.data.manifest import load_federation
from fedamole.data.templates import BUILT_IN, TemplateSettings
from fedamole.data.tokens import prompt_ids, tokenise
from fedamole.errors import ConfigError, DataError
from fedamole.evaluation.generation import generate_answers
from fedamole.personal.generate import (
    PromptFormat,
    answer_prompts,
    prompt_format_of,
    prompts_from_lines,
    raw_prompt,
    read_prompt_file,
    render_prompts,
)
from fedamole.personal.saved_models import find_model, open_bank

PROMPTS = ("Ann has a red cup on day 3 ->\n", "Bob has two pens on day 7 ->\n")


def expected_answers(run: Path, client: str, prompts: tuple[str, ...] = PROMPTS, tokens: int = 4) -> list[str]:
    """What evaluation generates, under this client's adapter alone."""
    bank, adapters = open_bank([find_model(run, client)], "cpu")
    bank.load(adapters)
    ids = [row.prompt for row in tokenise([raw_prompt(text) for text in prompts], bank.base.tokenizer, 1000).rows]
    return generate_answers(bank, [ids], tokens, 8192)[0]


def records(result: Any) -> list[dict[str, str]]:
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.mark.parametrize("method", ["fedamole", "fedprompt"])
def test_prompts_on_the_command_line(method: str, fedamole: Any, runs: Any) -> None:
    run = runs(method)
    result = fedamole("generate", run, *PROMPTS, "--client", "plain")
    assert result.code == 0, result.err
    assert result.out == "".join(f"{answer}\n" for answer in expected_answers(run, "plain"))
    results = records(fedamole("generate", run, *PROMPTS, "--client", "plain", "--json"))
    assert results == [
        {"client": "plain", "prompt": prompt, "answer": answer}
        for prompt, answer in zip(PROMPTS, expected_answers(run, "plain"), strict=True)
    ]


def test_two_clients_answer_differently(fedamole: Any, runs: Any) -> None:
    run = runs("local_only")
    first = records(fedamole("generate", run, PROMPTS[0], "--client", "plain", "--json"))
    other = records(fedamole("generate", run, PROMPTS[0], "--client", "chat", "--json"))
    assert first[0]["answer"] != other[0]["answer"]
    assert [first[0]["answer"]] == expected_answers(run, "plain", PROMPTS[:1])
    assert [other[0]["answer"]] == expected_answers(run, "chat", PROMPTS[:1])


def test_an_option_selects_the_variant(fedamole: Any, runs: Any, tmp_path: Path) -> None:
    """Only the second variant is left of one client, so the option decides whether there is a model."""
    own = Path(shutil.copytree(runs("fedit", "evaluation.pre_aggregation=true"), tmp_path / "own"))
    shutil.rmtree(own / "clients/chat/adapter")
    arguments = ("generate", own, PROMPTS[0], "--client", "chat", "--json")
    assert fedamole(*arguments).code == 5
    assert [record["client"] for record in records(fedamole(*arguments, "--variant", "fedit_ft"))] == ["chat"]
    refused = fedamole(*arguments, "--variant", "fedit_tf")
    assert (refused.code, "no saved model of 'fedit_tf'" in refused.line) == (5, True)


def test_a_longer_answer(fedamole: Any, runs: Any) -> None:
    run = runs("fedamole")
    result = records(fedamole("generate", run, PROMPTS[0], "--client", "chat", "--max-new-tokens", 9, "--json"))
    assert (
        [result[0]["answer"]]
        == expected_answers(run, "chat", PROMPTS[:1], 9)
        != expected_answers(run, "chat", PROMPTS[:1])
    )


def test_lines_of_standard_input_and_of_a_file(fedamole: Any, runs: Any, piped: Any) -> None:
    run, texts = runs("fedamole"), tuple(prompt.strip() for prompt in PROMPTS)
    piped(f"{texts[0]}\n\n{texts[1]}\n")
    assert records(fedamole("generate", run, "--client", "plain", "--json")) == (
        expected := [
            {"client": "plain", "prompt": text, "answer": answer}
            for text, answer in zip(texts, expected_answers(run, "plain", texts), strict=True)
        ]
    )
    Path("prompts.txt").write_text("\ufeff" + "\n".join(texts))
    assert records(fedamole("generate", run, "--client", "plain", "--file", "prompts.txt", "--json")) == expected


def test_rows_of_a_file_into_a_file(fedamole: Any, runs: Any, tiny: Path) -> None:
    """The client's own data file, without its labels: the prompts are those of training."""
    run = runs("fedamole")
    rows = [json.loads(line) for line in (tiny / "entail.jsonl").read_text().splitlines()[:3]]
    for row in rows:
        del row["label"]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("generate", run, "--client", "entail", "--file", "rows.jsonl", "--json", "--out", "answers.jsonl")
    result = fedamole(*arguments)
    assert (result.code, result.out) == (0, "")
    prompts = tuple(f"{row['premise']} Then {row['hypothesis']}\n" for row in rows)
    results = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in results] == list(prompts)
    assert [record["answer"] for record in results] == expected_answers(run, "entail", prompts)
    result = fedamole(*arguments)
    assert result.code == 5
    assert "is not overwritten" in result.line


def test_one_row_by_its_columns(fedamole: Any, runs: Any) -> None:
    arguments = ("--set", "premise=Ann sat.", "--set", "hypothesis=a = b", "--json")
    result = records(fedamole("generate", runs("fedamole"), "--client", "entail", *arguments))
    assert result[0]["prompt"] == "Ann sat. Then a = b\n"


def test_special_tokens_in_rows_and_prompts_are_text(fedamole: Any, runs: Any, caplog: Any) -> None:
    """`<end>` is the base's end-of-text token: it reaches the model letter by letter, which a warning counts."""
    run, rows = runs("fedamole"), [{"premise": "a<end>", "hypothesis": "b"}, {"premise": "a", "hypothesis": "b"}]
    model = find_model(run, "entail")
    bank, _ = open_bank([model], "cpu")
    special, plain = render_prompts(rows, prompt_format_of(model), "here")
    ids = [prompt_ids(example, bank.base.tokenizer) for example in (special, plain, raw_prompt("<end>"))]
    assert not {bank.base.tokenizer.eos_token_id} & {*ids[0], *ids[1], *ids[2]}
    assert bank.base.tokenizer.decode(ids[0]) == "a<end> Then b\n"
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = fedamole("generate", run, "--client", "entail", "--file", "rows.jsonl", "--json")
    assert [record["prompt"] for record in records(result)] == ["a<end> Then b\n", "a Then b\n"]
    assert "prompts: 1 of 2 examples hold the text of a special token" in caplog.text


def test_prompts_are_those_of_training(runs: Any) -> None:
    """Every client's rows, read back through its own template, from its own file."""
    run = runs("fedamole")
    config = runs.load("fedamole")
    shards = {shard.client: shard for shard in load_federation(config.data, Path.cwd()).shards}
    for source in config.data.source:
        created = read_prompt_file(Path(source.path), prompt_format_of(find_model(run, source.name)))
        known = {example.prompt for example in shards[source.name].train}
        assert known
        assert known <= {example.prompt for example in created}
        assert {example.answer for example in created} == {""}


def test_prompts_of_files_are_as_written(tmp_path: Path) -> None:
    rows = ['{"instruction": "Next visit?", "input": 0}', '{"instruction": "Next visit?", "input": "2024-03-01"}']
    rows += ['{"instruction": "Next visit?", "input": 1.10}', '{"instruction": "Next visit?", "input": 2e5}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    created = [example.context for example in read_prompt_file(tmp_path / "rows.jsonl", PromptFormat())]
    assert created == ["0", "2024-03-01", "1.10", "2e5"]
    (tmp_path / "p.txt").write_bytes("\ufeffone\u2028still one\r\n\r\n  two\x0b\x85 \n".encode())
    texts = [example.prompt for example in read_prompt_file(tmp_path / "p.txt", PromptFormat())]
    assert texts == ["one\u2028still one", "  two\x0b\x85 "]
    (tmp_path / "p.txt").write_bytes("fine\ncaf\xe9".encode("latin-1"))
    with pytest.raises(DataError, match=r"p.txt, line 2: cannot be read as UTF-8 text: it has another encoding"):
        read_prompt_file(tmp_path / "p.txt", PromptFormat())


def test_layouts() -> None:
    def prompts(*rows: dict[str, Any], **how: Any) -> list[str]:
        return [example.prompt for example in render_prompts(rows, PromptFormat(**how), "here")]

    contexts = prompts({"instruction": "Add.", "input": "1 and 2"}, {"instruction": "Go.", "input": ""})
    assert [("### Input:\n1 and 2\n\n### Response:\n" in text, "### Input" in text) for text in contexts] == [
        (True, True),
        (False, False),
    ]
    assert prompts({"question": "Why?"}, columns={"instruction": "question"})[0].count("### Instruction:\nWhy?") == 1
    assert prompts({"text": "hm", "label_text": ""})[0].startswith("Text: hm\n")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert prompts({"messages": talk}) == [conversation_prompt([("user", "Hi")])]
    assert prompts({"prompt": "as {it} is", "id": 7}, template="snli") == ["as {it} is"]
    beside = {"prompt": "raw", "messages": talk}
    conversation = [conversation_prompt([("user", "Hi")])]
    assert prompts(beside, template="messages") == conversation
    assert prompts(beside, columns={"prompt": ""}) == conversation
    assert prompts({"prompt": "raw", "chat": talk}, columns={"prompt": "", "messages": "chat"}) == conversation
    for how in ({"template": "messages"}, {"columns": {"prompt": ""}}):
        assert prompts({"prompt": "raw"}, **how) == ["raw"]
    with pytest.raises(DataError, match=r"here: no template fits the columns id"):
        prompts({"id": 7})
    with pytest.raises(
        DataError, match=r"made of premise, hypothesis; 'hypothesis' is missing, the columns are premise"
    ):
        prompts({"premise": "a"}, template="snli")
    with pytest.raises(DataError, match=r"here, row 2: column 'text' is empty"):
        prompts({"text": "a"}, {"text": None})


def test_a_message_fills_the_declared_column_of_a_template() -> None:
    turns = [("system", "Be short."), ("user", "Hi"), ("assistant", "Ho"), ("user", "Name {a} town.")]
    triage = TemplateSettings(prompt="Letter: {text}\nUrgent?\n", answer="{label}")
    note = TemplateSettings(prompt="{q}|{note}|\n", answer="{label}", context="note")
    pair = TemplateSettings(prompt="{a} {b}\n", answer="{label}")
    own = {"triage": triage, "note": note, "pair": pair}

    def prompt(column: str, **how: Any) -> str:
        return PromptFormat(templates=own, **how).with_message_column(column).conversation(turns).prompt

    assert prompt("text", template="triage") == "Letter: Name {a} town.\nUrgent?\n"
    assert prompt("q", template="note") == "Name {a} town.||\n"
    assert prompt("prompt") == "Name {a} town."
    alpaca = BUILT_IN["alpaca"].prompt_without_context
    assert alpaca is not None
    assert prompt("instruction") == alpaca.replace("{instruction}", "Name {a} town.")
    renames = {"instruction": "question"}
    assert prompt("question", columns=renames) == prompt("instruction") == prompt("instruction", columns=renames)
    with pytest.raises(ConfigError, match=r"template 'triage' reads no column 'prompt'; it reads text"):
        prompt("prompt", template="triage")
    with pytest.raises(ConfigError, match=r"cannot fill the column 'a' alone: .*'b' is missing"):
        prompt("a", template="pair")
    with pytest.raises(DataError, match="must be the user's, and it is the assistant's"):
        PromptFormat().with_message_column("prompt").conversation(turns[:-1])


def test_an_option_renames_or_drops_a_column() -> None:
    assert renamed(["instruction=question", "prompt="]) == {"instruction": "question", "prompt": ""}
    for wrong in ("prompt", "=question"):
        with pytest.raises(ConfigError, match=r"write new=old, .* or name= to drop a column"):
            renamed([wrong])


def test_what_training_dropped_is_dropped_from_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "Go.", "input": "raw", "output": "Gone."}) + "\n")
    (kept,), (dropped,) = (
        read_prompt_file(path, PromptFormat()),
        read_prompt_file(path, PromptFormat(columns={"input": ""})),
    )
    assert "### Input:\nraw" in kept.prompt
    assert "raw" not in dropped.prompt
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path.write_text(json.dumps({"prompt": "raw", "messages": talk}) + "\n")
    for layout in (PromptFormat("messages"), PromptFormat(columns={"prompt": ""})):
        assert [prompt.prompt for prompt in read_prompt_file(path, layout)] == [conversation_prompt([("user", "Hi")])]


def test_a_prompt_that_is_too_long_is_cut_as_in_training(runs: Any, caplog: Any) -> None:
    """128 positions, 8 of them for the answer: the beginning is cut, and the answer is that to the last 120 tokens."""
    bank, adapters = open_bank([find_model(runs("fedamole"), "plain")], "cpu")
    bank.load(adapters)
    text = " ".join(f"on day {number}" for number in range(80))
    ids = tuple(bank.base.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert len(ids) > 200
    result = list(answer_prompts(bank, [raw_prompt(text)], 8, 8192))
    assert result == generate_answers(bank, [[ids[-120:]]], 8, 8192)[0]
    assert "1 of 1 prompts were cut to 120 tokens" in caplog.text
    with pytest.raises(ConfigError, match="leaves no room for a prompt: this base has 128 positions"):
        list(answer_prompts(bank, [raw_prompt(text)], 128, 8192))


def test_more_prompts_than_are_handed_over_at_once(runs: Any) -> None:
    bank, adapters = open_bank([find_model(runs("fedamole"), "plain")], "cpu")
    bank.load(adapters)
    result = list(answer_prompts(bank, prompts_from_lines("\n".join(f"{number} ->" for number in range(70))), 2, 8192))
    assert len(result) == 70
    assert result[69] == next(answer_prompts(bank, [raw_prompt("69 ->")], 2, 8192))


def test_an_adapter_folder_on_a_copy_of_its_base(fedamole: Any, runs: Any, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(runs("fedamole") / "clients/plain/adapter", tmp_path / "copied")
    arguments = ("generate", "copied", *PROMPTS, "--base", tiny / "base", "--max-new-tokens", 4, "--json")
    result = records(fedamole(*arguments))
    assert [record["answer"] for record in result] == expected_answers(runs("fedamole"), "plain")
    assert {record["client"] for record in result} == {"copied"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--client", "plain", "a", "--set", "b=c"), 2, "only one of them"),
        (("--client", "plain", "--set", "prompt"), 2, "write COLUMN=TEXT"),
        (("--client", "plain", "--file", "no.txt"), 3, "no.txt does not exist"),
        (("--client", "plain", "--file", "odd.pdf"), 3, "use .txt for one prompt per line"),
        (("--client", "entail", "--set", "premise=a"), 3, "'hypothesis' is missing"),
        (("--client", "plain"), 3, "standard input contains no prompt"),
        (("--client", "plain", ""), 3, "prompt 1 of 1 is empty"),
        (("a",), 5, "select one with --client"),
        (("--client", "plian", "a"), 5, "did you mean 'plain'"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], code: int, message: str, fedamole: Any, runs: Any, piped: Any) -> None:
    piped("\n")
    Path("odd.pdf").write_text("")
    result = fedamole("generate", runs("fedamole"), *arguments)
    assert result.code == code, result.err
    assert message in result.line


def test_a_word_on_templates(fedamole: Any, runs: Any) -> None:
    """Said where a prompt cannot be what the client was trained on, and nowhere else."""
    result = fedamole("generate", runs("fedamole"), "--client", "entail", "Ann sat.")
    assert "prompts are used verbatim; --set applies the template that entail was trained with" in result.err
    assert "used verbatim" not in fedamole("generate", runs("fedamole"), "--client", "plain", PROMPTS[0]).err
