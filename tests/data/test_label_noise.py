"""Wrong answers on purpose: how many, where, which, and that the rest of a federation stays as it is."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedamole.data.examples import Example, Literals, Shard
from fedamole.data.label_noise import with_label_noise
from fedamole.data.manifest import Manifest, load_federation
from fedamole.data.settings import DataSettings, PartitionSettings, SourceSettings
from fedamole.data.templates import TemplateSettings
from fedamole.errors import ConfigError, DataError

Write = Callable[..., str]
CHOSEN = SourceSettings("chosen", path="chosen.jsonl", partition=PartitionSettings("iid", clients=2), label_noise=0.4)
FREE = SourceSettings("free", path="free.jsonl", label_noise=0.4)
SETTINGS = DataSettings((CHOSEN, FREE), embedding_share=0.25)
OFF = replace(SETTINGS, source=(replace(CHOSEN, label_noise=0.0), replace(FREE, label_noise=0.0)))


@pytest.fixture
def folder(write: Write, tmp_path: Path) -> Path:
    write("chosen.jsonl", [{"text": f"text {index}", "label_text": "xyz"[index % 3]} for index in range(160)])
    write("free.jsonl", [{"prompt": f"ask {index}", "completion": f"say {index % 40}"} for index in range(90)])
    return tmp_path


def wrong(noisy: tuple[Example, ...], clean: tuple[Example, ...]) -> list[tuple[Example, Example]]:
    """The pairs of a noisy and a clean example whose answers differ."""
    assert len(noisy) == len(clean)
    return [pair for pair in zip(noisy, clean, strict=True) if pair[0].answer != pair[1].answer]


def test_the_share_of_the_training_and_embedding_answers_is_wrong_and_nothing_else(folder: Path) -> None:
    pairs = list(zip(load_federation(SETTINGS, folder).shards, load_federation(OFF, folder).shards, strict=True))
    assert len(pairs) == 3
    for noisy, clean in pairs:
        assert (noisy.validation, noisy.test) == (clean.validation, clean.test)
        answers = {example.answer for example in (*clean.train, *clean.embedding)}
        for split in ("train", "embedding"):
            examples = getattr(clean, split)
            changed = wrong(getattr(noisy, split), examples)
            assert len(changed) == round(0.4 * len(examples)) > 0
            for new, old in changed:
                assert replace(new, answer=old.answer) == old
                assert new.answer in (old.options or answers)


def test_every_wrong_option_is_equally_likely() -> None:
    examples = tuple(Example(f"p{index}", "", "", "x", ("x", "y", "z")) for index in range(3000))
    noisy = with_label_noise({"train": examples, "embedding": examples[:1]}, 1.0, 0, "a")["train"]
    counts = Counter(example.answer for example in noisy)
    assert set(counts) == {"y", "z"}
    assert abs(counts["y"] - 1500) < 110  # deviation 27


def test_it_depends_on_the_partition_seed_and_the_client_alone(folder: Path) -> None:
    first = load_federation(SETTINGS, folder)
    assert load_federation(SETTINGS, folder).shards == first.shards
    assert load_federation(replace(SETTINGS, source=(FREE,)), folder).shards == first.shards[2:]
    splits = {"train": first.shards[2].train, "embedding": first.shards[2].embedding}
    drawn = [with_label_noise(splits, 0.5, *key)["train"] for key in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[0] != drawn[3]


@pytest.mark.parametrize("own_options", [True, False])
def test_a_wrong_option_is_text_of_the_template_where_the_options_are(own_options: bool) -> None:
    """Special tokens are recognised in the text of a template alone."""
    spans = ((0, 1),) if own_options else ()
    example = Example("p", "", "", "x", ("x", "long"), Literals(((0, 1),), (), spans, own_options))
    (noisy,) = with_label_noise({"train": (example,), "embedding": (example,)}, 1.0, 0, "a")["train"]
    assert noisy.answer == "long"
    assert noisy.literals == Literals(((0, 1),), (), ((0, 4),) if own_options else (), own_options)


def test_a_wrong_free_answer_keeps_the_template_text_of_its_own_example() -> None:
    first = Example("p", "", "", "<a> one", literals=Literals(answer=((0, 3),)))
    second = Example("q", "", "", "two", literals=Literals())
    noisy = with_label_noise({"train": (first, second), "embedding": (first,)}, 1.0, 0, "a")["train"]
    assert [(example.answer, example.literals.answer) for example in noisy] == [("two", ()), ("<a> one", ((0, 3),))]


def test_one_answer_alone_cannot_be_wrong() -> None:
    example = Example("p", "", "", "x")
    with pytest.raises(DataError, match="client 'a': label_noise needs at least two different answers, and it has 1"):
        with_label_noise({"train": (example,), "embedding": (example,)}, 1.0, 0, "a")


def test_a_manifest_gives_the_wrong_answers_again_and_refuses_others(folder: Path) -> None:
    drawn = load_federation(SETTINGS, folder)
    stored = Manifest.from_json(drawn.manifest.to_json(), "m.json")
    assert stored.settings["source"]["chosen"]["label_noise"] == 0.4
    again = load_federation(replace(SETTINGS, partition_seed=5), folder, stored)
    assert again.shards == drawn.shards
    for other in (OFF, replace(SETTINGS, source=(CHOSEN, replace(FREE, label_noise=0.2)))):
        with pytest.raises(DataError, match=r"split 'train': the hash .* or label_noise changed"):
            load_federation(other, folder, stored)


def test_without_noise_a_manifest_is_what_it_was_before_the_key_existed(folder: Path) -> None:
    assert "label_noise" not in load_federation(OFF, folder).manifest.to_json()


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.source\[s\]\.label_noise = .*: must be a fraction between 0 and 1"):
        SourceSettings("s", path="x", label_noise=share)


def test_templates_with_labels_too(write: Write, tmp_path: Path) -> None:
    write("rows.jsonl", [{"text": f"t {index}", "label": index % 2} for index in range(60)])
    template = TemplateSettings(prompt="{text}\n", answer="{label}", labels={"0": "bad", "1": "good"})
    source = SourceSettings("s", path="rows.jsonl", template="mood", label_noise=1.0)
    settings = DataSettings((source,), templates={"mood": template})

    def shard(noise: float) -> Shard:
        given: Any = replace(settings, source=(replace(source, label_noise=noise),))
        return load_federation(given, tmp_path).shards[0]

    assert len(wrong(shard(1.0).train, shard(0.0).train)) == len(shard(0.0).train)
