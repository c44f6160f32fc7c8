"""What is written is on the disk before anything relies on it, and what is read is looked at with care."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastllava.errors import UserError

_LARGEST_JSON = 64 * 2**20
_FULL = {errno.ENOSPC: "no space left on device", errno.EDQUOT: "disk quota exceeded"}
_NUMBER = re.compile(r"os error (\d+)|\[errno (\d+)\]", re.IGNORECASE)
_WITHOUT_REASON = re.compile(r"inline_container|PytorchStreamWriter|file write failed|\d+ requested and \d+ written")
"""What PyTorch's writer of zip archives and NumPy say, without a reason, when a write fails under them."""


def sync(path: Path) -> None:
    """Wait until the file or folder at `path` is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(folder: Path, needed: int = 0) -> Iterator[None]:
    """Around what writes about `needed` bytes into `folder`: a write that fails raises OSError, in whatever class a library says it.

    A full disk is called one, with what is needed and what is free once the block has cleaned up.
    """
    try:
        yield
    except Exception as error:
        failure = write_failure(error, folder, needed)
        if failure is None:
            raise
        raise failure from None


def write_failure(error: BaseException, folder: Path, needed: int = 0) -> OSError | None:
    """The failed write into `folder` that `error` stands for, or what it came from; None when it is about something else."""
    if isinstance(error, UserError):
        return None
    chain: list[BaseException] = []
    origin: BaseException | None = error
    while origin is not None and origin not in chain:
        chain.append(origin)
        origin = origin.__cause__ or (None if origin.__suppress_context__ else origin.__context__)
    for number in filter(None, map(_errno, chain)):
        if number in _FULL:
            return OSError(number, f"{_FULL[number].capitalize()}{_room(folder, needed)}")
        return chain[0] if isinstance(chain[0], OSError) else OSError(number, os.strerror(number))
    if any(_WITHOUT_REASON.search(str(one)) for one in chain):
        full = _free(folder) < max(needed, 2**20)
        return write_failure(OSError(errno.ENOSPC if full else errno.EIO, os.strerror(errno.EIO)), folder, needed)
    return chain[0] if isinstance(chain[0], OSError) else None


def _errno(error: BaseException) -> int | None:
    """The number of the operating system's error: of the exception's own, or from its text, as Rust and Arrow put it."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = _NUMBER.search(str(error))
    if found:
        return int(found[1] or found[2])
    return next((number for number, words in _FULL.items() if words in str(error).lower()), None)


def _room(folder: Path, needed: int) -> str:
    wanted = f"{in_words(needed)} needed, " if needed else ""
    return f" ({wanted}{in_words(_free(folder))} free in {folder})"


def _free(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def in_words(count: int) -> str:
    """A number of bytes, in the unit that suits it."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def described_all(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`described` of files in `folder`, by name; several at a time, as they may be large."""
    with ThreadPoolExecutor(4) as threads:
        return dict(zip(names, threads.map(lambda name: described(folder / name), names), strict=True))


def described(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as manifests hold them."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def ready_to_write(path: Path, key: str) -> None:
    """Make the folder that the file `path` shall lie in, before there is work to lose. Raises UserError that names the option `key`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be written ({error.strerror}); give another place, or access to this one") from None


def held_alone(file: IO[Any]) -> bool:
    """Whether `file`, open for writing, is now this process's until it is closed or the process ends: False where another one has it.

    Processes of other machines with the same file system count too, where that keeps locks.
    """
    try:
        # lockf, not flock: child processes would inherit the latter, and hold it for seconds after this process was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, on disk when this returns."""
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises OSError, and ValueError when it is none, too large or too deep."""
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes")
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds a JSON {type(value).__name__}, not an object")
    return value
