"""Reads LLaVA JSON as a stream: an array, or one record a line, told apart by what the file holds, not by its name.

Memory stays at a few megabytes, whatever the size of the file. What is wrong with one record is said of that record;
an array that is broken as a whole stops the reading.
"""

import codecs
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from fastllava.data.checks import BadRecord
from fastllava.data.json_window import CHUNK, Decoder, Window, detail_of, element, syntax
from fastllava.errors import UserError

MAX_RECORD_BYTES = 16 * 2**20
"""A larger record is an accident, such as a file without line ends."""
_REMEDY = "write a JSON array of records, or one record a line"
_GIVE = "give the path of a LLaVA JSON file"
_UNPACK = "unpack it first"
_MARKS = {
    b"\xff\xfe": ("UTF-16", "save it in UTF-8"),
    b"\xfe\xff": ("UTF-16", "save it in UTF-8"),
    b"\x1f\x8b": ("gzip", _UNPACK),
    b"PK": ("zip", _UNPACK),
    b"BZh": ("bzip2", _UNPACK),
    b"\xfd7zXZ": ("xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("zstd", _UNPACK),
    b"PAR1": ("Parquet", ""),
    b"ARROW1": ("Arrow", ""),
    b"version https://git-lfs": ("a Git LFS pointer", "fetch the file it stands for (git lfs pull)"),
    b"<": ("a web page", "download the file itself"),
}
_NO_FILES = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}


@dataclass(frozen=True)
class Raw:
    """One element of the file."""

    index: int
    """0-based, counting every element, bad ones too."""
    line: int
    """1-based line where it begins."""
    size: int
    """Characters (in lines: bytes) it takes up."""
    value: Any
    problem: BadRecord | None = None
    """Why `value` is not to be trusted."""


class Lined(Protocol):
    """A binary file that is read line by line."""

    def readline(self, size: int, /) -> bytes:
        """The next line, or its first `size` bytes."""
        ...


def read_records(path: Path) -> Iterator[Raw]:
    """Every record of the file, in order. Raises UserError with the place where the file stops being one of records."""
    path = Path(path)
    try:
        with open_records(path) as file:
            head = file.read(4096)
            check_head(path, head)
            start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
            while not head[start:].strip():
                more = file.read(4096)
                if not more:
                    raise UserError(f"{path}: is empty; {_REMEDY}")
                head += more
            first = head[start:].lstrip()[:1]
            file.seek(start)
            if first == b"[":
                yield from _array(path, file)
            elif first == b"{":
                yield from read_lines(path, file)
            else:
                raise UserError(f"{path}: begins with {first!r}; {_REMEDY}")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {_GIVE}") from None


def open_records(path: Path) -> BufferedReader:
    """The file, open for reading. Raises UserError where there is none, or what is there has no end or can be read only once."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = next((name for is_kind, name in _NO_FILES.items() if is_kind(mode)), "something else")
            raise UserError(f"{path} cannot be read (is {kind}, not a file); {_GIVE}")
        # Not to wait where a pipe has taken the file's place since.
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {_GIVE}") from None
    except ValueError as error:
        raise UserError(f"{path}: is no path ({error}); {_GIVE}") from None


def check_head(path: Path, head: bytes) -> None:
    """Raises UserError for a file that is of another kind, with that kind's name."""
    for mark, (name, remedy) in _MARKS.items():
        if head.startswith(mark):
            raise UserError(f"{path}: is {name}, not JSON in UTF-8; {remedy or _REMEDY}")
    if b"\0" in head[:4]:
        raise UserError(f"{path}: is UTF-16 or UTF-32, not JSON in UTF-8; {_REMEDY}, in UTF-8")


def _array(path: Path, file: BinaryIO) -> Iterator[Raw]:
    window, decoder = Window(path, file), Decoder()
    window.peek()
    window.advance(window.at + 1)
    index, following = 0, window.peek()
    if following == "]":
        window.advance(window.at + 1)
    while following != "]":
        line = window.line
        value, size, problem = element(window, decoder, f"record {index}", MAX_RECORD_BYTES)
        yield Raw(index, line, size, value, problem)
        index += 1
        following = window.peek()
        if following not in (",", "]") or not following:
            what = repr(following) if following else "the end of the file"
            raise UserError(f"{path}: line {window.line}: {what} after record {index - 1}, where ',' or ']' belongs; repair the JSON")
        window.advance(window.at + 1)
        if following == "," and window.peek() == "]":
            raise UserError(f"{path}: line {window.line}: ',' before ']'; take it out")
    if rest := window.peek():
        raise UserError(f"{path}: line {window.line}: {rest!r} after the end of the array; {_REMEDY}")


def read_lines(path: Path, file: Lined) -> Iterator[Raw]:
    """Every record of a file with one a line, from where `file` stands."""
    decoder = Decoder()
    index = line = 0
    while data := file.readline(MAX_RECORD_BYTES + 1):
        line += 1
        if len(data) > MAX_RECORD_BYTES:
            while data and not data.endswith(b"\n"):
                data = file.readline(CHUNK)
            size = f"{MAX_RECORD_BYTES >> 20} MiB"
            problem = BadRecord("json_too_large", f"the line is larger than {size}; shorten it, or end each record's line with \\n")
            yield Raw(index, line, MAX_RECORD_BYTES, None, problem)
        elif stripped := data.strip():
            value, problem = _line(decoder, stripped)
            if index == 0 and problem is not None and stripped.endswith(b"},"):
                remedy = "take the commas after the records out, or put [ and ] around them all and no comma after the last"
                raise UserError(f"{path}: line {line}: ',' after the record; {remedy}")
            if index == 0 and problem is not None and problem.reason == "json_syntax" and not stripped.endswith(b"}"):
                raise UserError(f"{path}: line {line}: an object over several lines is neither; {_REMEDY}")
            yield Raw(index, line, len(data), value, problem)
        else:
            continue
        index += 1


def _line(decoder: Decoder, data: bytes) -> tuple[Any, BadRecord | None]:
    try:
        text = data.decode("utf-8")
        value, end = decoder.decode(text, 0)
    except UnicodeDecodeError as error:
        return None, BadRecord("json_encoding", f"byte {error.start} of the line is not UTF-8; save the file in UTF-8")
    except json.JSONDecodeError as error:
        return None, BadRecord("json_syntax", f"column {error.colno}: {syntax(error)}")
    except BadRecord as problem:
        return None, problem
    except ValueError as error:
        return None, BadRecord("json_syntax", detail_of(error))
    if text[end:].strip() == ",":
        return None, BadRecord("json_syntax", f"column {end + 1}: ',' after the record; take it out, as lines need none")
    if text[end:].strip():
        return None, BadRecord("json_syntax", f"column {end + 1}: more after the record; write one record a line")
    return value, decoder.problem
