"""Text files of rows: UTF-8, with or without a byte order mark, gzip or not; anything else is one clear error."""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from fedamole.errors import DataError

REMEDY = "save it as UTF-8 (a spreadsheet calls this 'CSV UTF-8')"


@contextmanager
def open_text(path: Path, where: str, gzipped: bool) -> Iterator[IO[str]]:
    """Open a file as UTF-8 text; every line end stays as it is.

    Raises DataError, beginning with `where`, for a file in another encoding, a damaged gzip file, and a file that
    the system does not let us read, also while the file is read.
    """
    try:
        with _open_bytes(path, gzipped) as raw:
            head = raw.read(2)
        # ASCII text in UTF-16 has a zero in every second byte, so this finds files without a mark as well.
        if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in head:
            raise DataError(f"{where}: cannot be read as UTF-8 text: it is UTF-16 or UTF-32; {REMEDY}")
        opener = gzip.open if gzipped else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield cast(IO[str], file)
    except UnicodeDecodeError as error:
        line = _first_bad_line(path, gzipped)
        raise DataError(
            f"{where}, line {line}: cannot be read as UTF-8 text: it has another encoding, such as Latin-1; {REMEDY}"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{where}: cannot be read: it is no gzip file, or a damaged one; compress it anew") from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror or type(error).__name__}") from error


def _open_bytes(path: Path, gzipped: bool) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if gzipped else path.open("rb")


def _first_bad_line(path: Path, gzipped: bool) -> int:
    """Number of the first line that is not UTF-8; lines are decoded in blocks, so the error does not know it."""
    number = 0
    with _open_bytes(path, gzipped) as file:
        for number, line in enumerate(file, start=1):  # noqa: B007
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                break
    return number
