"""The tensors of a checkpoint: written by torch.distributed.checkpoint in shards, and read without running what files say.

A tensor in a shard goes through torch.load(weights_only=True); what describes them, through `fastllava.train.state.dcp_metadata`.
"""

import errno
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from fastllava.disk import write_failure
from fastllava.distributed.processes import ALONE, Processes
from fastllava.errors import UserError
from fastllava.train.memory import is_out_of_memory
from fastllava.train.state.dcp_metadata import read_metadata


def write_shards(tensors: dict[str, Tensor], folder: Path, processes: Processes) -> None:
    """Write each process's part of `tensors` into `folder`, synced; all `processes` together. Raises OSError."""
    with _quiet():
        try:
            dcp_save(tensors, storage_writer=_Writer(folder, sync_files=True), **_group(processes))
        except CheckpointException as error:
            # It derives from BaseException, so an `except OSError` further up would let it through.
            causes = [cause for cause, _ in error.failures.values()]
            if any(map(is_out_of_memory, causes)):
                raise OSError(errno.ENOMEM, "not enough memory on the host; free some there, or write fewer data.workers") from None
            failures = [write_failure(cause, folder, sum(tensor.nbytes for tensor in tensors.values())) for cause in causes]
            raise next(filter(None, failures), OSError(_cause(error))) from None


def read_shards(tensors: dict[str, Tensor], folder: Path, processes: Processes = ALONE) -> None:
    """Fill `tensors` in place from `folder`, by name; all `processes` together. Raises UserError when they do not fit."""
    with processes.together():
        reader = _Reader(folder)
    with _quiet():
        try:
            dcp_load(tensors, storage_reader=reader, **_group(processes))
        except CheckpointException as error:
            if any(isinstance(cause, pickle.UnpicklingError) for cause, _ in error.failures.values()):
                raise UserError(f"{folder}: holds more than plain tensors and was not loaded; use a checkpoint that a run wrote") from None
            raise UserError(f"{folder}: does not fit this model ({_cause(error)}); use the config that wrote it") from None


def read_weights(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The whole tensors whose names begin with `prefix`, by the rest of their names. Raises UserError."""
    described = read_metadata(folder).state_dict_metadata.items()
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in described if name.startswith(prefix)}  # pyright: ignore[reportAttributeAccessIssue] (read_metadata finds tensors only)
    read_shards(tensors, folder)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


class _Writer(FileSystemWriter):
    """DCP's writer of files, which keeps to itself where they were written: the path may hold a password, and nobody reads it."""

    def storage_meta(self) -> StorageMeta | None:
        return None


class _Reader(FileSystemReader):
    """DCP's reader of files, given metadata that is known to be harmless."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._found = read_metadata(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._found


def _group(processes: Processes) -> dict[str, Any]:
    return {"no_dist": True} if processes.world == 1 else {"process_group": processes.host}


def _cause(error: CheckpointException) -> str:
    return "; ".join(dict.fromkeys(" ".join(str(exception).split()) for exception, _ in error.failures.values()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that one process is taken to be what is meant: it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
