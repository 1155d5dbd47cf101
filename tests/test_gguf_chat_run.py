"""One run on a GGUF base with the base's chat template, through every command that uses its models."""

import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from fedamole.config import load_config
from fedamole.data.manifest import load_federation
from fedamole.data.tokens import prompt_ids, tokenise
from fedamole.experiment import start
from fedamole.federation.progress import ProgressListener
from fedamole.model.bank import Bank
from fedamole.personal.chat import Chat
from fedamole.personal.generate import prompt_format_of, render_prompts
from fedamole.personal.saved_models import find_model, load_base_for

from .conftest import small
from .gguf_files import write_gguf
from .serving.served import Served
from .test_cli import refused

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and m.content == 'no' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role + ': ' + m.content + '<end>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
CONFIG = """
[run]
threads = 1
device = "cpu"

[base]
model = "tiny.gguf"

[federation]
rounds = 1

[training]
local_steps = 3
batch_size = 2
learning_rate = 0.01
max_length = 96

[evaluation]
max_new_tokens = 6

[data.templates.mood]
prompt = "{text}"
answer = "{label_text}"
options = ["glad", "sad"]
chat = true
system = "How is it?"

[[data.source]]
name = "mood"
path = "mood.jsonl"
template = "mood"

[[data.source]]
name = "chat"
path = "chat.jsonl"
template = "chat"
"""


@pytest.fixture(scope="module")
def location(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a GGUF base, a config and a finished run, beside a cache of its own."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("mood", "chat"):
        shutil.copy(tiny / f"{name}.jsonl", folder)
    write_gguf(tiny / "base", folder / "tiny.gguf", chat_template=TEMPLATE)
    (folder / "config.toml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(folder / "hf"))
        start(load_config(folder / "config.toml", small("fedamole")), folder / "run", ProgressListener())
        yield folder


def test_the_run_records_the_file_and_its_models_a_folder(location: Path) -> None:
    config = tomllib.loads((location / "run" / "config.toml").read_text())
    assert config["base"]["model"] == str(location / "tiny.gguf")
    adapter = json.loads((location / "run" / "clients" / "chat" / "adapter" / "adapter_config.json").read_text())
    AutoModelForCausalLM.from_pretrained(adapter["base_model_name_or_path"])
    assert set(json.loads((location / "run" / "run.json").read_text())["base"]) == {"weights", "tokenizer", "targets"}


def test_prompts_after_training_are_those_of_training(location: Path) -> None:
    config = load_config(location / "run" / "config.toml")
    shards = {shard.client: shard for shard in load_federation(config.data, location).shards}
    for client, source in (("mood", "mood"), ("chat", "chat")):
        model = find_model(location / "run", client)
        base, prompt_format = load_base_for(model, "cpu"), prompt_format_of(model)
        example = shards[client].test[0]
        (row,) = tokenise([example], base.tokenizer, 96).rows
        assert base.tokenizer.decode(row.prompt).endswith("<end>\nassistant:")
        assert base.tokenizer.decode(row.answer) == f" {example.answer}<end>"
        rows = [json.loads(line) for line in (location / f"{source}.jsonl").read_text().splitlines()]
        rendered = render_prompts(rows, prompt_format, "rows")
        assert row.prompt in [prompt_ids(item, base.tokenizer) for item in rendered]
        assert prompt_ids(prompt_format.prompt(example.prompt), base.tokenizer) == row.prompt
        chat, seen = Chat(Bank(base), 4, prompt_format=prompt_format), list[tuple[int, ...]]()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Chat, "_generate", lambda self, ids, streamer, seen=seen: seen.append(ids))
            chat.answer(example.prompt, lambda _: None)
        assert seen == [row.prompt]


def test_serve_answers_as_generate_does(location: Path, fedamole: Any) -> None:
    question = "day 3: who has a red cup? Dan has."
    result = fedamole("generate", location / "run", "--client", "chat", "--json", question)
    answer = json.loads(result.out)["answer"]
    served = Served(location / "run")
    served.engine.start()
    try:
        client = served.client()

        def ask(*turns: tuple[str, str]) -> str:
            messages: Any = [{"role": role, "content": text} for role, text in turns]
            done = client.chat.completions.create(model="chat", messages=messages, max_tokens=6)
            return str(done.choices[0].message.content)

        assert ask(("user", question)).strip() == answer
        with pytest.raises(
            openai.BadRequestError, match="the base's chat template refuses this conversation; alternate the roles"
        ):
            ask(("system", "no"), ("user", question))
        with pytest.raises(openai.BadRequestError, match="must be the user's, and it is the assistant's"):
            ask(("user", question), ("assistant", "no"))
        row = {"text": "day 4: two pens is good, says Ann"}
        done = client.completions.create(model="mood", prompt="", max_tokens=6, extra_body={"row": row})
        result = fedamole("generate", location / "run", "--client", "mood", "--json", "--set", f"text={row['text']}")
        assert done.choices[0].text.strip() == json.loads(result.out)["answer"]
    finally:
        served.engine.stop()
        served.close()


def test_commands_take_a_gguf_file_as_base(
    location: Path,
    tiny: Path,
    tmp_path: Path,
    fedamole: Any,
) -> None:
    run, gguf = tmp_path / "moved", tmp_path / "copy.gguf"
    shutil.copytree(location / "run", run)
    shutil.copy(location / "tiny.gguf", gguf)
    for name in ("mood", "chat"):
        shutil.copy(tiny / f"{name}.jsonl", tmp_path)
    (tmp_path / "config.toml").write_text(CONFIG)
    refused(fedamole("plan", "config.toml"), 4, "tiny.gguf: No such file or directory; check the path")
    plan = fedamole("plan", "config.toml", "base.model=copy.gguf", *small("fedamole"))
    assert plan.code == 0, plan.err
    # The run is on a machine where its base is elsewhere.
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace(str(location / "tiny.gguf"), "/gone/tiny.gguf"))
    asked = ("--client", "chat", "who?")
    refused(fedamole("generate", run, *asked), 4, "/gone/tiny.gguf", "pass a copy with --base")
    refused(fedamole("resume", run, "--base", "gone.gguf"), 4, "No such file")
    other = tmp_path / "other.gguf"
    write_gguf(tiny / "base", other, quantised=True, chat_template=TEMPLATE)
    refused(fedamole("generate", run, *asked, "--base", other), 4, "weights")
    assert fedamole("generate", run, *asked, "--base", "copy.gguf").code == 0
    joined = fedamole(
        "adapt", run, "--data", "mood.jsonl", "--name", "new", "--template", "chat", "--base", "copy.gguf",
        "--folder", "out", "--steps", "1", "--json",
    )  # fmt: skip
    assert joined.code == 0, joined.err
    new = Path(json.loads(joined.out)["folder"])
    assert tomllib.loads((new / "config.toml").read_text())["base"]["model"] == str(gguf)
    assert fedamole("resume", run, "--base", "copy.gguf").code == 0
    assert json.loads((run / "run.json").read_text())["base_model"] == str(gguf)
    assert fedamole("generate", run, *asked).code == 0
    merged = fedamole("export", run, "--client", "chat", "--to", "merged", "--out", "merged")
    assert merged.code == 0, merged.err


def test_a_base_without_a_chat_template_is_refused(location: Path, tiny: Path, fedamole: Any) -> None:
    result = fedamole("run", location / "config.toml", f"base.model={tiny / 'base'}", "run.folder=x", *small("fedit"))
    refused(result, 4, "has no chat template; use a base with one")
