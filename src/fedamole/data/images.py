"""The image of a row: where it is in the data, and its place among the tokens of a prompt."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedamole.data.examples import Example, RowImage
from fedamole.errors import ConfigError, DataError
from fedamole.received.images import read_image_file

if TYPE_CHECKING:  # takes seconds to import, and the tokenizer comes from the caller
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


class Picture(Protocol):
    """A preprocessed image (`model/media.py`)."""

    @property
    def ids(self) -> Ids:
        """The tokens that replace the placeholder in a prompt."""


class ImageReader(Protocol):
    """What preprocesses images for a base (`model/vision.py`); a base that is loaded for images adds it to its
    tokenizer."""

    token: str
    token_id: int

    def read(self, content: bytes, where: str) -> Picture:
        """Preprocess the content of an image file; DataError, which begins with `where`, if it is no image."""

    def expand(self, prompt: Ids, picture: Any) -> Ids:
        """Replace the one placeholder of a prompt; the result carries the preprocessed image."""


def image_of(value: Any, column: str, where: str, folder: Path | None) -> RowImage:
    """Return the image of a row from the value of its column.

    The value is a path relative to `folder`, or bytes, or an object with `bytes` or `path`, as the library `datasets`
    stores images. The image is not decoded yet. Raises DataError, which begins with `where`, if there is no image, if
    it cannot be read, and for a path if `folder` is None.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not value or not isinstance(value, str | bytes):
        raise DataError(
            f"{where}: column {column!r} contains no image; write the path of one, relative to the data file, or "
            "remove the row"
        )
    if isinstance(value, str):
        if folder is None:
            raise DataError(
                f"{where}: column {column!r} contains the path of an image, but only rows of a file may; use a data "
                "set that contains the images themselves, as `push_to_hub` of the library datasets writes it"
            )
        value = read_image_file(folder, value, where)
    return RowImage(value, hashlib.sha256(value).hexdigest(), where)


def image_reader(tokenizer: "PreTrainedTokenizerBase") -> ImageReader:
    """Return the image reader of a base's tokenizer; ConfigError if the base was not loaded for images."""
    reader: ImageReader | None = getattr(tokenizer, "image_reader", None)
    if reader is None:
        raise ConfigError("a template has `image`, but the base was loaded without images: set base.images = true")
    return reader


def picture_of(example: Example, body: Ids, tokenizer: "PreTrainedTokenizerBase") -> Picture | None:
    """Return the preprocessed image of an example with the prompt ids `body`, or None without one.

    Raises DataError if the image cannot be decoded, or if the number of placeholders in the prompt is not that of
    images.
    """
    if example.image is None:
        reader = getattr(tokenizer, "image_reader", None)
        if reader is not None and reader.token_id in body:
            raise DataError(
                f"a prompt contains the placeholder {reader.token!r}, but its row has no image; set `image` in its "
                "template, or remove the placeholder"
            )
        return None
    reader = image_reader(tokenizer)
    if (count := body.count(reader.token_id)) != 1:
        raise DataError(
            f"{example.image.where}: the prompt has {count} placeholders {reader.token!r} and one image; write the "
            "placeholder once in the prompt of the template"
        )
    return reader.read(example.image.content, example.image.where)
