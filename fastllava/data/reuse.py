"""Finds a prepared set that was made before, and says whether its images are what they were."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastllava.config import DataConfig
from fastllava.data.checks import BadRecord
from fastllava.data.image_changes import Changes, find_changes
from fastllava.data.prepared_set import MANIFEST, QUARANTINE, TIMES, PreparedSet, checksum_of, file_sha256
from fastllava.data.rows import Preparer
from fastllava.errors import UserError

Report = Callable[[str], None]
_LIST_BEFORE = "image is a list; write one path as text, or leave the key out"
"""What sets say that were made when every list was refused, one of a single picture too."""


def find_set(folder: Path, preparer: Preparer, report: Report, keep: str | None) -> PreparedSet | None:
    """The set in `folder` if it is whole and its images, those that it refused as well, are what they were."""
    prepared = _open(folder, report)
    if keep is not None and (prepared is None or prepared.digest != keep):
        kept = _open(replaced(folder, keep), report)
        prepared = prepared if kept is None or kept.digest != keep else kept
    if prepared is None:
        return None
    data, images = preparer.data, prepared.images()
    running = prepared.digest == keep
    changes = find_changes(prepared, data, images, enough=len(images) if running else 1)
    if running:
        _check_running(prepared, images, changes, data, report)
    else:
        changed = next((f"image {image} is not what it was" for image in changes.bad), None) or _mended(prepared, preparer)
        if changed is not None:
            report(f"{changed} when {prepared.folder} was made: making it anew")
            return None
    if changes.touched:
        _renew_times(prepared, images, changes.touched)
        report(f"{len(changes.touched):,} images have another time and the same content")
    nothing = "" if changes.bad else ": nothing has changed"
    report(f"prepared set {prepared.folder}{nothing}, used again")
    return prepared


def _open(folder: Path, report: Report) -> PreparedSet | None:
    """The set in `folder` when there is a whole one."""
    if not folder.exists():
        return None
    try:
        return PreparedSet.open(folder, verify=True)
    except UserError as error:
        report(f"a prepared set is damaged, making it anew: {error}")
        return None


def _mended(prepared: PreparedSet, preparer: Preparer) -> str | None:
    """What the set refused and is good now, or bad in another way, and how it is another than before; None where there is none."""
    if not any(_files(reason) or reason == "image_type" for reason in prepared.manifest["reasons"]):
        return None
    for line in (prepared.folder / QUARANTINE).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if (entry["reason"], entry["detail"]) == ("image_type", _LIST_BEFORE):
            return f"record {entry['id']} may show one picture in a list, which it might not"
        if not _files(entry["reason"]):
            continue
        paths = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
        try:
            preparer.images(paths, entry["id"])
        except BadRecord as problem:
            if problem.reason == entry["reason"]:
                continue
        return f"image {', '.join(paths)} is not what it was"
    return None


def _check_running(prepared: PreparedSet, images: dict[str, list[int]], changes: Changes, data: DataConfig, report: Report) -> None:
    """A run that goes on does so without the images that have changed since. Raises UserError when those are too many."""
    if not changes.bad:
        return
    records = len(prepared.samples_of(place for image in changes.bad for place in images[image]))
    image, problem = next(iter(changes.bad.items()))
    said = f"{len(changes.bad):,} of {len(images):,} images are not what they were when this run began, such as {image}: {problem.detail}"
    if prepared.manifest["quarantined"] + records > data.max_quarantined_share * prepared.manifest["records"]:
        raise UserError(f"data.images: {said} ({problem.reason}); put them back, or train in another output_dir")
    report(f"{said} ({problem.reason}); the run goes on without them")


def _renew_times(prepared: PreparedSet, images: dict[str, list[int]], touched: dict[str, int]) -> None:
    """Note the images' new times, so that their content need not be looked at again; where nothing can be written, it will be."""
    times = np.array(prepared.image_times)
    for image, time_ns in touched.items():
        times[images[image]] = time_ns
    try:
        _write(prepared.folder / f"{TIMES}.partial", lambda file: np.save(file, times))
        manifest = {**prepared.manifest, "image_times_sha256": file_sha256(prepared.folder / f"{TIMES}.partial")}
        manifest["checksum"] = checksum_of(manifest)
        _write(prepared.folder / f"{MANIFEST}.partial", lambda file: file.write(in_json(manifest)))
        for name in (TIMES, MANIFEST):
            (prepared.folder / f"{name}.partial").rename(prepared.folder / name)
    except OSError:
        for name in (TIMES, MANIFEST):
            with suppress(OSError):
                (prepared.folder / f"{name}.partial").unlink(missing_ok=True)
        return
    prepared.image_times = times


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def in_json(manifest: dict[str, Any]) -> bytes:
    """The manifest as it is written."""
    return json.dumps(manifest, indent=1, ensure_ascii=False).encode()


def replaced(folder: Path, digest: str) -> Path:
    """Where the set of `digest` lies once another one, of the same records and settings with other images, has taken its place."""
    return folder.with_name(f"{folder.name}-{digest[:16]}")


def _files(reason: str) -> bool:
    """Whether a reason is about an image file, which may have changed since."""
    return reason.startswith("image_") and reason not in ("image_count", "image_type", "image_key")
