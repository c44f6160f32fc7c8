"""Reads annotation files as streams of rows: JSON arrays, objects and lines, CSV and Parquet, told apart by what they hold.

Memory stays at a few megabytes. What is wrong with one row is said of that row; a file that is broken as a whole stops the build.
"""

import codecs
import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastllava.console.printable import quoted, shortened
from fastllava.data.checks import BadRecord
from fastllava.data.json_window import Decoder, Window, element
from fastllava.data.records import check_head, open_records, read_lines
from fastllava.errors import UserError

MOST_CHARACTERS = 16 * 2**20
"""A larger row is an accident."""
_PARQUET_ROWS = 1024
_BYTES_BEFORE_TOLD = 2**16

Advance = Callable[[int], None]
"""Gets the number of bytes that have been read since it was called last."""


@dataclass(frozen=True, slots=True)
class Row:
    """One annotation of a file."""

    file: Path
    unit: str
    """What `number` counts: 'line', or 'row' in files without lines."""
    number: int
    """1-based."""
    key: str | int
    """Its key in an object; its 0-based index elsewhere."""
    value: Any
    problem: BadRecord | None = None
    """Why `value` is not to be trusted."""

    @property
    def where(self) -> str:
        """The place, for a person."""
        named = f", key {quoted(self.key)}" if isinstance(self.key, str) else ""
        return f"{self.file}: {self.unit} {self.number}{named}"


class _Counted:
    """A file that tells how many bytes were read of it."""

    def __init__(self, file: BinaryIO, advance: Advance) -> None:
        self._file, self._advance, self._untold = file, advance, 0

    def read(self, size: int, /) -> bytes:
        return self._told(self._file.read(size))

    def readline(self, size: int, /) -> bytes:
        return self._told(self._file.readline(size))

    def tell(self) -> int:
        return self._file.tell()

    def _told(self, data: bytes) -> bytes:
        self._untold += len(data)
        if self._untold >= _BYTES_BEFORE_TOLD or not data:
            self._advance(self._untold)
            self._untold = 0
        return data


def read_table(path: Path, advance: Advance, under: str | None = None) -> Iterator[Row]:
    """The rows of a file in any form, each an object of its columns: Parquet, CSV or TSV (by the file's name), or JSON.

    `under`: the key of a JSON object under which the list of rows lies. Raises UserError that names the file and the place.
    """
    with open_records(path) as file:
        parquet = file.read(4) == b"PAR1"
    if parquet:
        return _parquet(path, advance)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _csv(path, advance)
    return read_json(path, advance, under) if under else read_json(path, advance, lines=True)


def read_json(path: Path, advance: Advance, under: str | None = None, lines: bool = False) -> Iterator[Row]:
    """The elements of a JSON array, or the members of an object, one by one.

    `under`: where the file holds an object, the list or object under this key of it is meant; an array is taken as that list.
    `lines`: an object at the beginning is the first of one a line. Raises UserError with the place where the file stops being JSON.
    """
    for row in read_sections(path, advance, () if under is None else (under,), lines):
        yield row[1]


def read_sections(path: Path, advance: Advance, sections: tuple[str, ...], lines: bool = False) -> Iterator[tuple[str, Row]]:
    """`read_json` of several sections of an object in one go, in the file's order, each row with its section."""
    try:
        with open_records(path) as file:
            head = file.read(4096)
            check_head(path, head)
            file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
            counted = _Counted(file, advance)
            if lines and head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{":
                for raw in read_lines(path, counted):
                    yield "", Row(path, "line", raw.line, raw.index, raw.value, raw.problem)
                return
            yield from _Walk(path, Window(path, counted)).rows(sections)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend that and start again") from None


class _Walk:
    """The way through one JSON file."""

    def __init__(self, path: Path, window: Window) -> None:
        self._path, self._window, self._decoder = path, window, Decoder()

    def rows(self, sections: tuple[str, ...]) -> Iterator[tuple[str, Row]]:
        """The rows of the sections, or of the whole where there are none, then nothing but white space."""
        first = self._window.peek()
        if first not in ("[", "{") or not first:
            found = repr(first) if first else "nothing"
            raise UserError(f"{self._path}: begins with {found}; give a JSON file: an array of objects, or one object")
        if first == "[" or not sections:
            yield from (("" if not sections else sections[0], row) for row in self._members())
        else:
            seen, there = set(), []
            for name in self._names():
                there.append(name)
                if name in sections and self._window.peek() in ("[", "{"):
                    seen.add(name)
                    yield from ((name, row) for row in self._members())
                else:
                    self._skip()
            if missing := [name for name in sections if name not in seen]:
                has = shortened(", ".join(map(repr, there)) or "nothing")
                raise UserError(f"{self._path}: holds no list under {missing[0]!r} (it holds {has}); give the file that has it")
        if rest := self._window.peek():
            raise UserError(f"{self._path}: line {self._window.line}: {rest!r} after the end of the JSON; take it out")

    def _members(self) -> Iterator[Row]:
        """The elements of the array, or the members of the object, that begins here."""
        if self._window.peek() == "[":
            for index in self._places("]"):
                line = self._window.line
                value, _, problem = element(self._window, self._decoder, f"element {index}", MOST_CHARACTERS)
                yield Row(self._path, "line", line, index, value, problem)
            return
        for name in self._names():
            self._window.peek()
            line = self._window.line
            value, _, problem = element(self._window, self._decoder, f"the value of {quoted(name)}", MOST_CHARACTERS)
            yield Row(self._path, "line", line, name, value, problem)

    def _names(self) -> Iterator[str]:
        """The names of the object that begins here; whoever asks reads the value between two of them."""
        for _ in self._places("}"):
            if self._window.peek() != '"':
                raise self._broken("where a key in double quotes belongs")
            name, _, _ = element(self._window, self._decoder, "a key", MOST_CHARACTERS)
            if self._window.peek() != ":":
                raise self._broken(f"after the key {quoted(name)}, where ':' belongs")
            self._window.advance(self._window.at + 1)
            yield name

    def _places(self, end: str) -> Iterator[int]:
        """Numbers the places of the array or object that begins here; whoever asks reads what lies in each."""
        window, index = self._window, 0
        window.advance(window.at + 1)
        following = window.peek()
        while following != end:
            yield index
            index += 1
            following = window.peek()
            if following not in (",", end) or not following:
                raise self._broken(f"where ',' or '{end}' belongs")
            if following == ",":
                window.advance(window.at + 1)
                if window.peek() == end:
                    raise UserError(f"{self._path}: line {window.line}: ',' before '{end}'; take it out")
        window.advance(window.at + 1)

    def _skip(self, depth: int = 3) -> None:
        """Goes past the value that begins here, whatever its size."""
        first = self._window.peek()
        if depth and first == "[":
            for _ in self._places("]"):
                self._skip(depth - 1)
        elif depth and first == "{":
            for _ in self._names():
                self._skip(depth - 1)
        else:
            element(self._window, self._decoder, "a value", MOST_CHARACTERS)

    def _broken(self, where: str) -> UserError:
        found = self._window.peek()
        what = repr(found) if found else "the end of the file"
        return UserError(f"{self._path}: line {self._window.line}: {what} {where}; repair the JSON, or fetch the whole file again")


def _csv(path: Path, advance: Advance) -> Iterator[Row]:
    """The rows of a table with a header; every value is a text."""
    try:
        with open_records(path) as file:
            text = io.TextIOWrapper(io.BufferedReader(_Raw(file, advance)), encoding="utf-8-sig", newline="")
            rows = csv.reader(text, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = next(rows, None)
            if not header:
                raise UserError(f"{path}: is empty; give a table whose first line names the columns")
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise UserError(f"{path}: the first line names the column {quoted(twice)} twice; rename one")
            line = rows.line_num + 1
            for index, cells in enumerate(row for row in rows if row):
                problem = None
                if len(cells) != len(header):
                    problem = BadRecord(
                        "columns", f"has {len(cells)} cells, the first line {len(header)}; quote cells that hold a separator"
                    )
                yield Row(path, "line", line, index, dict(zip(header, cells, strict=False)), problem)
                line = rows.line_num + 1
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason}); save it in UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}: line {rows.line_num}: is no CSV ({error}); quote cells that hold quotes or separators") from None


class _Raw(io.RawIOBase):
    """What the text reader of CSV reads from."""

    def __init__(self, file: BinaryIO, advance: Advance) -> None:
        self._counted = _Counted(file, advance)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self._counted.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _parquet(path: Path, advance: Advance) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        size, rows = path.stat().st_size, max(1, file.metadata.num_rows)
        index = 0
        for batch in file.iter_batches(_PARQUET_ROWS):
            for value in batch.to_pylist():
                yield Row(path, "row", index + 1, index, value)
                index += 1
            advance(size * len(batch) // rows)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: cannot be read as Parquet ({shortened(' '.join(str(error).split()))}); fetch the whole file again"
        ) from None
