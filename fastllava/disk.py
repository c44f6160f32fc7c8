"""What is written is on the disk before anything relies on it, and what is read is looked at with care."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

_LARGEST_JSON = 64 * 2**20


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


def described(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as manifests hold them."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


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
