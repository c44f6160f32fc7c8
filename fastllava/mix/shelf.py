"""What has to be kept until a file has been read to its end lies on the disk: texts, groups of annotations, tables to look up in.

An annotation file lists the questions of one picture far apart, and questions and answers in two files. In memory stay
8 bytes a text, 12 more where it is grouped, a name and a number a group, and a byte a row of a table.
"""

import errno
import json
import os
import sqlite3
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_CACHE_KIB = 32 * 1024


class Texts:
    """Lines of a file by their numbers, written first and then read in any order."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=2**20)
        self._ends, self._written = array("Q", [0]), False

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, text: bytes) -> None:
        """Puts a text behind the others. Raises OSError."""
        self._file.write(text)
        self._written = True
        self._ends.append(self._ends[-1] + len(text))

    def __getitem__(self, index: int) -> bytes:
        if self._written:
            self._file.flush()
            self._written = False
        begin, end = self._ends[index], self._ends[index + 1]
        return os.pread(self._file.fileno(), end - begin, begin)

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()


class Groups:
    """Values by key: keys in the order in which they came first, each with its values in the order in which they came."""

    def __init__(self, path: Path) -> None:
        self._texts = Texts(path)
        self._numbers: dict[str, int] = {}
        self._of = array("L")

    def add(self, key: str, value: Any) -> None:
        """Puts a JSON value behind those of its key."""
        self._of.append(self._numbers.setdefault(key, len(self._numbers)))
        self._texts.add(json.dumps(value).encode())

    def __iter__(self) -> Iterator[tuple[str, list[Any]]]:
        if not self._of:
            return
        of = np.asarray(self._of)
        order = np.argsort(of, kind="stable")
        ends = np.cumsum(np.bincount(of, minlength=len(self._numbers)))
        begin = 0
        for key, end in zip(self._numbers, ends.tolist(), strict=True):
            yield key, [json.loads(self._texts[index]) for index in order[begin:end].tolist()]
            begin = end

    def values(self) -> Iterator[Any]:
        """All values in the order in which they came, whatever their keys."""
        return (json.loads(self._texts[index]) for index in range(len(self._texts)))

    def close(self) -> None:
        """Lets go of the file."""
        self._texts.close()


class Table:
    """One value by key, to be looked up: an SQLite file with a bounded cache."""

    def __init__(self, path: Path) -> None:
        self._base = sqlite3.connect(path)
        # Of no use after a crash: the build begins anew.
        for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{_CACHE_KIB}", "locking_mode=EXCLUSIVE"):
            self._base.execute(f"PRAGMA {setting}")
        self._base.execute("CREATE TABLE kept (place INTEGER PRIMARY KEY, key TEXT UNIQUE, value TEXT)")
        self._base.execute("BEGIN")
        self._taken = bytearray(1)

    def put(self, key: str | int, value: Any) -> bool:
        """Keeps a JSON value. False, and the first one stays, where the key has one. Raises OSError."""
        try:
            done = self._base.execute("INSERT OR IGNORE INTO kept (key, value) VALUES (?, ?)", (str(key), json.dumps(value)))
        except sqlite3.OperationalError as error:
            # In SQLite's words a full disk is no error of the operating system.
            raise OSError(errno.ENOSPC if "full" in str(error) else errno.EIO, str(error)) from None
        if done.rowcount == 1:
            self._taken.append(0)
        return done.rowcount == 1

    def take(self, key: str | int) -> Any | None:
        """The value of the key, noted as taken; None where there is none."""
        found = self._base.execute("SELECT place, value FROM kept WHERE key = ?", (str(key),)).fetchone()
        if found is None:
            return None
        self._taken[found[0]] = 1
        return json.loads(found[1])

    def left(self) -> Iterator[str]:
        """The keys that nobody took, in the order in which they came."""
        for place, key in self._base.execute("SELECT place, key FROM kept ORDER BY place"):
            if not self._taken[place]:
                yield key

    def close(self) -> None:
        """Lets go of the file."""
        self._base.close()
