"""Which images of a prepared set are not what they were when it was made: by size and time, and where those differ, by content."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fastllava.config import DataConfig
from fastllava.data.checks import BadRecord
from fastllava.data.images import resolve_image, same_content
from fastllava.data.prepared_set import PreparedSet

_THREADS = 16
"""To ask a disk or a server of so many files at once; Python itself hardly works for it."""
_CHUNK = 256


@dataclass(frozen=True)
class Changes:
    """Images by their paths below the image folder."""

    bad: dict[str, BadRecord]
    """Those that are gone, cannot be read or have other content, and why."""
    touched: dict[str, int]
    """Those of the same content with another time, and that time in nanoseconds."""


def find_changes(prepared: PreparedSet, data: DataConfig, images: dict[str, list[int]], enough: int) -> Changes:
    """Ask of every image of the set; at about `enough` bad ones it stops. `images`: `prepared.images()`."""
    if data.images is None:
        return Changes({}, {})
    root = data.images.resolve()
    sizes, times = prepared.image_bytes.tolist(), prepared.image_times.tolist()

    def suspicious(some: list[str]) -> list[str]:
        """Those whose size or time is another."""
        return [image for image in some if _size_and_time(f"{root}/{image}") != (sizes[images[image][0]], times[images[image][0]])]

    def verdict(image: str) -> BadRecord | int:
        try:
            path = resolve_image(root, image, data.follow_links)
            return same_content(path, data, prepared.stamp(images[image][0])).mtime_ns
        except BadRecord as problem:
            return problem

    changes = Changes({}, {})
    with ThreadPoolExecutor(_THREADS) as threads:
        suspects = [image for some in threads.map(suspicious, _cut(list(images), _CHUNK)) for image in some]
        for some in _cut(suspects, _THREADS):
            for image, found in zip(some, threads.map(verdict, some), strict=True):
                if isinstance(found, BadRecord):
                    changes.bad[image] = found
                else:
                    changes.touched[image] = found
            if len(changes.bad) >= enough:
                break
    return changes


def _size_and_time(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def _cut(images: list[str], size: int) -> Iterator[list[str]]:
    return (images[start : start + size] for start in range(0, len(images), size))
