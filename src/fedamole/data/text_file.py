"""Open UTF-8 text files, optionally with a byte order mark or compressed with gzip."""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from fedamole.errors import DataError

REMEDY = "save it as UTF-8 (in spreadsheets: 'CSV UTF-8')"


@contextmanager
def open_text(path: Path, where: str, gzipped: bool) -> Iterator[IO[str]]:
    """Open a file as UTF-8 text, without newline translation.

    Raises DataError, which begins with `where`, on opening and on reading: for another encoding, a damaged gzip file,
    and errors of the operating system.
    """
    try:
        with _open_bytes(path, gzipped) as raw:
            head = raw.read(2)
        # In UTF-16 every second byte of ASCII text is zero, so this detects files without a byte order mark as well.
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
        raise DataError(
            f"{where}: cannot be read: it is not a gzip file, or it is damaged; compress it again"
        ) from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror or type(error).__name__}") from error


def _open_bytes(path: Path, gzipped: bool) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if gzipped else path.open("rb")


def _first_bad_line(path: Path, gzipped: bool) -> int:
    """Return the number of the first line that is not UTF-8; the decoder's error lacks it."""
    number = 0
    with _open_bytes(path, gzipped) as file:
        for number, line in enumerate(file, start=1):  # noqa: B007
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                break
    return number
