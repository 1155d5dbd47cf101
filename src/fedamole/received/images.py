"""Images from outside: read inside a folder, of limited size, and decoded by Pillow (this package's extra `vision`)."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

from fedamole.errors import ConfigError, DataError, how_to_install
from fedamole.received.files import MIB, read_bytes
from fedamole.received.names import quoted

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""Formats that are decoded. Pillow knows many others, whose decoders are used less and tested less."""
MOST_BYTES = 32 * MIB
"""Maximum size of an image in bytes, before decoding."""
MOST_PIXELS = 40_000_000
"""Maximum number of pixels of an image: a small file can hold an image that fills the memory."""


def read_image_file(folder: Path, name: str, where: str) -> bytes:
    """Return the content of an image file; `name` is its path relative to `folder`.

    Raises DataError, which begins with `where`, for a path that leads out of the folder (also through a link), and for
    a file that is missing or larger than MOST_BYTES.
    """
    path, top = folder / name, os.path.realpath(folder)
    try:
        real = os.path.realpath(path)
    except ValueError as error:  # a null character
        raise DataError(f"{where}: {quoted(name)} is not the path of a file; correct it") from error
    if Path(name).is_absolute() or os.path.commonpath([top, real]) != top:
        raise DataError(
            f"{where}: the image {quoted(name)} is outside the folder of the data file; copy it into that folder and "
            "write its path relative to the data file"
        )
    if not os.path.isfile(real):
        raise DataError(
            f"{where}: there is no image file {quoted(name)}; paths are relative to the data file, {quoted(str(top))}"
        )
    if os.path.getsize(real) > MOST_BYTES:
        raise _too_large(where)
    return read_bytes(Path(real), MOST_BYTES, DataError)


def check_pillow() -> None:
    """Raise ConfigError if Pillow is not installed."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"images need Pillow, which is not installed; {how_to_install('vision')}") from error


def checked_image(content: bytes, where: str) -> Any:
    """Return an image as a Pillow image in RGB, upright if its metadata contain a rotation.

    Raises DataError, which begins with `where`, for content that is not an image of FORMATS, is damaged, or has more
    than MOST_PIXELS pixels; ConfigError if Pillow is not installed.
    """
    check_pillow()
    from PIL import Image, ImageOps

    if len(content) > MOST_BYTES:
        raise _too_large(where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise _too_large(where)
                return ImageOps.exif_transpose(image).convert("RGB")
    except DataError:
        raise
    except Exception as error:  # decoders raise errors of many types
        raise DataError(
            f"{where}: the image cannot be read ({type(error).__name__}): it is damaged, or not one of "
            f"{', '.join(FORMATS)}; convert it, or remove the row"
        ) from error


def _too_large(where: str) -> DataError:
    return DataError(
        f"{where}: the image is too large; at most {MOST_BYTES // MIB} MiB and {MOST_PIXELS // 10**6} million pixels "
        "are read; make it smaller"
    )
