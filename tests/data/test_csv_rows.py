"""CSV files: every value is text, and errors give the line."""

import csv
import gzip
import io
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from fedamole.data.settings import SourceSettings
from fedamole.data.sources import Table, read_source
from fedamole.errors import DataError

SECRET = "zebra-4711"
ROWS = ({"text": "q, 0", "label": "007"}, {"text": "2024-03-01", "label": "NA"})
PLAIN = 'text,label\n"q, 0",007\n2024-03-01,NA\n'


def read(folder: Path, content: str | bytes, name: str = "d.csv") -> Table:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    return read_source(SourceSettings("s", path=name), folder)[0]


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        "\ufeff" + PLAIN,
        "\n\r\n" + PLAIN,
        ",,,\n" + PLAIN,
        "\ufeff\n" + PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        PLAIN.replace("\n", "\n\n"),
        PLAIN + "  \n",
        ',text,label\n0,"q, 0",007\n1,2024-03-01,NA\n',
        'text,label,,\n"q, 0",007,,\n2024-03-01,NA,, \n',
        "text;label\nq, 0;007\n2024-03-01;NA\n",
        'text\tlabel\n"q, 0"\t007\n2024-03-01\tNA',
    ],
    ids=[
        "plain",
        "mark",
        "empty lines first",
        "a line of commas first",
        "mark and empty line",
        "CRLF",
        "CR",
        "empty lines between",
        "a blank line at the end",
        "an index",
        "empty columns",
        "semicolons",
        "tabs",
    ],
)
@pytest.mark.parametrize("name", ["d.csv", "d.csv.gz"])
def test_ordinary_files(tmp_path: Path, content: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert read(tmp_path, content, name).rows == ROWS
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_first_row_of_any_length(tmp_path: Path) -> None:
    limit = 131_072
    csv.field_size_limit(limit)
    long = "word " * 60_000
    assert read(tmp_path, f"text,label\n{long},a\nx,b\n").rows[0] == {"text": long, "label": "a"}
    assert read(tmp_path, f'text,label\n"{long}\n",a\nx,b\n').rows[0]["text"] == long + "\n"
    assert csv.field_size_limit() == limit, "the setting of the process must be put back"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"a,b\nx,y\n{SECRET}\n", "line 3: the row has 1 fields and the header has 2; .*contains a comma in double"),
        (f"\na,b\nx,y\n\n{SECRET},y,z\n", "line 5: the row has 3 fields"),
        (f'a,b\n"{SECRET}\n\n",y,z\n', "line 2: .*extends to line 4, so look for a stray quote"),
        (f"a;b\nx;y\n{SECRET}\n", "line 3: the row has 1 fields .*contains a semicolon"),
        (f'a,b\nx,y\n"{SECRET},y\nx,y\n', "line 3: a field of this row begins with a quote that is not closed"),
        (f'a,b\nx,y\n"{SECRET}" said,y\n', "line 3: text follows the closing quote of a field"),
        (f'a,b\nx,y\n"she said \\"{SECRET}\\"",y\n', "line 3: text follows the closing quote of a field"),
        (f"a,,b\nx,{SECRET},y\n", "column 2 has values but no name"),
        (f"a,b,a\n{SECRET},y,z\n", "the header has the column 'a' twice"),
        (f"a,b\nx,y\n{SECRET} é,z\n".encode("latin-1"), "line 3: cannot be read as UTF-8 text: it has another encod"),
        (f"a,b\nx,{SECRET}\n".encode("utf-16"), "cannot be read as UTF-8 text: it is UTF-16 or UTF-32; save it as UT"),
        ("a,b\n\n", "the file is empty, there are no rows"),
        ("\n\n", "the file is empty, there are no rows"),
    ],
)
def test_errors_name_the_line_and_never_the_content(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"source 's', d.csv(, |: ){message}") as error:
        read(tmp_path, content)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("swallowing", "warning"),
    [
        ('"{0},a\nr 2,b\nr 3,a\nr 4",b\n', "9 lines were read as 5 rows; 1 of the rows look .* lines 4 to 7"),
        ('"{0},a\nr 2",b\n', "7 lines were read as 5 rows; 1 of the rows look .* lines 4 to 5"),
        ('x,"{0}\nr 2,b\nr 3,"\n', "8 lines were read as 5 rows; 1 of the rows look .* lines 4 to 6"),
    ],
)
def test_rows_that_a_stray_quote_joins_are_counted(
    tmp_path: Path, swallowing: str, warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = "text,label\nx,a\ny,b\n" + swallowing.format(SECRET) + "v,a\nw,b\n"
    assert len(read(tmp_path, content).rows) == 5
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert re.search(f"source 's', d.csv: {warning}", record.getMessage()), record.getMessage()
    assert SECRET not in record.getMessage()


def test_text_of_several_lines_is_no_reason_to_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    letters = ["Dear Sir,\nthank you, indeed.", "a\r\nb\r\n\r\nc", "One, two,\nthree, four,\nfive", "x\ny"]
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["text", "label"], *([letter, "a"] for letter in letters)])
    assert [row["text"] for row in read(tmp_path, out.getvalue()).rows] == letters
    assert not caplog.records


REAL = {
    "a letter and an address": (
        'id,text,label\n1,"Dear Sir,\nthank you, and best wishes,\nAnn",a\n2,"Main St 5,\n10115 Berlin",b\n',
        ["Dear Sir,\nthank you, and best wishes,\nAnn", "Main St 5,\n10115 Berlin"],
    ),
    "lists with as many commas as a row": (
        'id,text,label\n1,"To buy:\napples,pears,plums\nmilk,bread,eggs",a\n2,"1,2,3\n4,5,6",b\n',
        ["To buy:\napples,pears,plums\nmilk,bread,eggs", "1,2,3\n4,5,6"],
    ),
    "inches": ('id,text,label\n1,5" disk,a\n2,3.5" floppy and 8",b\n', ['5" disk', '3.5" floppy and 8"']),
    "apostrophes": ("id,text,label\n1,don't,a\n2,'it' is theirs',b\n", ["don't", "'it' is theirs'"]),
    "doubled quotes": (
        'id,text,label\n1,"She said ""no"", then left",a\n2,"""x""",b\n3,"a 5"" disk,\nor ""two""",b\n',
        ['She said "no", then left', '"x"', 'a 5" disk,\nor "two"'],
    ),
}
"""Contents of CSV files, and the texts in them."""


@pytest.mark.parametrize("name", REAL)
def test_quotes_that_are_right_are_no_reason_to_warn(name: str, tmp_path: Path, caplog: Any) -> None:
    content, texts = REAL[name]
    assert [row["text"] for row in read(tmp_path, content).rows] == texts
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("content", "warning"),
    [
        ('id,text,label\n1,x,a\n2,"oops,b\n3,y,a\n4,z,b\n5,he said ""hi"",a\n6,end",b\n', "lines 3 to 7"),
        ('text,label\nx,"a\ny,b\nz,a"\nv,b\n', "lines 2 to 4"),
        ('id,text,label\n1,"5, or 6" long,b\n2,y,a\n', "line 2: text follows the closing quote"),
        ('id,text,label\n1,x,a\n2,"oops,b\n3,y,a\n4,"yes, really",b\n', "line 3: text follows the closing quote"),
        ('id,text,label\n1,x,a\n2,"oops,b\n3,y,a\n', "line 3: .* a quote that is not closed"),
    ],
)
def test_a_stray_quote_is_reported_with_its_line(content: str, warning: str, tmp_path: Path, caplog: Any) -> None:
    """A warning if rows were joined, an error if the file cannot be read."""
    try:
        read(tmp_path, content)
        message = " ".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    except DataError as error:
        message = str(error)
    assert re.search(warning, message), message


def test_a_header_alone_decides_the_delimiter(tmp_path: Path) -> None:
    assert read(tmp_path, "text,label\na;b;c,x\n").rows == ({"text": "a;b;c", "label": "x"},)
    assert read(tmp_path, '"text;label"\na\n').rows == ({"text;label": "a"},)
    assert read(tmp_path, 'text\n""\nx\n').rows == ({"text": ""}, {"text": "x"})
