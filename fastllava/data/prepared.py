"""Makes a prepared set from records, or finds the one that was made before.

A set lies in a folder named by the hash of everything it depends on, so it is found again when nothing has changed and
made anew when something has. It is written beside and renamed, so a folder of that name is always whole.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import sentencepiece

import fastllava
from fastllava.batch import ImageSpec
from fastllava.config import DataConfig
from fastllava.data.checksums import read_checksums
from fastllava.data.prepared_set import FILES, MANIFEST, QUARANTINE, ROWS, TIMES, PreparedRow, PreparedSet, checksum_of, file_sha256
from fastllava.data.quarantine import refuse, summary
from fastllava.data.records import open_records, read_records
from fastllava.data.reuse import Report, find_set, in_json, replaced
from fastllava.data.rows import Preparer, count_keys, prepare_batches
from fastllava.data.templates import template
from fastllava.data.tokenizer import Tokenizer
from fastllava.data.workers import Board
from fastllava.disk import sync, writing
from fastllava.errors import UserError

__all__ = ["PreparedRow", "PreparedSet", "prepare"]

FORMAT = 2
"""Goes up when the same source would give other rows, so that old sets are not taken for new ones."""
_SMALL_SOURCE = 8 * 2**20
"""Below this, starting worker processes takes longer than they save."""
_SAY_EVERY = 15.0


def cache_root() -> Path:
    """Where fastllava keeps what it can make again: for a user without a home, as containers know them, here."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        root = Path.cwd() / ".cache"
    return root / "fastllava"


def prepare(
    data: DataConfig,
    tokenizer: Tokenizer,
    spec: ImageSpec,
    report: Report = print,
    board: Board | None = None,
    keep: str | None = None,
) -> PreparedSet:
    """The prepared set of `data.records`, reused where it has been made before. `report` gets what happens, line by line.

    The records that are being looked at stand on the `board`, of `data.workers`. A set whose images have changed since is made
    anew. But not the set of digest `keep`, which a run began with: a few bad images are no reason to end it, as training leaves
    them out.

    Bad records are left out and listed in the set's quarantine.jsonl. Raises UserError when more than
    `data.max_quarantined_share` are bad, when none is usable, and for every mistake in the settings or the files.
    """
    template(data.template)
    if data.images is not None and not data.images.is_dir():
        raise UserError(f"data.images: {data.images} is no folder; give the one that the records' image paths start from")
    root = data.prepared_dir or cache_root() / "prepared"
    content = _content(data, tokenizer, spec)
    images = None if data.images is None else str(data.images.resolve())
    folder = root.absolute() / hashlib.sha256(json.dumps([content, images], sort_keys=True).encode()).hexdigest()[:32]
    preparer = Preparer(data, tokenizer, spec.patches, board or Board(data.workers))
    try:
        if not root.is_dir():
            root.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_suffix(".lock")):
            prepared = find_set(folder, preparer, report, keep)
            if prepared is None:
                report(f"preparing {data.records} with template {data.template} into {folder}")
                prepared = _make(folder, content, images, preparer, report)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"data.prepared_dir: {root} cannot be used ({reason}); free space there or choose another") from None
    report(summary(prepared))
    refuse(prepared, data.max_quarantined_share)
    return prepared


def _content(data: DataConfig, tokenizer: Tokenizer, spec: ImageSpec) -> dict[str, Any]:
    """Everything that the rows depend on, but for the image files."""
    listed = None
    if data.image_checksums is not None:
        read_checksums(data.image_checksums)
        listed = file_sha256(data.image_checksums)
    try:
        with open_records(data.records) as file:
            source = {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}
    except UserError as error:
        raise UserError(f"data.records: {error}") from None
    except OSError as error:
        raise UserError(f"data.records: {data.records} cannot be read ({error.strerror}); give the path of a LLaVA JSON file") from None
    limits = ("max_image_bytes", "max_image_pixels", "min_image_side", "max_image_aspect", "follow_links")
    # Left out where it was all there was, so that sets prepared then stay good.
    several = {} if data.max_images == 1 else {"max_images": data.max_images}
    return {
        "format": FORMAT,
        "source": source,
        "tokenizer": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "template": data.template,
        "image_policy": data.image_policy,
        "image_spec": spec.written(),
        "max_tokens": data.max_tokens,
        **several,
        "image_checksums": listed,
        "limits": {key: getattr(data, key) for key in limits},
    }


def _make(folder: Path, content: dict[str, Any], images: str | None, preparer: Preparer, report: Report) -> PreparedSet:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with writing(folder.parent):
        try:
            _fill(partial, content, images, preparer, report)
        except BaseException:
            # A full disk above all: what is of no use frees the space.
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if folder.exists():
        _put_aside(folder)
    partial.rename(folder)
    sync(folder.parent)
    return PreparedSet.open(folder)


def _fill(partial: Path, content: dict[str, Any], images: str | None, preparer: Preparer, report: Report) -> None:
    """All files of a set, on the disk."""
    counts = _write_rows(partial, preparer, report)
    counts["rows_bytes"] = (partial / ROWS).stat().st_size
    counts |= {f"{Path(name).stem}_sha256": file_sha256(partial / name) for name in FILES}
    versions = {"fastllava": fastllava.__version__, "pillow": PIL.__version__, "sentencepiece": sentencepiece.__version__}
    where = {"records": str(preparer.data.records.absolute()), "images": images}
    manifest = {**content, **counts, "where": where, "made_with": versions}
    manifest["checksum"] = checksum_of(manifest)
    (partial / MANIFEST).write_bytes(in_json(manifest))
    for file in partial.iterdir():
        sync(file)
    sync(partial)


def _put_aside(folder: Path) -> None:
    """Move the old set out of the way of a new one. The old one, if whole, is kept for the runs that began with it; those before it go.

    A run that reads rows that go keeps them: its memory map holds on to the file.
    """
    try:
        name = replaced(folder, PreparedSet.open(folder).digest)
    except UserError:
        name = folder.with_suffix(".stale")
    for older in (*folder.parent.glob(f"{folder.name}-*"), folder.with_suffix(".stale")):
        shutil.rmtree(older, ignore_errors=True)
    folder.rename(name)
    if name.suffix == ".stale":
        shutil.rmtree(name, ignore_errors=True)


def _write_rows(partial: Path, preparer: Preparer, report: Report) -> dict[str, Any]:
    """Writes rows and quarantine; what the manifest says of them."""
    data = preparer.data
    before = data.records.stat()
    workers = data.workers if before.st_size > _SMALL_SOURCE else 0
    reasons: Counter[str] = Counter()
    other_keys: Counter[str] = Counter()
    records = rows = truncated = images_cut = left_out = turned = 0
    times = array("q")
    said = started = time.monotonic()
    with (
        pa.OSFile(str(partial / ROWS), "wb") as sink,
        pa.ipc.new_file(sink, preparer.schema) as writer,
        (partial / QUARANTINE).open("w", encoding="utf-8") as quarantine,
    ):
        for batch in prepare_batches(read_records(data.records), preparer, workers):
            table = pa.ipc.read_record_batch(pa.py_buffer(batch.rows), preparer.schema)
            if table.num_rows:
                writer.write_batch(table)
            for entry in batch.quarantined:
                # Escaped: a text may hold half a character.
                quarantine.write(json.dumps(entry) + "\n")
                reasons[entry["reason"]] += 1
            records += batch.records
            rows += table.num_rows
            truncated += batch.truncated
            images_cut += batch.images_cut
            left_out += batch.left_out
            count_keys(other_keys, batch.other_keys)
            turned += batch.turned
            times.extend(batch.image_times)
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                report(f"  {records:,} records, {records / (said - started):,.0f} a second")
    np.save(partial / TIMES, np.array(times, np.int64))
    after = data.records.stat()
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        raise UserError(f"data.records: {data.records} changed while it was read; start again when it is complete")
    return {
        "records": records,
        "rows": rows,
        "quarantined": records - rows,
        "reasons": dict(sorted(reasons.items())),
        "truncated": truncated,
        **({} if data.max_images == 1 else {"images_cut": images_cut}),
        "answers_left_out": left_out,
        "other_keys": dict(sorted(other_keys.items())),
        "turned": turned,
    }


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time makes a set; the others wait and then find it.

    Where nothing can be written no set can be made either, and one that is there needs no lock.
    """
    try:
        file = path.open("w")
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or not path.with_suffix("").is_dir():
            raise
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
