"""From records to rows of a prepared set, in worker processes or here; the rows do not depend on which."""

import gc
import multiprocessing
import os
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from fastllava.batch import IMAGE_ID
from fastllava.config import DataConfig
from fastllava.config.keys import MOST_IMAGES
from fastllava.console.printable import quoted, shortened
from fastllava.data.checks import BadRecord, Record, check_record
from fastllava.data.checksums import read_checksums
from fastllava.data.columns import Columns, schema
from fastllava.data.conversation import Encoded, cut, encode_record
from fastllava.data.images import Examined, examine, resolve_image
from fastllava.data.marks import check_marks
from fastllava.data.records import Raw
from fastllava.data.templates import template
from fastllava.data.tokenizer import Tokenizer
from fastllava.data.workers import Board, begin_worker, children, kill, stops_held
from fastllava.errors import UserError

_BATCH_RECORDS = 1024
_BATCH_SIZE = 8 * 2**20
_MOST_KEYS = 1000
_OTHERS = "others"


@dataclass(frozen=True)
class Fitted:
    """A record's ids when each image has become patches and the whole has been cut at `data.max_tokens` rows."""

    encoded: Encoded
    n_tokens: int
    n_supervised: int
    """Targets that count in the loss: labels[1:] != -100 in the original."""
    n_images: int
    """Images of which a patch is left."""
    truncated: bool
    image_cut: bool
    """Whether the cut has taken away an image, or patches of one."""


def fit(encoded: Encoded, patches: int, max_tokens: int) -> Fitted:
    """Cut as `prepare_inputs_labels_for_multimodal` of the original cuts; a partly cut image keeps its mark."""
    images = [at for at, token in enumerate(encoded.ids) if token == IMAGE_ID]
    n_rows = len(encoded.ids) + len(images) * (patches - 1)
    kept = max_tokens
    n_images = ends = 0
    for at in images:
        begins = at + n_images * (patches - 1)
        if begins >= max_tokens:
            break
        n_images, ends = n_images + 1, begins + patches
        kept = max(at + 1, max_tokens - n_images * (patches - 1))
    cut_off = n_images < len(images) or ends > max_tokens
    encoded = cut(encoded, kept)
    n_supervised = sum(end - max(begin, 1) for begin, end in encoded.supervised)
    return Fitted(encoded, min(n_rows, max_tokens), n_supervised, n_images, n_rows > max_tokens, cut_off)


@dataclass
class Batch:
    """What a stretch of records became."""

    rows: bytes
    """An Arrow record batch of `columns.schema`, serialized."""
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    """One line of quarantine.jsonl each."""
    records: int = 0
    image_times: array = field(default_factory=lambda: array("q"))
    """When each image was last written, nanoseconds; where a record has one at most, a 0 for each without."""
    turned: int = 0
    """Rows with an image that EXIF says to turn, which nobody does."""
    truncated: int = 0
    """Rows that lost tokens to `data.max_tokens`."""
    images_cut: int = 0
    """Those of them that lost an image, or patches of one."""
    left_out: int = 0
    """Answers of rows that are not learned, as their turns say."""
    other_keys: Counter[str] = field(default_factory=Counter)
    """Rows with each key that means nothing here."""


class Preparer:
    """Turns records into rows. Picklable."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, patches: int, board: Board | None = None) -> None:
        """What is being looked at stands on the `board`, which a copy of this does not have."""
        self._state = (data, tokenizer, patches)
        self.board = board or Board(1)
        self.data, self.tokenizer, self.patches = data, tokenizer, patches
        self.form, self.schema = template(data.template), schema(data.max_images)
        check_marks(self.form, tokenizer)
        self.root = None if data.images is None else data.images.resolve()
        self._checked = lru_cache(maxsize=65536)(self._check)
        self._listed: dict[str, bytes] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Preparer, self._state

    def batch(self, raws: list[Raw]) -> Batch:
        """Raises UserError where no record could be used for want of a setting."""
        columns = Columns(self.schema)
        result = Batch(b"", records=len(raws))
        for raw in raws:
            try:
                with self.board.at(raw.index):
                    record, fitted = self._add(columns, result, raw)
            except BadRecord as problem:
                result.quarantined.append(_quarantined(raw, problem))
                continue
            result.truncated += fitted.truncated
            result.images_cut += fitted.image_cut
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

    def images(self, paths: Sequence[str], name: Any) -> list[Examined]:
        """The images of the record called `name`. Raises BadRecord when one of them cannot be used."""
        found = []
        for number, path in enumerate(paths, 1):
            try:
                found.append(self.image(path, name))
            except BadRecord as problem:
                if len(paths) == 1:
                    raise
                raise BadRecord(problem.reason, f"image {number} of {len(paths)}, {quoted(path)}: {problem.detail}") from None
        return found

    def _add(self, columns: Columns, result: Batch, raw: Raw) -> tuple[Record, Fitted]:
        """Appends the record's row; the record, and what of it was left. Raises BadRecord."""
        if raw.problem is not None:
            raise raw.problem
        record: Record = check_record(raw.value, raw.index, self.data.max_images)
        encoded = encode_record(record, self.form, self.tokenizer, self.data.max_tokens)
        fitted = fit(encoded, self.patches, self.data.max_tokens)
        if not fitted.n_supervised:
            cut = f"among the first {self.data.max_tokens} rows, those of the image{'s' * (len(record.images) > 1)} included"
            raise BadRecord("nothing_supervised", f"no supervised token {cut}; shorten the question")
        shown = self.images(record.images, record.id)[: fitted.n_images]
        name = shortened(str(record.id).encode(errors="replace").decode())
        stamps = [one.stamp for one in shown]
        images = list(record.images[: len(shown)]), [stamp.size for stamp in stamps], [stamp.digest for stamp in stamps]
        times = [stamp.mtime_ns for stamp in stamps]
        if self.data.max_images == 1:
            images, times = tuple(next(iter(column), None) for column in images), times or [0]
        counts = (fitted.n_tokens, fitted.n_supervised, fitted.n_images, record.length_key)
        encoded = fitted.encoded
        columns.add((raw.index, name, *images, *counts), encoded.ids, chain.from_iterable(encoded.supervised))
        result.image_times.extend(times)
        result.turned += any(one.turned for one in shown)
        return record, fitted


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
    if isinstance(image, list) and len(image) <= MOST_IMAGES and all(isinstance(one, str) for one in image):
        return {**entry, "image": [shortened(one, 4096) for one in image]}
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
