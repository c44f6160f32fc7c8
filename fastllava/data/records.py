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
from typing import Any, BinaryIO

from fastllava.data.checks import BadRecord
from fastllava.errors import UserError

MAX_RECORD_BYTES = 16 * 2**20
"""A larger record is an accident, such as a file without line ends."""
_CHUNK = 2**20
_REMEDY = "write a JSON array of records, or one record a line"
_MOST_DEPTH = 50
_TOO_DEEP = ("json_too_deep", f"objects or lists are nested more than {_MOST_DEPTH} deep; flatten them")
_SPACE = " \t\r\n"
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


def read_records(path: Path) -> Iterator[Raw]:
    """Every record of the file, in order. Raises UserError with the place where the file stops being one of records."""
    path = Path(path)
    try:
        with open_records(path) as file:
            head = file.read(4096)
            _check_head(path, head)
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
                yield from _lines(path, file)
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


def _check_head(path: Path, head: bytes) -> None:
    """Raises UserError for a file that is of another kind, with that kind's name."""
    for mark, (name, remedy) in _MARKS.items():
        if head.startswith(mark):
            raise UserError(f"{path}: is {name}, not JSON in UTF-8; {remedy or _REMEDY}")
    if b"\0" in head[:4]:
        raise UserError(f"{path}: is UTF-16 or UTF-32, not JSON in UTF-8; {_REMEDY}, in UTF-8")


class _Decoder:
    """JSON to values, strictly: notes what json.loads would let pass."""

    def __init__(self) -> None:
        self.problem: BadRecord | None = None
        self._json = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def decode(self, text: str, at: int) -> tuple[Any, int]:
        """The value at `at` and where it ends. Raises json.JSONDecodeError, or BadRecord where no reading on would help."""
        self.problem = None
        try:
            value, end = self._json.raw_decode(text, at)
        except RecursionError:
            raise BadRecord(*_TOO_DEEP) from None
        # What the decoder lets through may still be too deep for what comes after it, such as the way to a worker process.
        if text.count("[", at, end) + text.count("{", at, end) > _MOST_DEPTH and _is_deep(value):
            self.problem = BadRecord(*_TOO_DEEP)
            return None, end
        return value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self.problem = BadRecord("json_duplicate_key", f"the key {twice[:80]!r} comes twice in one object; keep one")
        return value

    def _constant(self, name: str) -> None:
        where_from = " (pandas writes it where a value is missing)" if name == "NaN" else ""
        self.problem = BadRecord("json_constant", f"{name} is no JSON{where_from}; leave the key out, or write a number or null")


def _is_deep(value: Any) -> bool:
    """Whether objects and lists are nested beyond the bound."""
    level = [value]
    for _ in range(_MOST_DEPTH):
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        level = [item for part in inner for item in part]
        if not level:
            return False
    return True


def _syntax(error: json.JSONDecodeError) -> str:
    """What is wrong there and what to do, where a slip of the pen is known by its looks."""
    here, before = error.doc[error.pos : error.pos + 8], error.doc[max(0, error.pos - 80) : error.pos].rstrip()
    if here[:1] in ("}", "]") and before.endswith(","):
        return f"',' before '{here[0]}'; take it out"
    if here[:1] == "," and (after := error.doc[error.pos + 1 : error.pos + 80].lstrip()[:1]) in ("}", "]") and after:
        return f"',' before '{after}'; take it out"
    if here[:1] == "'":
        return "a single quote; JSON has double ones: write the file with json.dump"
    if here.startswith(("True", "False", "None")):
        return f"{here.split(',')[0].strip('}] ')} is Python; JSON writes true, false, null: write the file with json.dump"
    if here.startswith(("//", "/*", "#")):
        return "a comment, which JSON does not have; take it out"
    return f"{error.msg}; repair it"


class _Text:
    """A file's text through a window that slides forward, and the line it has come to."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self._bytes = file.tell()

    def more(self, size: int) -> None:
        """Slides past what has been read and appends about `size` bytes."""
        chunk = self._file.read(size)
        try:
            new = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            place = self._bytes + error.start - len(self._decoder.getstate()[0])
            raise UserError(f"{self.path}: byte {place} is not UTF-8; save the file in UTF-8") from None
        self._bytes += len(chunk)
        self.text, self.at, self.ended = self.text[self.at :] + new, 0, not chunk

    def advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def peek(self) -> str:
        """The next character that is no white space, '' at the end."""
        while True:
            at, text = self.at, self.text
            while at < len(text) and text[at] in _SPACE:
                at += 1
            self.advance(at)
            if at < len(text):
                return text[at]
            if self.ended:
                return ""
            self.more(_CHUNK)


def _array(path: Path, file: BinaryIO) -> Iterator[Raw]:
    window, decoder = _Text(path, file), _Decoder()
    window.peek()
    window.advance(window.at + 1)
    index, following = 0, window.peek()
    if following == "]":
        window.advance(window.at + 1)
    while following != "]":
        line = window.line
        value, size, problem = _element(window, decoder, index)
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


def _element(window: _Text, decoder: _Decoder, index: int) -> tuple[Any, int, BadRecord | None]:
    """The array's next element and its size. Raises UserError where it is broken: what follows it could not be told apart."""
    more = _CHUNK
    while True:
        try:
            value, end = decoder.decode(window.text, window.at)
            # A number at the edge of the window may go on behind it.
            if end < len(window.text) or window.ended:
                size = end - window.at
                window.advance(end)
                if size > MAX_RECORD_BYTES:
                    return None, size, BadRecord("json_too_large", f"the record is larger than {MAX_RECORD_BYTES >> 20} MiB; shorten it")
                return value, size, decoder.problem
        except json.JSONDecodeError as error:
            # Short of the edge the window hides nothing, but the end of a long text.
            inside = error.pos < len(window.text) - 16 and not error.msg.startswith("Unterminated string")
            if window.ended or inside:
                window.advance(min(error.pos, len(window.text)))
                raise UserError(f"{window.path}: line {window.line}: record {index} is broken JSON: {_syntax(error)}") from None
        except (BadRecord, ValueError) as error:
            raise UserError(f"{window.path}: line {window.line}: record {index}: {_detail(error)}") from None
        if len(window.text) - window.at > MAX_RECORD_BYTES:
            raise UserError(
                f"{window.path}: line {window.line}: record {index} is broken JSON, or larger than {MAX_RECORD_BYTES >> 20} MiB; repair it"
            )
        # Twice as much each time, so that a long record is not parsed again and again.
        window.more(more)
        more *= 2


def _lines(path: Path, file: BinaryIO) -> Iterator[Raw]:
    decoder = _Decoder()
    index = line = 0
    while data := file.readline(MAX_RECORD_BYTES + 1):
        line += 1
        if len(data) > MAX_RECORD_BYTES:
            while data and not data.endswith(b"\n"):
                data = file.readline(_CHUNK)
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


def _line(decoder: _Decoder, data: bytes) -> tuple[Any, BadRecord | None]:
    try:
        text = data.decode("utf-8")
        value, end = decoder.decode(text, 0)
    except UnicodeDecodeError as error:
        return None, BadRecord("json_encoding", f"byte {error.start} of the line is not UTF-8; save the file in UTF-8")
    except json.JSONDecodeError as error:
        return None, BadRecord("json_syntax", f"column {error.colno}: {_syntax(error)}")
    except BadRecord as problem:
        return None, problem
    except ValueError as error:
        return None, BadRecord("json_syntax", _detail(error))
    if text[end:].strip() == ",":
        return None, BadRecord("json_syntax", f"column {end + 1}: ',' after the record; take it out, as lines need none")
    if text[end:].strip():
        return None, BadRecord("json_syntax", f"column {end + 1}: more after the record; write one record a line")
    return value, decoder.problem


def _detail(error: Exception) -> str:
    """int() refuses numbers of thousands of digits in a long sentence."""
    return error.detail if isinstance(error, BadRecord) else "holds a number of thousands of digits; shorten it"
