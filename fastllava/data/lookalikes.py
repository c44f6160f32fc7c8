"""What is said of an image file that is not there: where it was looked for, and what lies there under nearly that name."""

import os
from functools import lru_cache
from itertools import islice
from pathlib import Path

from fastllava.console.printable import shortened

_MOST_NAMES = 200_000
"""The most names of a folder that are looked through."""


def missing(path: Path) -> str:
    """The detail for `path`, which names nothing: with its first part that is missing, and one like it that is there."""
    part = path
    while part.parent != part and not part.parent.exists():
        part = part.parent
    said = f"there is no such file: {shortened(str(path), 1000)}"
    if part != path:
        said += f" (no folder {shortened(part.name)} in {shortened(str(part.parent), 1000)})"
    if found := _like(part):
        said += f", but {found!r} lies there"
    return f"{said}; put it there, or mend data.images or the record"


def _like(path: Path) -> str | None:
    """A name beside `path` that differs in case, outer white space or the ending alone."""
    try:
        names, stems = _names(str(path.parent), path.parent.stat().st_mtime_ns)
    except OSError:
        return None
    name = path.name.strip().casefold()
    return names.get(name) or stems.get(os.path.splitext(name)[0]) or stems.get(name)


@lru_cache(maxsize=8)
def _names(folder: str, _changed: int) -> tuple[dict[str, str], dict[str, str]]:
    """Names in `folder` by themselves and by their stems, without case and outer white space."""
    names: dict[str, str] = {}
    stems: dict[str, str] = {}
    with os.scandir(folder) as entries:
        for entry in islice(entries, _MOST_NAMES):
            plain = entry.name.strip().casefold()
            names[plain] = entry.name
            stems[os.path.splitext(plain)[0]] = entry.name
    return names, stems
