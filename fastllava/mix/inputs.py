"""The files that a mix is built from, found in its config wherever it names one, and what each of them is."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fastllava.disk import file_digest
from fastllava.errors import UserError
from fastllava.mix.config import Mix
from fastllava.mix.keys import SourceKeys
from fastllava.mix.progress import Working


def files_of(keys: SourceKeys) -> list[tuple[str, Path]]:
    """Every file that the source names, each with its key."""
    return list(_paths(f"sources.{keys.name}.files", getattr(keys, "files", None)))


def _paths(key: str, value: Any) -> Iterator[tuple[str, Path]]:
    if isinstance(value, Path):
        yield key, value
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _paths(f"{key}.{number}" if len(value) > 1 else key, item)
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _paths(f"{key}.{name}", getattr(value, name))


def check_inputs(mix: Mix) -> None:
    """Raises UserError that lists every file and folder which is not there or cannot be read, with its key."""
    problems = []
    for keys in mix.sources:
        for key, path in files_of(keys):
            if not path.exists():
                problems.append(f"{key}: there is no file {path}; download it, or mend the path")
            elif not path.is_file():
                problems.append(f"{key}: {path} is no file; give the file itself")
            elif not os.access(path, os.R_OK):
                problems.append(f"{key}: {path} may not be read; give access to it")
        saves = getattr(getattr(keys, "files", None), "pictures", "refuse") == "save"
        if saves and mix.images is None:
            problems.append(
                f"sources.{keys.name}.files.pictures: save needs a folder; write images: with the one that all images lie below"
            )
        if keys.images and mix.images is not None and mix.images.is_dir() and not saves and not (mix.images / keys.images).is_dir():
            problems.append(f"sources.{keys.name}.images: there is no folder {mix.images / keys.images}; put the images there, or mend it")
    if mix.images is not None and not mix.images.is_dir():
        problems.append(f"images: {mix.images} is no folder; give the one that all images lie below, or write null to look for none")
    if problems:
        raise UserError("\n".join(problems))


def stamps(mix: Mix) -> dict[Path, tuple[int, int]]:
    """Size and time of every file that is read: others after the build mean that a file has changed under it. Raises OSError."""
    found = {path: path.stat() for keys in mix.sources for _, path in files_of(keys)}
    return {path: (each.st_size, each.st_mtime_ns) for path, each in found.items()}


def described(mix: Mix, working: Working) -> dict[str, list[dict[str, Any]]]:
    """Path, size and SHA-256 of each source's files, as the manifest holds them. Raises OSError."""
    found: dict[str, list[dict[str, Any]]] = {}
    for keys in mix.sources:
        found[keys.name] = []
        for key, path in files_of(keys):
            size = path.stat().st_size
            working.begin(f"hash {path.name}", size)
            found[keys.name].append({"key": key, "path": str(path), "bytes": size, "sha256": file_digest(path)})
            working.advance(size)
    return found
