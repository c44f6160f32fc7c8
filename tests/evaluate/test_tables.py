"""Tables between tabs: the words that pandas takes for missing, the types it finds, and pictures that stay in the file."""

import base64
from pathlib import Path

import pytest

from fastllava.errors import UserError
from fastllava.evaluate.tables import MISSING, read_table

HEADER = "index\tA\tB\timage"


def _table(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "table.tsv"
    path.write_bytes("\n".join((HEADER, *lines, "")).encode())
    return path


def test_words_that_are_missing(tmp_path: Path) -> None:
    """All 19 of pandas 2, quoted too, and none that only looks like one."""
    words = [*MISSING, *(f'"{word}"' for word in MISSING)]
    table = read_table(_table(tmp_path, *(f"1\t{word}\tx" for word in words)))
    assert table.column("A") == [None] * 38
    near = ["none", "NONE", "Nan", "na", "Null", " NA", "NA ", "-", "0"]
    assert read_table(_table(tmp_path, *(f"1\t{word}\tx" for word in near))).column("A") == near


@pytest.mark.parametrize(
    ("cells", "column"),
    [
        (["1", "02", " -3 "], [1, 2, -3]),
        (["1", "NA", "3"], [1.0, None, 3.0]),
        (["1", "1.5", "2e3"], [1.0, 1.5, 2000.0]),
        (["True", "false", ""], [True, False, None]),
        (["1", "red"], ["1", "red"]),
        (["1_000", "2"], ["1_000", "2"]),
        (["", "NA"], [None, None]),
    ],
)
def test_types_of_a_column(tmp_path: Path, cells: list[str], column: list) -> None:
    """Every cell must be of the type, and integers with a missing one among them are floats."""
    found = read_table(_table(tmp_path, *(f"1\t{cell}\tx" for cell in cells))).column("A")
    assert found == column
    assert [type(cell) for cell in found] == [type(cell) for cell in column]


def test_quotes_breaks_and_short_rows(tmp_path: Path) -> None:
    """Quoted cells hold tabs, line breaks and quotes; a quote within a cell is one; empty lines are none; short rows lack cells."""
    lines = ['1\t"a\tb\nc ""d"""\te "f"\tQQ==', "", "  ", "2\tx"]
    table = read_table(_table(tmp_path, *lines))
    assert [row.cells for row in table.rows] == [{"index": "1", "A": 'a\tb\nc "d"', "B": 'e "f"'}, {"index": "2", "A": "x", "B": ""}]


def test_pictures_are_read_when_they_are_needed(tmp_path: Path) -> None:
    """Also behind a byte order mark, characters of three bytes and line breaks in cells; one that is not there is named."""
    one, two = base64.b64encode(b"first" * 60_000).decode(), base64.b64encode(b"second").decode()
    path = tmp_path / "table.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + f'{HEADER}\r\n1\t"红\r\n色"\tx\t{one}\r\n2\ty\tz\t{two}\r\n3\ty\tz\tNA\r\n4\ty\tz\t!'.encode())
    images = [row.image for row in read_table(path).rows]
    assert all(image is not None for image in images)
    assert images[1] is not None
    assert images[1].read() == b"second"
    assert images[0] is not None
    assert images[0].read() == b"first" * 60_000
    for at in (2, 3):
        image = images[at]
        assert image is not None
        with pytest.raises(UserError, match=f"row {at + 1} has no picture"):
            image.read()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["1\ta\tb\tc\td"], "row 1 has 5 cells for 4 columns"),
        (['1\t"a\tb\tc', "2\ta\tb\tc"], "never closed"),
    ],
)
def test_a_damaged_table(tmp_path: Path, lines: list[str], said: str) -> None:
    """What pandas refuses is refused."""
    with pytest.raises(UserError, match=said):
        read_table(_table(tmp_path, *lines))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, and a folder, are named."""
    path = tmp_path / "table.tsv"
    path.write_bytes(b"index\tA\n1\t\xff\xfe\n")
    with pytest.raises(UserError, match="cannot be read as a table"):
        read_table(path)
    with pytest.raises(UserError, match="cannot be read as a table"):
        read_table(tmp_path)
