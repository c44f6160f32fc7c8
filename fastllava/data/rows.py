"""From records to rows of a prepared set, in worker processes or here; the rows do not depend on which."""

import gc
import multiprocessing
import os
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastllava.batch import IMAGE_ID
from fastllava.config import DataConfig
from fastllava.console.printable import shortened
from fastllava.data.checks import BadRecord, Record, check_record
from fastllava.data.checksums import read_checksums
from fastllava.data.conversation import Encoded, cut, encode_record
from fastllava.data.images import DIGEST_BYTES, Examined, examine, resolve_image
from fastllava.data.marks import check_marks
from fastllava.data.records import Raw
from fastllava.data.templates import template
from fastllava.data.tokenizer import Tokenizer
from fastllava.data.workers import Board, begin_worker, children, kill, stops_held
from fastllava.errors import UserError

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("id", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.int32())),
        ("image", pa.string()),
        ("image_bytes", pa.int64()),
        ("image_digest", pa.binary(DIGEST_BYTES)),
        ("n_tokens", pa.int32()),
        ("n_supervised", pa.int32()),
        ("n_images", pa.int8()),
        ("length_key", pa.int32()),
    ]
)
"""One row a usable record; `index` is its number in the source, `supervised` its ranges one after another."""

_LISTS = ("ids", "supervised")
_BATCH_RECORDS = 1024
_BATCH_SIZE = 8 * 2**20
_MOST_KEYS = 1000
_OTHERS = "others"


@dataclass(frozen=True)
class Fitted:
    """A record's ids when the image has become patches and the whole has been cut at `data.max_tokens` rows."""

    encoded: Encoded
    n_tokens: int
    n_supervised: int
    """Targets that count in the loss: labels[1:] != -100 in the original."""
    n_images: int
    truncated: bool


def fit(encoded: Encoded, patches: int, max_tokens: int) -> Fitted:
    """Cut as `prepare_inputs_labels_for_multimodal` of the original cuts; a partly cut image keeps its mark."""
    extra, kept = 0, max_tokens
    if IMAGE_ID in encoded.ids and (at := encoded.ids.index(IMAGE_ID)) < max_tokens:
        extra = patches - 1
        kept = max(at + 1, max_tokens - extra)
    n_tokens = min(len(encoded.ids) + extra, max_tokens)
    encoded = cut(encoded, kept)
    n_supervised = sum(end - max(begin, 1) for begin, end in encoded.supervised)
    return Fitted(encoded, n_tokens, n_supervised, encoded.ids.count(IMAGE_ID), n_tokens < encoded.length + extra)


@dataclass
class Batch:
    """What a stretch of records became."""

    rows: bytes
    """An Arrow record batch of SCHEMA, serialized."""
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    """One line of quarantine.jsonl each."""
    records: int = 0
    image_times: array = field(default_factory=lambda: array("q"))
    """When the image of each row was last written, nanoseconds; 0 without one."""
    turned: int = 0
    """Rows whose image EXIF says to turn, which nobody does."""
    truncated: int = 0
    """Rows that lost tokens to `data.max_tokens`."""
    left_out: int = 0
    """Answers of rows that are not learned, as their turns say."""
    other_keys: Counter[str] = field(default_factory=Counter)
    """Rows with each key that means nothing here."""


class _Columns:
    """Rows as they gather; lists lie flat, as Arrow keeps them."""

    def __init__(self) -> None:
        self.plain: dict[str, list[Any]] = {field.name: [] for field in SCHEMA if field.name not in _LISTS}
        self.flat = {name: array("i") for name in _LISTS}
        self.offsets = {name: array("i", [0]) for name in _LISTS}

    def add(self, plain: tuple[Any, ...], *lists: Iterable[int]) -> None:
        for column, value in zip(self.plain.values(), plain, strict=True):
            column.append(value)
        for name, values in zip(_LISTS, lists, strict=True):
            self.flat[name].extend(values)
            self.offsets[name].append(len(self.flat[name]))

    def serialize(self) -> bytes:
        arrays = []
        for column in SCHEMA:
            if column.name in _LISTS:
                offsets, flat = (pa.array(np.frombuffer(part[column.name], np.int32)) for part in (self.offsets, self.flat))
                arrays.append(pa.ListArray.from_arrays(offsets, flat))
            else:
                arrays.append(pa.array(self.plain[column.name], column.type))
        return pa.record_batch(arrays, schema=SCHEMA).serialize().to_pybytes()


class Preparer:
    """Turns records into rows. Picklable."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, patches: int, board: Board | None = None) -> None:
        """What is being looked at stands on the `board`, which a copy of this does not have."""
        self._state = (data, tokenizer, patches)
        self.board = board or Board(1)
        self.data, self.tokenizer, self.patches = data, tokenizer, patches
        self.form = template(data.template)
        check_marks(self.form, tokenizer)
        self.root = None if data.images is None else data.images.resolve()
        self._checked = lru_cache(maxsize=65536)(self._check)
        self._listed: dict[str, bytes] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Preparer, self._state

    def batch(self, raws: list[Raw]) -> Batch:
        """Raises UserError where no record could be used for want of a setting."""
        columns = _Columns()
        result = Batch(b"", records=len(raws))
        for raw in raws:
            try:
                with self.board.at(raw.index):
                    record, truncated = self._add(columns, result, raw)
            except BadRecord as problem:
                result.quarantined.append(_quarantined(raw, problem))
                continue
            result.truncated += truncated
            result.left_out += len(record.left_out)
            count_keys(result.other_keys, dict.fromkeys(record.other_keys, 1))
        result.rows = columns.serialize()
        return result

    def image(self, relative: str, name: Any) -> Examined:
        """The image `relative` of the record called `name`. Raises BadRecord when it cannot be used."""
        if self.root is None:
            given = f"is not set, and record {name!r} has the image {relative!r}"
            raise UserError(f"data.images: {given}; write the folder that image paths start from")
        path = resolve_image(self.root, relative, self.data.follow_links)
        try:
            found = path.stat()
        except (OSError, ValueError):
            verdict = self._check(str(path))
        else:
            # Many records share an image; one that is the same file still, byte count and times included, is judged once.
            verdict = self._checked(str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if isinstance(verdict, BadRecord):
            raise verdict.with_traceback(None)
        if self.data.image_checksums is not None:
            self._compare(relative, verdict)
        return verdict

    def _check(self, path: str, *_: int) -> Examined | BadRecord:
        try:
            return examine(Path(path), self.data)
        except BadRecord as problem:
            return problem

    def _compare(self, relative: str, examined: Examined) -> None:
        """Raises BadRecord unless the list `data.image_checksums` has the image as it is."""
        if self._listed is None:
            self._listed = read_checksums(self.data.image_checksums)  # pyright: ignore[reportArgumentType] (asked for when it is set)
        listed = self._listed.get(os.path.normpath(relative))
        if listed is None:
            raise BadRecord("image_checksum", f"{relative!r} is not in data.image_checksums; add its line, by sha256sum")
        if listed != examined.stamp.digest:
            raise BadRecord("image_checksum", f"{relative!r} is not as data.image_checksums lists it; restore the file")

    def _add(self, columns: _Columns, result: Batch, raw: Raw) -> tuple[Record, bool]:
        """Appends the record's row; the record, and whether it was cut. Raises BadRecord."""
        if raw.problem is not None:
            raise raw.problem
        record: Record = check_record(raw.value, raw.index)
        encoded = encode_record(record, self.form, self.tokenizer, self.data.max_tokens)
        fitted = fit(encoded, self.patches, self.data.max_tokens)
        if not fitted.n_supervised:
            cut = f"among the first {self.data.max_tokens} rows, those of the image included"
            raise BadRecord("nothing_supervised", f"no supervised token {cut}; shorten the question")
        examined = None if record.image is None else self.image(record.image, record.id)
        name = shortened(str(record.id).encode(errors="replace").decode())
        if not fitted.n_images:
            examined = None
        image = (None,) * 3 if examined is None else (record.image, examined.stamp.size, examined.stamp.digest)
        counts = (fitted.n_tokens, fitted.n_supervised, fitted.n_images, record.length_key)
        encoded = fitted.encoded
        columns.add((raw.index, name, *image, *counts), encoded.ids, chain.from_iterable(encoded.supervised))
        result.image_times.append(0 if examined is None else examined.stamp.mtime_ns)
        result.turned += examined is not None and examined.turned
        return record, fitted.truncated


def prepare_batches(raws: Iterable[Raw], preparer: Preparer, workers: int) -> Iterator[Batch]:
    """The rows of all records, in order. `workers` 0 works in this process."""
    batches = _cut_batches(raws)
    if workers == 0:
        yield from map(preparer.batch, batches)
        return
    # Spawned, not forked: by now threads may run here, and a fork would inherit their locks.
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # or it would be started within `stops_held`, which it undoes
    others, done = children(), False
    start = preparer, os.getpid(), preparer.board, context.Value("i", 0)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=start)
    pending: deque[Future[Batch]] = deque()
    try:
        for batch in batches:
            with stops_held():
                pending.append(pool.submit(_work, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        done = True
    except BrokenProcessPool:
        raise UserError("data.workers: a worker process died, perhaps for want of memory; write fewer, or 0") from None
    finally:
        if not done:
            # What they are at, which may hang, is of no use any more.
            kill(children() - others)
        pool.shutdown(wait=True, cancel_futures=True)


def count_keys(total: Counter[str], more: dict[str, int]) -> None:
    """Adds counts of keys; where their names know no end, the rest goes under one."""
    for key, count in more.items():
        total[key if key in total or len(total) < _MOST_KEYS else _OTHERS] += count


def _cut_batches(raws: Iterable[Raw]) -> Iterator[list[Raw]]:
    batch: list[Raw] = []
    size = 0
    for raw in raws:
        batch.append(raw)
        size += raw.size
        if len(batch) == _BATCH_RECORDS or size >= _BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _quarantined(raw: Raw, problem: BadRecord) -> dict[str, Any]:
    value = raw.value if isinstance(raw.value, dict) else {}
    name, image = value.get("id"), value.get("image")
    if isinstance(name, str) or (isinstance(name, int) and abs(name) >= 2**63):
        name = shortened(str(name))
    entry = {
        "index": raw.index,
        "line": raw.line,
        "id": name if isinstance(name, (str, int)) else f"#{raw.index}",
        "reason": problem.reason,
        "detail": problem.detail,
    }
    # A path is shorter than this; longer is a picture in the record, which is not copied.
    return {**entry, "image": shortened(image, 4096)} if isinstance(image, str) else entry


_worker: list[Preparer] = []


def _start_worker(preparer: Preparer, parent: int, board: Board, taken: Any) -> None:
    begin_worker(parent)
    with taken.get_lock():
        board.slot, taken.value = taken.value, taken.value + 1
    preparer.board = board
    _worker[:] = [preparer]
    # What has been loaded by now stays; the garbage collector need not look at it again and again.
    gc.freeze()


def _work(raws: list[Raw]) -> Batch:
    return _worker[0].batch(raws)
