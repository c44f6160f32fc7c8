"""Strict JSON through a window that slides over a file: its values one by one, each with the line it begins in.

Memory stays at the size of a value, whatever the size of the file.
"""

import codecs
import json
from pathlib import Path
from typing import Any, Protocol

from fastllava.data.checks import BadRecord
from fastllava.errors import UserError

CHUNK = 2**20
"""Bytes that are read at a time."""
_MOST_DEPTH = 50
_TOO_DEEP = ("json_too_deep", f"objects or lists are nested more than {_MOST_DEPTH} deep; flatten them")
_SPACE = " \t\r\n"


class Source(Protocol):
    """What a window reads from: a binary file, or what counts the bytes that pass."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes, none at the end."""
        ...

    def tell(self) -> int:
        """Bytes before those that `read` gives next."""
        ...


class Decoder:
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
        if text.count("[", at, end) + text.count("{", at, end) > _MOST_DEPTH and is_deep(value):
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


def is_deep(value: Any) -> bool:
    """Whether objects and lists are nested beyond the bound."""
    level = [value]
    for _ in range(_MOST_DEPTH):
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        level = [item for part in inner for item in part]
        if not level:
            return False
    return True


def syntax(error: json.JSONDecodeError) -> str:
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


class Window:
    """A file's text through a window that slides forward, and the line it has come to."""

    def __init__(self, path: Path, file: Source) -> None:
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
        """Goes on to the character at `to` of the window."""
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
            self.more(CHUNK)


def element(window: Window, decoder: Decoder, name: str, most: int) -> tuple[Any, int, BadRecord | None]:
    """The value that begins here, called `name`, its size, and why it is not to be trusted: more than `most` characters, say.

    Raises UserError where it is broken: what follows it could not be told apart.
    """
    more = CHUNK
    while True:
        try:
            value, end = decoder.decode(window.text, window.at)
            # A number at the edge of the window may go on behind it.
            if end < len(window.text) or window.ended:
                size = end - window.at
                window.advance(end)
                if size > most:
                    return None, size, BadRecord("json_too_large", f"{name} is larger than {most >> 20} MiB; shorten it")
                return value, size, decoder.problem
        except json.JSONDecodeError as error:
            # Short of the edge the window hides nothing, but the end of a long text.
            inside = error.pos < len(window.text) - 16 and not error.msg.startswith("Unterminated string")
            if window.ended or inside:
                window.advance(min(error.pos, len(window.text)))
                raise UserError(f"{window.path}: line {window.line}: {name} is broken JSON: {syntax(error)}") from None
        except (BadRecord, ValueError) as error:
            raise UserError(f"{window.path}: line {window.line}: {name}: {detail_of(error)}") from None
        if len(window.text) - window.at > most:
            raise UserError(f"{window.path}: line {window.line}: {name} is broken JSON, or larger than {most >> 20} MiB; repair it")
        # Twice as much each time, so that a long record is not parsed again and again.
        window.more(more)
        more *= 2


def detail_of(error: Exception) -> str:
    """int() refuses numbers of thousands of digits in a long sentence."""
    return error.detail if isinstance(error, BadRecord) else "holds a number of thousands of digits; shorten it"
