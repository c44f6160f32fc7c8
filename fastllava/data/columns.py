"""The columns of a prepared set, and rows as they gather before Arrow has them."""

from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from fastllava.data.images import DIGEST_BYTES

_LISTS = ("ids", "supervised")
_IMAGE = {"image": pa.string(), "image_bytes": pa.int64(), "image_digest": pa.binary(DIGEST_BYTES)}
"""What a set holds of an image."""


def schema(max_images: int) -> pa.Schema:
    """One row a usable record; `index` is its number in the source, `supervised` its ranges one after another.

    What it holds of images are lists where a record may have several; else null where it has none, as in sets made before.
    """
    images = {name: kind if max_images == 1 else pa.list_(kind) for name, kind in _IMAGE.items()}
    return pa.schema(
        {
            "index": pa.int64(),
            "id": pa.string(),
            "ids": pa.list_(pa.int32()),
            "supervised": pa.list_(pa.int32()),
            **images,
            "n_tokens": pa.int32(),
            "n_supervised": pa.int32(),
            "n_images": pa.int8(),
            "length_key": pa.int32(),
        }
    )


class Columns:
    """Rows as they gather; lists lie flat, as Arrow keeps them."""

    def __init__(self, of: pa.Schema) -> None:
        self.schema = of
        self.plain: dict[str, list[Any]] = {field.name: [] for field in of if field.name not in _LISTS}
        self.flat = {name: array("i") for name in _LISTS}
        self.offsets = {name: array("i", [0]) for name in _LISTS}

    def add(self, plain: tuple[Any, ...], *lists: Iterable[int]) -> None:
        """Puts a row behind the others: its values in the order of the columns, then its `ids` and `supervised`."""
        for column, value in zip(self.plain.values(), plain, strict=True):
            column.append(value)
        for name, values in zip(_LISTS, lists, strict=True):
            self.flat[name].extend(values)
            self.offsets[name].append(len(self.flat[name]))

    def serialize(self) -> bytes:
        """All rows as an Arrow record batch."""
        arrays = []
        for column in self.schema:
            if column.name in _LISTS:
                offsets, flat = (pa.array(np.frombuffer(part[column.name], np.int32)) for part in (self.offsets, self.flat))
                arrays.append(pa.ListArray.from_arrays(offsets, flat))
            else:
                arrays.append(pa.array(self.plain[column.name], column.type))
        return pa.record_batch(arrays, schema=self.schema).serialize().to_pybytes()
