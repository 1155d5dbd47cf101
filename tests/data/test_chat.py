"""Chat templates: which tokens are the prompt, which are trained on, and what cannot be rendered."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedamole.config import load_config
from fedamole.data.answer_options import options_of
from fedamole.data.chat import DATE, chat_template, stop_ids
from fedamole.data.examples import Example, Shard
from fedamole.data.layouts import arrange
from fedamole.data.manifest import Federation, Manifest, load_federation
from fedamole.data.settings import DataSettings, SourceSettings
from fedamole.data.templates import CHAT_INSTRUCTION, TemplateSettings, choose, render
from fedamole.data.tokens import prompt_ids, tokenise
from fedamole.errors import BaseModelError, ConfigError, DataError
from fedamole.experiment import check_budget
from fedamole.federation.client_data import client_data

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
THINKING = CHATML.replace(
    "message['content'] +",
    "('<think> </think> ' if message.role == 'assistant' else '') + \
message['content'] + ' .' +",
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' + message.content | trim "
    "+ ' [/INST]' }}{% else %}{{ ' ' + message.content | trim + ' </s>' }}{% endif %}{% endfor %}"
)
WORDS = "system user assistant be brief a b c d e q x y . : yes no <think> </think> [INST] [/INST]"


def make(template: str | None = CHATML, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """A tokenizer of words and line ends with a BOS token, which it puts before every text."""
    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    raw.train_from_iterator([WORDS + "\n"], trainers.WordLevelTrainer(special_tokens=special, vocab_size=60))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token=eos, chat_template=template
    )


def words(tokenizer: Any, ids: Sequence[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids))).replace("\n", "/")


def example_of(row: dict[str, Any], template: str = "chat", **own: TemplateSettings) -> Example:
    (row,) = arrange([row], {}, "f", template)
    chosen = choose(template, own, row, "f")
    example = render(chosen, options_of(chosen, [row], "f") if chosen.options else (), row, "f, row 1")
    assert example is not None
    return example


def messages(*texts: str, first: str = "user") -> dict[str, Any]:
    roles = ["system"] if first == "system" else []
    roles += ["user" if i % 2 == 0 else "assistant" for i in range(len(texts))]
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


def test_the_last_answer_and_its_end_marker_alone_are_trained_on() -> None:
    tokenizer = make()
    example = example_of(messages("be brief", "a q", "y", "b", "x y", first="system"))
    (row,) = tokenise([example], tokenizer, 100).rows
    assert words(tokenizer, row.prompt) == (
        "<|im_start|> system / be brief <|im_end|> / <|im_start|> user / a q <|im_end|> / "
        "<|im_start|> assistant / y <|im_end|> / <|im_start|> user / b <|im_end|> / <|im_start|> assistant /"
    )
    assert words(tokenizer, row.answer) == "x y <|im_end|>"
    assert prompt_ids(example, tokenizer) == row.prompt
    turns = [*({"role": role, "content": text} for role, text in example.turns or ()), {"role": "user", "content": "b"}]
    # Just as transformers tokenises it.
    assert tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"] == list(row.prompt)


def test_every_assistant_turn_is_trained_on_once_after_the_turns_before_it() -> None:
    """As the tokens of an example are prompt, which is not trained on, and answer, which is."""
    tokenizer = make()
    example = example_of(messages("be brief", "a q", "y", "b", "x y", "c", first="system"), "chat_turns")
    rows = tokenise(example.with_earlier_answers(), tokenizer, 100).rows
    start = "<|im_start|> system / be brief <|im_end|> / <|im_start|> user / a q <|im_end|> / <|im_start|> assistant /"
    assert [(words(tokenizer, row.prompt), words(tokenizer, row.answer)) for row in rows] == [
        (start, "y <|im_end|>"),
        (start + " y <|im_end|> / <|im_start|> user / b <|im_end|> / <|im_start|> assistant /", "x y <|im_end|>"),
    ]
    # Together they are the conversation: each assistant turn with its end marker is an answer in exactly one row.
    roles = ["system", "user", "assistant", "user", "assistant"]
    turns = [
        {"role": role, "content": text} for role, text in zip(roles, ("be brief", "a q", "y", "b", "x y"), strict=True)
    ]
    assert [*rows[1].prompt, *rows[1].answer] == tokenizer.apply_chat_template(turns)["input_ids"][:-1]


def test_turns_that_answer_nobody_or_are_empty_have_no_example() -> None:
    texts = ("a", "b", "c", "d", "e", " ", "x", "y")
    roles = ("assistant", "user", "assistant", "assistant", "user", "assistant", "user", "assistant")
    row = {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]}
    example = example_of(row, "chat_turns")
    assert [part.answer for part in example.with_earlier_answers()] == ["c", "y"]
    assert example_of({"prompt": "q", "completion": "x"}, "chat_turns").with_earlier_answers()[0].answer == "x"


def test_all_turns_are_in_the_training_split_alone_and_the_manifest_stays(tmp_path: Path) -> None:
    rows = [messages(f"a {i}", f"b {i}", f"c {i}", f"d {i}", f"e {i}", f"x {i}") for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def drawn(template: str, manifest: Manifest | None = None) -> Federation:
        source = SourceSettings("rows", path=str(tmp_path / "rows.jsonl"), template=template)
        return load_federation(DataSettings(source=(source,)), tmp_path, manifest)

    last, every = drawn("chat"), drawn("chat_turns")
    (shard,), (expanded,) = last.shards, every.shards
    assert len(expanded.train) == 3 * len(shard.train)
    assert expanded.train[2::3] == shard.train
    number = shard.train[0].answer.removeprefix("x ")
    assert [(part.prompt, part.answer) for part in expanded.train[:3]] == [
        (f"{question} {number}", f"{answer} {number}") for question, answer in ("ab", "cd", "ex")
    ]
    assert (expanded.test, expanded.validation, expanded.embedding) == (shard.test, shard.validation, shard.embedding)
    assert every.manifest.clients == last.manifest.clients
    assert drawn("chat_turns", every.manifest).shards == every.shards


def test_every_turn_needs_a_chat_of_free_text_and_no_privacy(tmp_path: Path) -> None:
    for wrong in ({}, {"options": ("a", "b"), "chat": True}, {"rejected": "{r}", "chat": True}):
        with pytest.raises(ConfigError, match="every_turn = True"):
            TemplateSettings(prompt="{q}", answer="{a}", every_turn=True, **wrong)  # type: ignore[arg-type]
    source = '[[data.source]]\nname = "a"\npath = "a.jsonl"\ntemplate = "chat_turns"\n'
    (tmp_path / "run.toml").write_text(f'{source}[method]\nname = "fedit"\n[privacy]\nepsilon = 8\n')
    config = load_config(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match="'a' trains on every assistant turn"):
        check_budget(config, {})


def test_conversations_without_the_chat_template_of_the_base_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    def shard(template: str) -> Shard:
        example = example_of(messages("q", "x"), template)
        return Shard("north", *[(example,)] * 4)

    for template, tokenizer in (("chat", make()), ("messages", make(None))):
        client_data(shard(template), tokenizer, 100)
        assert "chat_turns" not in caplog.text
    client_data(shard("messages"), make(), 100)
    assert "client north: its conversations are written with headings" in caplog.text


def test_text_around_the_answer_is_not_trained_on() -> None:
    tokenizer = make(THINKING)
    (row,) = tokenise([example_of(messages("q", "x"))], tokenizer, 100).rows
    assert words(tokenizer, row.prompt).endswith("q . <|im_end|> / <|im_start|> assistant / <think> </think>")
    assert words(tokenizer, row.answer) == "x . <|im_end|>"


def test_there_is_one_bos_if_the_template_writes_one_and_none_otherwise() -> None:
    tokenizer = make(INST, eos="</s>")
    (row,) = tokenise([example_of(messages("  q ", "\nx\n"))], tokenizer, 100).rows
    assert words(tokenizer, row.prompt) == "<s> [INST] q [/INST]"
    assert words(tokenizer, row.answer) == "x </s>"
    assert chat_template(tokenizer).strips
    assert tokenise([example_of(messages("q", "x"))], make(), 100).rows[0].prompt[0] != 1


def test_a_template_without_an_end_marker_ends_with_the_tokenizers_own() -> None:
    tokenizer = make("{% for message in messages %}{{ message.role + ' : ' + message.content + '\\n' }}{% endfor %}")
    (row,) = tokenise([example_of(messages("q", "x"))], tokenizer, 100).rows
    # The template ignores add_generation_prompt: what it writes before the answer belongs to the prompt all the same.
    assert (words(tokenizer, row.prompt), words(tokenizer, row.answer)) == ("user : q / assistant :", "x <|im_end|>")


def test_special_tokens_of_data_stay_text_and_those_of_templates_do_not() -> None:
    tokenizer = make()
    row = messages("be <|im_end|>", "a <|im_start|> system", "x <|im_end|> y", first="system")
    own = TemplateSettings(prompt="<|im_start|> {prompt}", answer="{completion}", chat=True)
    tokenised = tokenise([example_of(row), example_of(row, "own", own=own)], tokenizer, 100)
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    plain, with_token = tokenised.rows
    assert (plain.prompt.count(start), plain.prompt.count(end), plain.answer.count(end)) == (3, 2, 1)
    assert with_token.prompt.count(start) == 4
    assert tokenised.special == 2
    # The text is there, as the unknown words that it is to this tokenizer.
    assert words(tokenizer, plain.prompt).startswith(
        "<|im_start|> system / be <unk> <|im_end|> / <|im_start|> user / a"
    )


def test_options_end_with_the_end_marker() -> None:
    tokenizer = make(CHATML, eos="</s>")
    own = TemplateSettings(prompt="a {q} :", answer="{w}", options=("yes", "no"), chat=True, system="be brief")
    example = example_of({"q": "q", "w": "no"}, "own", own=own)
    (row,) = tokenise([example], tokenizer, 100).rows
    assert [words(tokenizer, option) for option in row.options] == ["yes <|im_end|>", "no <|im_end|>"]
    assert words(tokenizer, row.prompt).startswith(
        "<|im_start|> system / be brief <|im_end|> / <|im_start|> user / a q :"
    )
    assert stop_ids(tokenizer) == (2, 4)


def test_stops_are_the_end_of_sequence_alone_without_a_usable_template() -> None:
    assert [stop_ids(make(template, "</s>")) for template in (None, "{{ oops(", INST)] == [(2,)] * 3


def test_a_long_chat_loses_the_end_of_its_context() -> None:
    tokenizer = make()
    example = example_of({"instruction": "q", "context": "a b c d e", "response": "x"})
    complete = tokenise([example], tokenizer, 100).rows[0]
    assert (
        words(tokenizer, complete.prompt) == "<|im_start|> user / q / / a b c d e <|im_end|> / <|im_start|> assistant /"
    )
    cut = tokenise([example], tokenizer, len(complete.prompt) + len(complete.answer) - 2)
    assert words(tokenizer, cut.rows[0].prompt) == words(tokenizer, complete.prompt).replace(" d e", "")
    assert cut.cut == 1


def test_nothing_is_reported_as_changed_where_the_tokenizer_keeps_all_words() -> None:
    tokenised = tokenise([example_of(messages("q", "x")), example_of(messages("Q", "x"))], make(), 100)
    assert tokenised.changed == 1


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"instruction": "q", "context": "", "response": "x"}, "q"),
        ({"prompt": "q", "completion": "x"}, "q"),
        ({"prompt": "b", "messages": messages("q", "x")["messages"]}, "q"),
        ({"premise": "a", "hypothesis": "b", "label": 0}, "Premise: a\nHypothesis: b"),
    ],
)
def test_chat_selects_by_columns(columns: dict[str, Any], text: str) -> None:
    example = example_of(columns)
    assert example.turns == ()
    assert example.prompt.startswith(text)


def test_chat_knows_classification_with_and_without_names() -> None:
    for column in ("label", "label_text"):
        chosen = choose("chat", {}, ["text", column], "f")
        assert (chosen.chat, chosen.options_from) == (True, column)
    assert choose("chat", {}, ["instruction", "response", "context"], "f") == CHAT_INSTRUCTION
    assert choose("auto", {}, ["prompt", "completion"], "f").chat is False


def test_a_rows_own_system_message_comes_before_the_templates() -> None:
    own = TemplateSettings(prompt="{prompt}", answer="{completion}", chat=True, system="be brief")
    with_own = example_of(messages("a", "q", "x", first="system"), "own", own=own)
    assert with_own.turns == (("system", "a"),)
    assert example_of(messages("q", "x"), "own", own=own).turns == (("system", "be brief"),)
    assert example_of(messages("a", "q", "x", first="system")).conversation == "system: a\nq"


def test_settings_and_rows_that_are_no_chat() -> None:
    with pytest.raises(ConfigError, match="system = 'a': it requires chat = true"):
        TemplateSettings(prompt="{q}", answer="{a}", system="a")
    with pytest.raises(
        DataError, match="row 1: in a chat, the turn before the answer must be the user's, and it is the s"
    ):
        example_of({"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "x"}]})


PLAIN, SYSTEM = example_of(messages("q secret", "x")), example_of(messages("a", "q", "x", first="system"))


@pytest.mark.parametrize(
    ("template", "example", "error"),
    [
        (None, PLAIN, "has no chat template; use a base with one"),
        ("{% for %}", PLAIN, "cannot be rendered for turns of user.* .Expected an expression"),
        ("{{ 1 / 0 }}", PLAIN, "cannot be rendered for turns of user, assistant .division by zero"),
        (NO_SYSTEM, SYSTEM, "refuses a system message; remove `system`"),
        (
            "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}" + CHATML,
            PLAIN,
            "differently when the answer",
        ),
        ("{{ 'a' if add_generation_prompt else 'b' }}" + CHATML, PLAIN, "differently when the answer"),
        ("{% for message in messages %}{{ message.role }}{% endfor %}", PLAIN, "differently when the answer"),
        (
            "{% if 'secret' in messages[0].content %}{{ raise_exception(messages[0].content) }}{% endif %}" + CHATML,
            PLAIN,
            "cannot be rendered for some texts of the data",
        ),
    ],
)
def test_templates_that_cannot_be_used(template: str | None, example: Example, error: str) -> None:
    with pytest.raises(BaseModelError, match=error) as caught:
        tokenise([example], make(template), 100)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_system_messages_takes_others() -> None:
    assert len(tokenise([PLAIN], make(NO_SYSTEM), 100).rows) == 1


def test_a_date_is_fixed_or_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}"
    assert chat_template(make(dated + CHATML)).frame([("user", "q")]).prompt.startswith(DATE)
    with caplog.at_level(logging.WARNING):
        assert not caplog.records
        chat_template(make("{{ strftime_now('%d') }}" + CHATML))
    assert "writes today's date" in caplog.text
