from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedamole.data.drawing import draw_clients, open_source
from fedamole.data.settings import DataSettings, PartitionSettings, SourceSettings
from fedamole.data.splits import ClientRows
from fedamole.errors import DataError

Write = Callable[..., str]


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"text {start + i}", "label_text": "abc"[i % 3]} for i in range(count)]


def draw(folder: Path, least: int = 1, seed: int = 0, **source: Any) -> tuple[list[ClientRows], list[str]]:
    source_settings = SourceSettings("s", **{"path": "train.jsonl", **source})
    settings = DataSettings((source_settings,), min_examples=least, partition_seed=seed)
    return draw_clients(settings, open_source(settings, source_settings, folder))


def test_training_rows_that_stand_in_the_official_test_are_dropped(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", rows(60))
    # Rows 0 to 5 of the training file, and one of its texts with a different label, which is a different example.
    write("test.jsonl", [*rows(6), {"text": "text 6", "label_text": "b"}])
    (client,), notes = draw(tmp_path, test="test.jsonl")
    assert client.test == tuple(range(7))
    assert client.test_table == "test"
    used = {*client.train, *client.embedding, *client.validation}
    assert used == set(range(6, 60))
    assert notes == ["source 's': 6 training rows that equal an official test row were dropped"]


def test_the_limit_is_a_seeded_draw_of_training_rows(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", rows(100))

    def used(seed: int) -> list[int]:
        (client,), _ = draw(tmp_path, seed=seed, limit=40)
        return sorted(client.train + client.embedding + client.validation + client.test)

    assert len(used(0)) == 40
    assert used(0) == used(0)
    assert used(0) != used(1)
    assert used(0) != list(range(40))


def test_rows_without_an_answer_are_left_out_and_noted(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", [*rows(30), {"text": "x", "label_text": ""}, {"text": "y", "label_text": None}])
    (client,), notes = draw(tmp_path)
    assert max(client.train + client.embedding + client.validation + client.test) < 30
    assert notes == ["train.jsonl: 2 rows without an answer were left out"]


def test_clients_by_value_share_options_and_unread_test_values_are_noted(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", [row for row in rows(90) if row["label_text"] != "c"])
    write("test.jsonl", rows(9, start=1000))
    clients, notes = draw(tmp_path, test="test.jsonl", partition=PartitionSettings("value", by="label_text"))
    assert [(client.client, client.test) for client in clients] == [("s-a", (0, 3, 6)), ("s-b", (1, 4, 7))]
    assert notes == ["source 's': 3 official test rows are not used: no client trains on their 'label_text'"]
    source_settings = SourceSettings("s", path="train.jsonl", test="test.jsonl")
    assert open_source(DataSettings((source_settings,)), source_settings, tmp_path).options == ("a", "b", "c")


def test_rows_of_classes_that_no_client_was_given_are_noted(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", rows(90))
    settings = PartitionSettings("classes", by="label_text", clients=1, classes_per_client=2)
    _, notes = draw(tmp_path, partition=settings)
    assert notes == ["source 's': 30 rows are not used: no client has their value of 'label_text'"]


def test_dirichlet_is_redrawn_until_the_training_splits_suffice(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", rows(300))
    settings = PartitionSettings("dirichlet", by="label_text", alpha=0.5, clients=4)
    clients, _ = draw(tmp_path, least=35, partition=settings)
    assert min(len(client.train) for client in clients) >= 35
    with pytest.raises(DataError, match="none of 100 Dirichlet"):
        draw(tmp_path, least=80, partition=settings)


def test_an_empty_client_is_named(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", [*rows(60), {"text": "alone", "label_text": "d"}])
    with pytest.raises(DataError, match="client 's-d' has an empty split: train 0"):
        draw(tmp_path, partition=PartitionSettings("value", by="label_text"))


def test_values_that_differ_by_white_space_are_one_client(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = {0: "north", 1: "south", 2: "north "}
    write("train.jsonl", [{**row, "site": site[at % 3]} for at, row in enumerate(rows(90))])
    clients, _ = draw(tmp_path, partition=PartitionSettings("value", by="site"))
    assert sorted(client.client for client in clients) == ["s-north", "s-south"]
    assert "train.jsonl: 30 values of 'site' have white space around them" in caplog.text


def test_white_space_around_a_value_of_the_test_file_alone(write: Write, tmp_path: Path) -> None:
    """White space is removed from values of both files, so that test rows go to the client with the same value."""
    write("train.jsonl", [{**row, "site": "ns"[at % 2]} for at, row in enumerate(rows(60))])
    write("test.jsonl", [{**row, "site": "ns"[at % 2] + " "} for at, row in enumerate(rows(20, start=100))])
    clients, _ = draw(tmp_path, test="test.jsonl", partition=PartitionSettings("value", by="site"))
    assert [(client.client, len(client.test)) for client in clients] == [("s-n", 10), ("s-s", 10)]


def test_the_column_to_partition_by_must_be_there_and_filled(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", [{**row, "site": "n" if index else None} for index, row in enumerate(rows(30))])
    with pytest.raises(DataError, match=r"train.jsonl: there is no column 'sites' \(did you mean 'site'\?\)"):
        draw(tmp_path, partition=PartitionSettings("value", by="sites"))
    with pytest.raises(DataError, match=r"train.jsonl, row 1: column 'site' has no value, but the partition needs it"):
        draw(tmp_path, partition=PartitionSettings("value", by="site"))


def test_the_test_file_must_have_the_templates_columns(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", rows(30))
    write("test.jsonl", [{"text": "t", "label": "a"}])
    with pytest.raises(DataError, match=r"test.jsonl: there is no column 'label_text' \(did you mean 'label'\?\)"):
        draw(tmp_path, test="test.jsonl")


def test_dirichlet_names_identical_rows_as_the_cause(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", [*rows(12), *({"text": "same", "label_text": "a"} for _ in range(60))])
    settings = PartitionSettings("dirichlet", by="label_text", alpha=100.0, clients=3)
    with pytest.raises(DataError, match="Only 13 of the 72 rows are different"):
        draw(tmp_path, least=15, partition=settings)
    write("train.jsonl", rows(72))
    with pytest.raises(DataError, match="none of 100 Dirichlet") as caught:
        draw(tmp_path, least=30, partition=settings)
    assert "are different" not in str(caught.value)


def test_rows_that_were_left_out_are_named_where_too_few_are_left(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", rows(60))
    write("test.jsonl", rows(57))
    left_out = "57 training rows that equal an official test row were dropped"
    with pytest.raises(DataError, match=f"data.min_examples = 10: .*; source 's': {left_out}; lower min_examples"):
        draw(tmp_path, least=10, test="test.jsonl")
    with pytest.raises(DataError, match="source 's': no rows are left to train on; source 's': 60 training rows"):
        draw(tmp_path, test="train.jsonl", partition=PartitionSettings("iid", clients=2))


@pytest.mark.parametrize("how", [{"template": "messages"}, {"columns": {"prompt": ""}}])
def test_messages_beside_prompt(write: Write, tmp_path: Path, how: dict[str, Any]) -> None:
    """A common format on the Hub: the first turn's prompt is a column beside the conversation."""
    turns = [[{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}"}] for i in range(30)]
    write("train.jsonl", [{"prompt": f"q {i}", "prompt_id": str(i), "messages": turn} for i, turn in enumerate(turns)])
    with pytest.raises(DataError, match=r'train.jsonl: .* template = "messages" .* columns = \{prompt = ""\}'):
        draw(tmp_path)
    source_settings = SourceSettings("s", path="train.jsonl", **how)
    example = open_source(DataSettings((source_settings,)), source_settings, tmp_path).example("train", 3)
    assert example is not None
    assert (example.prompt, example.answer) == ("### User:\nq 3\n\n### Assistant:\n", "a 3")
