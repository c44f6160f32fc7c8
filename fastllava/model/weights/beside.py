"""Files written beside their place, synced and renamed; a config.json comes last, so a folder that has one is whole."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastllava.disk import sync, writing


@contextmanager
def beside_its_place(folder: Path, needed: int) -> Iterator[Path]:
    """A new folder inside `folder`; when the block ends well its files move to `folder`, config.json last, else it vanishes.

    Raises OSError for whatever cannot be written; about `needed` bytes will be.
    """
    with writing(folder, needed), _moved_to(folder) as beside:
        yield beside


def names_below(folder: Path) -> list[str]:
    """The files below `folder`, by name."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@contextmanager
def _moved_to(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for left_by_a_killed_run in folder.glob(".writing-*"):
        shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
    beside = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        yield beside
        files = sorted((path for path in beside.rglob("*") if path.is_file()), key=lambda path: path == beside / "config.json")
        for path in files:
            path.chmod(0o644)
            sync(path)
        if (beside / "config.json").exists():
            # An earlier checkpoint in the same folder may have been cut otherwise, and its files would be read first.
            for pattern in ("config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"):
                for stale in folder.glob(pattern):
                    stale.unlink()
        for path in files:
            place = folder / path.relative_to(beside)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
        sync(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def on_cpu(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as files take it."""
    return tensor.detach().to("cpu", dtype).contiguous()
