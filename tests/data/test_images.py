"""Images of rows: where they are read from, what is refused, and their place among the tokens of a prompt."""

import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fedamole.data.examples import Example, Literals, RowImage
from fedamole.data.images import image_of
from fedamole.data.manifest import load_federation
from fedamole.data.settings import DataSettings, SourceSettings
from fedamole.data.templates import TemplateSettings
from fedamole.data.tokens import TokenRow, tokenise
from fedamole.errors import BaseModelError, ConfigError, DataError
from fedamole.model.base import Base, BaseSettings, load_base
from fedamole.model.media import ImageIds
from fedamole.received import images
from fedamole.received.images import checked_image

TEMPLATE = TemplateSettings("{question}\n", "{answer}", image="{picture}")


def png(colour: str = "red", size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty rows in data/rows.jsonl with images in data/pictures/, and an image beside the folder."""
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    rows = []
    for i in range(30):
        (tmp_path / "data" / "pictures" / f"{i}.png").write_bytes(png(size=(8, 8 + i)))
        rows.append({"picture": f"pictures/{i}.png", "question": "What is it?", "answer": ("red", "blue")[i % 2]})
    write(tmp_path, rows)
    (tmp_path / "outside.png").write_bytes(png())
    return tmp_path / "data"


def write(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(path: str = "rows.jsonl") -> DataSettings:
    return DataSettings(
        (SourceSettings("a", path=path, template="seen"),), min_examples=1, templates={"seen": TEMPLATE}
    )


def load(folder: Path, manifest: Any = None) -> Any:
    return load_federation(settings(), folder, manifest)


def with_picture(folder: Path, picture: Any) -> None:
    """Set the picture of row 3."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows[2]["picture"] = picture
    write(folder.parent, rows)


def test_rows_with_the_same_question_and_other_images_are_no_duplicates(folder: Path) -> None:
    """All questions are equal, and there are two answers: without images these would be two distinct rows."""
    (shard,) = load(folder).shards
    examples = [example for split in (shard.train, shard.embedding, shard.validation, shard.test) for example in split]
    assert len({example.identity for example in examples}) == 30
    assert len({example.image.sha256 for example in examples}) == 30


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("../outside.png", "is outside the folder of the data file"),
        ("pictures/../../outside.png", "is outside the folder"),
        ("/etc/hostname", "is outside the folder"),
        ("linked.png", "is outside the folder"),
        ("pictures/none.png", "there is no image file 'pictures/none.png'"),
        ("pictures", "there is no image file"),
        ("a\0b", "is not the path of a file"),
        (None, "column 'picture' contains no image"),
        ("", "contains no image"),
        (7, "contains no image"),
        ({"path": "../outside.png"}, "is outside the folder"),
        ({"bytes": None, "path": None}, "contains no image"),
    ],
)
def test_an_image_that_may_not_or_cannot_be_read(folder: Path, picture: Any, message: str) -> None:
    (folder / "linked.png").symlink_to(folder.parent / "outside.png")
    with_picture(folder, picture)
    with pytest.raises(DataError, match=r"rows\.jsonl, row 3: ") as caught:
        load(folder)
    assert message in str(caught.value)


def test_a_large_file_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MOST_BYTES", len(png()) + 20)
    (folder / "pictures" / "2.png").write_bytes(png() + bytes(21))
    with pytest.raises(DataError, match="row 3: the image is too large"):
        load(folder)


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 10,000 x 10,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "cannot be read"),
        (b"", "cannot be read"),
        (png()[:-30], "cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "cannot be read"),
        (bomb(), "too large"),
    ],
    ids=("text", "empty", "cut", "postscript", "bomb"),
)
def test_content_that_is_no_image(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"^f, row 1: the image .*{message}"):
        checked_image(content, "f, row 1")


def test_an_image_is_turned_upright_and_to_rgb() -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("L", (8, 4)).save(file, "JPEG", exif=exif)
    image = checked_image(file.getvalue(), "f")
    assert (image.mode, image.size) == ("RGB", (4, 8))


def test_images_in_a_parquet_file(tmp_path: Path) -> None:
    import datasets

    table: dict[str, Any] = {"picture": [{"bytes": png(size=(8, 8 + i)), "path": None} for i in range(30)]}
    table |= {"question": ["What?"] * 30, "answer": ["red", "blue"] * 15}
    datasets.Dataset.from_dict(table).cast_column("picture", datasets.Image()).to_parquet(tmp_path / "rows.parquet")
    (shard,) = load_federation(settings("rows.parquet"), tmp_path).shards
    assert shard.train[0].image is not None
    assert checked_image(shard.train[0].image.content, "f").width == 8


def test_a_hub_data_set_names_no_files() -> None:
    with pytest.raises(DataError, match="contains the path of an image, but only rows of a file may"):
        image_of({"bytes": None, "path": "/etc/x.png"}, "picture", "h, row 1", None)


def test_another_image_in_the_same_file_is_noticed(folder: Path) -> None:
    manifest = load(folder).manifest
    assert load(folder, manifest).manifest == manifest
    row = manifest.clients[0].train.rows[0]
    (folder / "pictures" / f"{row}.png").write_bytes(png("blue", (8, 8 + row)))
    with pytest.raises(DataError, match=r"split 'train': .* an image, the template, .* changed"):
        load(folder, manifest)


@pytest.mark.parametrize("text", ["picture", "a {picture}", "{picture}{question}", "{picture}.png", ""])
def test_the_setting_is_one_column(text: str) -> None:
    with pytest.raises(ConfigError, match=r"image = .*: it must be one column, written as"):
        replace(TEMPLATE, image=text)


# --- tokens ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(image_task: Path) -> Base:
    settings_ = BaseSettings(str(image_task / "base"), images=True)
    return load_base(settings_, torch.device("cpu"), Path("/"))


def example(text: str = "What?\n", before: str = "", context: str = "", **fields: Any) -> Example:
    literals = Literals(((0, len(before)),) if before else ())
    row_image = RowImage(png(), "0" * 64, "f, row 1")
    return Example(before + text, context, "", "red", literals=literals, **{"image": row_image, **fields})


def row_of(base: Base, made: Example, max_length: int = 64) -> TokenRow:
    (row,) = tokenise([made], base.tokenizer, max_length).rows
    return row


def test_the_placeholder_becomes_as_many_tokens_as_the_processor_makes(base: Base) -> None:
    """32 x 32 pixels in patches of 8 x 8 are 16 tokens; the processor itself gives the same ids."""
    assert base.images is not None
    own = base.images.processor(text=["<image>What?\n"], images=[Image.new("RGB", (8, 8), "red")], return_tensors="pt")
    prompt = row_of(base, example()).prompt
    assert isinstance(prompt, ImageIds)
    assert prompt.count(base.images.token_id) == 16
    assert list(prompt) == own["input_ids"][0].tolist()
    assert torch.equal(prompt.picture.media["pixel_values"], own["pixel_values"])
    assert tokenise([example()], base.tokenizer, 64).changed == 0


def test_the_image_stands_where_the_template_writes_the_placeholder(base: Base) -> None:
    assert base.images is not None
    prompt = row_of(base, example(before="See <image> here. ")).prompt
    first = prompt.index(base.images.token_id)
    assert base.tokenizer.decode(prompt[:first]) == "See "
    assert prompt.count(base.images.token_id) == 16


def test_a_placeholder_in_the_data_is_text(base: Base) -> None:
    assert base.images is not None
    prompt = row_of(base, example("<image> What?\n")).prompt
    assert prompt.count(base.images.token_id) == 16
    assert "<image>" in base.tokenizer.decode(prompt[16:])


def test_two_placeholders_or_none_for_an_image(base: Base) -> None:
    with pytest.raises(DataError, match="f, row 1: the prompt has 2 placeholders '<image>' and one image"):
        row_of(base, example(before="<image><image>"))
    with pytest.raises(DataError, match="contains the placeholder '<image>', but its row has no image"):
        row_of(base, example(before="<image>", image=None))


def test_a_damaged_image_names_its_row(base: Base) -> None:
    with pytest.raises(DataError, match=r"^f, row 1: the image cannot be read"):
        row_of(base, example(image=RowImage(png()[:-30], "1" * 64, "f, row 1")))


def test_a_base_that_was_loaded_for_text_names_the_setting(image_task: Path) -> None:
    text_base = load_base(BaseSettings(str(image_task / "base")), torch.device("cpu"), Path("/"))
    assert text_base.images is None
    with pytest.raises(ConfigError, match=r"set base\.images = true"):
        row_of(text_base, example())


def test_a_context_is_cut_beside_the_image(base: Base) -> None:
    """The image takes 16 of 30 tokens, and the context is cut to the rest; a prompt that cannot be cut is dropped."""
    assert base.images is not None
    long = example(context="word " * 40)
    row = row_of(base, long, 30)
    assert len(row.prompt) + len(row.answer) <= 30
    assert row.prompt.count(base.images.token_id) == 16
    assert tokenise([example("word " * 40)], base.tokenizer, 30).dropped == 1
    assert tokenise([long], base.tokenizer, 16).dropped == 1


def test_rows_share_the_tensors_of_an_image(base: Base) -> None:
    first, second = (row_of(base, example(text)).prompt for text in ("What?\n", "Where?\n"))
    assert isinstance(first, ImageIds)
    assert isinstance(second, ImageIds)
    assert first.picture is second.picture


CHAT = (
    "{% for m in messages %}{{ m['role'] }}:"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Like the templates of SmolVLM and LLaVA: it reads lists of parts, and leaves out texts that are no list."""


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("m['content'] + ' '", BaseModelError, "its chat template cannot write an image; write the base's placeholder"),
        ("m['content']", DataError, "the prompt has 0 placeholders '<image>' and one image; write the placeholder"),
    ],
    ids=("fails", "writes the list"),
)
def test_a_chat_template_for_text_alone(image_task: Path, content: str, error: Any, message: str) -> None:
    """The placeholder in the text of the template works with it."""
    base = load_base(BaseSettings(str(image_task / "base"), images=True), torch.device("cpu"), Path("/"))
    base.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' }}{{ CONTENT }}{% if m['role'] == 'assistant' %}<|endoftext|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    ).replace("CONTENT", content)
    with pytest.raises(error, match=message):
        row_of(base, example("What?", turns=()))
    assert base.images is not None
    assert row_of(base, example("What?", "<image>", turns=())).prompt.count(base.images.token_id) == 16


def test_a_chat_template_writes_the_placeholder(image_task: Path) -> None:
    base = load_base(BaseSettings(str(image_task / "base"), images=True), torch.device("cpu"), Path("/"))
    base.tokenizer.chat_template = CHAT
    assert base.images is not None
    prompt = row_of(base, example("What?", turns=(("system", "Be brief."),))).prompt
    text = base.tokenizer.decode([token for token in prompt if token != base.images.token_id])
    assert text == "system:Be brief.user:What?assistant:"
    assert prompt.count(base.images.token_id) == 16
    without = row_of(base, example("What <image>?", turns=(), image=None)).prompt
    assert base.tokenizer.decode(without) == "user:What <image>?assistant:"
    assert base.images.token_id not in without
