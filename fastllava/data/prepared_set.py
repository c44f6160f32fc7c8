"""A prepared set as training reads it: rows in memory-mapped Arrow IPC, and a manifest that says what they were made from."""

import bisect
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastllava.batch import IMAGE_ID
from fastllava.data.images import ImageStamp
from fastllava.errors import UserError

ROWS, MANIFEST, QUARANTINE, TIMES = "rows.arrow", "manifest.json", "quarantine.jsonl", "image_times.npy"
FILES = (ROWS, QUARANTINE, TIMES)
"""Those whose hashes the manifest holds."""
_NOT_CONTENT = ("where", "made_with", "checksum", "image_times_sha256")
"""Parts of the manifest that say nothing about the content, so that a set may move, and so may its images, with new times."""


@dataclass(frozen=True)
class PreparedRow:
    """One sample."""

    id: str
    ids: NDArray[np.int32]
    """[n] token ids, IMAGE_ID where an image stands; read-only."""
    supervised: NDArray[np.int32]
    """[k, 2] half-open ranges into `ids`; read-only."""
    images: tuple[str, ...]
    """Paths below the image folder, one for each IMAGE_ID: without those that the cut took away whole."""
    stamps: tuple[ImageStamp, ...]
    """What each image was when the set was made."""

    @property
    def shows(self) -> str | list[str] | None:
        """The images as a record has them: a path, a list of several, or None."""
        return list(self.images) if len(self.images) > 1 else next(iter(self.images), None)


class PreparedSet:
    """N samples, in the order of the source. Cheap to open; a pickled one opens again on the other side."""

    def __init__(self, folder: Path, manifest: dict[str, Any], table: pa.Table, times: NDArray[np.int64]) -> None:
        self.folder, self.manifest = folder, manifest
        self.digest = digest_of(manifest)
        """Hash of the manifest, places aside: what a checkpoint stores."""
        images = manifest["where"]["images"]
        self.images_root = None if images is None else Path(images)
        self._table = table
        self.image_starts = image_starts(table)
        """int64 [N+1]: where the places of each sample's images begin among the K places of all, and K."""
        self.image_bytes: NDArray[np.int64] = _flat(table, "image_bytes").fill_null(0).to_numpy()
        """[K] bytes of each image file. A set whose samples have one at most has a place for each sample, and 0 where there is none."""
        self.image_times: NDArray[np.int64] = np.asarray(times)
        """[K] when each image was last written, nanoseconds."""
        self._chunks: dict[int, tuple[NDArray, ...]] = {}
        self._starts = np.cumsum([0] + [len(chunk) for chunk in table.column("ids").chunks]).tolist()
        self.n_tokens: NDArray[np.int32] = self._column("n_tokens", np.int32)
        """[N] rows of each sample once the image has become patches and all is cut at max_tokens."""
        self.n_supervised: NDArray[np.int32] = self._column("n_supervised", np.int32)
        """[N] targets of each sample that count in the loss."""
        self.n_images: NDArray[np.int8] = self._column("n_images", np.int8)
        """[N] images of each sample."""
        self.length_key: NDArray[np.int32] = self._column("length_key", np.int32)
        """[N] the original's modality_lengths: whitespace words, negative when text-only."""

    @classmethod
    def open(cls, folder: Path, verify: bool = False) -> "PreparedSet":
        """The set in `folder`. Raises UserError when there is none or a file is not as it was written.

        That is told from the sizes, and with `verify` from every byte.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            if manifest["checksum"] != checksum_of(manifest):
                raise ValueError(f"{MANIFEST} has changed")
            if (folder / ROWS).stat().st_size != manifest["rows_bytes"]:
                raise ValueError(f"{ROWS} has lost bytes")
            # Before anything is read from them: Arrow trusts what it maps.
            changed = [name for name in FILES if verify and file_sha256(folder / name) != manifest[f"{Path(name).stem}_sha256"]]
            if changed:
                raise ValueError(f"{changed[0]} has changed")
            table = pa.ipc.open_file(pa.memory_map(str(folder / ROWS))).read_all()
            if verify and not all(_ids_within(chunk, manifest["vocab_size"]) for chunk in table.column("ids").chunks):
                raise ValueError(f"{ROWS} holds token ids that the tokenizer has not")
            times = np.load(folder / TIMES, mmap_mode="r", allow_pickle=False)
            if times.shape != (image_starts(table)[-1],) or times.dtype != np.int64:
                raise ValueError(f"{TIMES} is of other rows")
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise UserError(f"{folder}: holds no whole prepared set ({error}); delete the folder and run fastllava prepare") from None
        return cls(folder, manifest, table, times)

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedSet.open, (self.folder,)

    def __len__(self) -> int:
        return self._table.num_rows

    def row(self, i: int) -> PreparedRow:
        """Sample `i`, 0 <= i < N; its arrays look into the file."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        number = bisect.bisect_right(self._starts, i) - 1
        at = i - self._starts[number]
        id_begin, ids, supervised_begin, supervised = self._lists(number)
        chunk = {name: self._table.column(name).chunk(number)[at].as_py() for name in ("id", "image", "image_bytes", "image_digest")}
        images, sizes, digests = (_listed(chunk[name]) for name in ("image", "image_bytes", "image_digest"))
        times = self.image_times[self.image_starts[i] :][: len(images)].tolist()
        return PreparedRow(
            id=chunk["id"],
            ids=ids[id_begin[at] : id_begin[at + 1]],
            supervised=supervised[supervised_begin[at] : supervised_begin[at + 1]].reshape(-1, 2),
            images=tuple(images),
            stamps=tuple(map(ImageStamp, sizes, times, digests)),
        )

    def images(self) -> dict[str, list[int]]:
        """The places of each image, by its path below the image folder."""
        found: dict[str, list[int]] = {}
        for place, image in enumerate(_flat(self._table, "image").to_pylist()):
            if image is not None:
                found.setdefault(image, []).append(place)
        return found

    def sample_bytes(self) -> NDArray[np.int64]:
        """[N] bytes of each sample's image files together."""
        return np.diff(np.concatenate([np.zeros(1, np.int64), np.cumsum(self.image_bytes)])[self.image_starts])

    def samples_of(self, places: Iterable[int]) -> set[int]:
        """The samples that have an image at one of these places."""
        return set((np.searchsorted(self.image_starts, [*places], side="right") - 1).tolist())

    def stamp(self, place: int) -> ImageStamp:
        """What the image at this place was when the set was made."""
        sample = int(np.searchsorted(self.image_starts, place, side="right")) - 1
        return self.row(sample).stamps[place - int(self.image_starts[sample])]

    def named(self, name: str) -> list[int]:
        """The samples whose record is called `name`."""
        return [i for i, found in enumerate(self._table.column("id").to_pylist()) if found == name]

    def names(self, samples: Iterable[int]) -> list[str]:
        """What the records of these samples are called, in their order."""
        return [self.row(int(i)).id for i in samples]

    def places(self, samples: Iterable[int]) -> list[int]:
        """The numbers, from 0, that the records of these samples have in their file."""
        column = self._table.column("index")
        return [column[int(i)].as_py() for i in samples]

    def _column(self, name: str, dtype: type) -> NDArray:
        return self._table.column(name).to_numpy().astype(dtype, copy=False)

    def _lists(self, number: int) -> tuple[NDArray, ...]:
        """Offsets and values of the two list columns of a chunk, without a copy."""
        if number not in self._chunks:
            lists = [self._table.column(name).chunk(number) for name in ("ids", "supervised")]
            self._chunks[number] = tuple(part.to_numpy() for column in lists for part in (column.offsets, column.values))
        return self._chunks[number]


def image_starts(table: pa.Table) -> NDArray[np.int64]:
    """int64 [N+1]: see `PreparedSet.image_starts`."""
    column = table.column("image")
    if not pa.types.is_list(column.type):
        return np.arange(table.num_rows + 1)
    counts = [np.zeros(1, np.int64), *(np.diff(chunk.offsets.to_numpy()).astype(np.int64) for chunk in column.chunks)]
    return np.cumsum(np.concatenate(counts))


def _flat(table: pa.Table, name: str) -> pa.ChunkedArray:
    """[K]: a column of images, with null where a set without lists has none."""
    column = table.column(name)
    if not pa.types.is_list(column.type):
        return column
    return pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _ids_within(chunk: pa.ListArray, vocab_size: int) -> bool:
    """Whether all token ids are those of a vocabulary, or the image's mark: others are memory that is not the embedding's."""
    ids = chunk.values.to_numpy()
    return not len(ids) or (int(ids.max()) < vocab_size and bool(((ids >= 0) | (ids == IMAGE_ID)).all()))


def checksum_of(manifest: dict[str, Any]) -> str:
    """sha256 of all that the manifest says."""
    said = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest, without what depends on where and with which versions the set was made."""
    content = {key: value for key, value in manifest.items() if key not in _NOT_CONTENT}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
