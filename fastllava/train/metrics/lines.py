"""A file of lines that grows as a run goes on, and that a full disk does not stop."""

import os
from collections.abc import Callable
from pathlib import Path


class Lines:
    """Appends to a file. What cannot be written waits in memory and is tried again with every further line; that is said once."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """Raises OSError when the file cannot be opened."""
        self._path, self._say = path, say
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = b""
        self._failing = False

    def write(self, line: str) -> None:
        """Append `line` and a line end."""
        self._waiting += line.encode() + b"\n"
        self._try()

    def close(self) -> None:
        """Try once more; say what the file lacks at the end."""
        if self._waiting:
            self._try()
        os.close(self._file)
        if self._waiting:
            lost = self._waiting.count(b"\n")
            self._say(f"{self._path}: lacks its last {lost} lines, which could not be written; free space there")

    def _try(self) -> None:
        try:
            while self._waiting:
                # A disk that fills up may take a part of it.
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            if not self._failing:
                self._say(f"{self._path}: could not be written ({error.strerror or error}); its lines wait in memory, the run goes on")
            self._failing = True
            return
        if self._failing:
            self._say(f"{self._path}: is written again, with all lines that waited")
        self._failing = False
