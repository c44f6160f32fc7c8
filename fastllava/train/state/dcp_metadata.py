"""Reads `.metadata` of torch.distributed.checkpoint without running what it says.

That file is a pickle, and a pickle is a program: PyTorch's own reader would run it. Here each class that such a file may name
stands for an inert record of what it was called with, made anew for every file; nothing else can be named. The records are then
checked and turned into DCP's metadata of plain tensors. A manifest beside the file is no signature, so this holds for every file.
"""

import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo  # the only form in which DCP says where a tensor lies
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from fastllava.errors import UserError

METADATA_FILE = ".metadata"
SHARD_NAME = re.compile(r"__\d+_\d+\.distcp")
"""Files of tensors in DCP's folder."""

_LARGEST = 2**28
"""Bytes; a 13B model sharded over 64 GPUs stays below a tenth of this."""
_DTYPES = {str(d): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int32, torch.int64)}
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDED = {
    *((_METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties")),
    *((_METADATA, name) for name in ("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in _PATHS),
}


class _Record:
    """What the pickle said of one object."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Recorder(pickle.Unpickler):
    """Finds records in place of classes, and strings in place of dtypes."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        # Types of this one reading: whatever a file does to them is gone with it.
        self._types: dict[str, type[_Record]] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name == "torch" and f"torch.{global_name}" in _DTYPES:
            return f"torch.{global_name}"
        if (module_name, global_name) not in _RECORDED:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return self._types.setdefault(global_name, type(global_name, (_Record,), {}))


def read_metadata(folder: Path) -> Metadata:
    """DCP's metadata of the plain tensors in `folder`. Raises UserError when the file holds anything else, or cannot be read."""
    path = folder / METADATA_FILE
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        with path.open("rb") as file:
            return _metadata(_Recorder(file).load(), folder)
    except Exception as error:  # a pickle may fail in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: holds more or other than a description of tensors and was not used ({reason})") from None


def _metadata(record: Any, folder: Path) -> Metadata:
    said = _state(record, "Metadata")
    space = sum(file.stat().st_size for file in folder.iterdir() if SHARD_NAME.fullmatch(file.name))
    tensors: dict[str, Any] = {_text(name): _tensor(entry, space) for name, entry in _mapping(said["state_dict_metadata"]).items()}
    places = {_index(key): _place(value) for key, value in _mapping(said["storage_data"]).items()}
    plan = {_text(name): (_text(name),) for name in tensors}
    # Where it was written, and by which call, is nobody's business here.
    return Metadata(tensors, planner_data=plan, storage_data=places, storage_meta=StorageMeta(), version=said.get("version"))


def _tensor(entry: Any, space: int) -> TensorStorageMetadata:
    said = _state(entry, "TensorStorageMetadata")
    properties = _record(said["properties"], "TensorProperties").state
    dtype, size = _DTYPES[_text(properties[0])], _size(said["size"])
    if math.prod(size) * dtype.itemsize > space:
        raise ValueError(f"a tensor {list(size)} is larger than all files")
    if not isinstance(said["chunks"], list):
        raise TypeError("chunks are no list")
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in said["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype), size, [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks]
    )


def _index(record: Any) -> MetadataIndex:
    said = _state(record, "MetadataIndex")
    index = said.get("index")
    return MetadataIndex(_text(said["fqn"]), _size(said["offset"]), None if index is None else _number(index))


def _place(record: Any) -> _StorageInfo:
    said = _state(record, "_StorageInfo")
    file = _text(said["relative_path"])
    if not SHARD_NAME.fullmatch(file):
        raise ValueError(f"it places a tensor in {file!r}")
    if said.get("transform_descriptors"):
        raise ValueError("it wants its tensors transformed")
    return _StorageInfo(file, _number(said["offset"]), _number(said["length"]))


def _size(record: Any) -> torch.Size:
    (numbers,) = _record(record, "Size").args
    return torch.Size([_number(number) for number in numbers])


def _state(record: Any, name: str) -> Mapping[str, Any]:
    return _mapping(_record(record, name).state)


def _record(value: Any, name: str) -> _Record:
    if not isinstance(value, _Record) or type(value).__name__ != name:
        raise TypeError(f"{name} expected, {type(value).__name__} found")
    return value


def _mapping(value: Any) -> Mapping[Any, Any]:
    if type(value) is not dict:
        raise TypeError(f"dict expected, {type(value).__name__} found")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"str expected, {type(value).__name__} found")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a number from 0 on expected, {value!r} found")
    return value
