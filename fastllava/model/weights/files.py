"""Tensors and JSON in files: read one tensor at a time, written atomically in shards.

Nothing read here can run code: .bin files go through torch.load(weights_only=True), and an index names files of its own folder only.
"""

import contextlib
import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fastllava.errors import UserError, or_download

SINGLE_AND_INDEX = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

# transformers would fetch and run what these name, with trust_remote_code.
_CODE = frozenset({"auto_map", "custom_pipelines"})


class TensorFiles:
    """The tensors of one file, or of a Hugging Face folder (single or sharded, safetensors before .bin), by name.

    `key` is the config key that gave `path`; errors begin with it. Raises UserError when nothing readable is there.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.files: dict[str, list[str]] = {}
        """Names of the tensors in each file, the file's path first."""
        if not path.exists():
            raise UserError(f"{key}: {path} does not exist; give the path of {'a file' if path.suffix else 'a folder'} that does")
        if path.is_file():
            self.files[str(path)] = self._names(path)
            return
        for single, index in SINGLE_AND_INDEX:
            if (path / single).is_file():
                self.files[str(path / single)] = self._names(path / single)
                return
            if (path / index).is_file():
                self._read_index(path / index)
                return
        names = ", ".join(name for pair in SINGLE_AND_INDEX for name in pair)
        raise UserError(f"{key}: no weights in {path}; it should hold one of {names}{or_download(path)}")

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""
        return [name for names in self.files.values() for name in names]

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every tensor, file by file. A tensor lies in the mapped file: copy it to keep it."""
        for file, names in self.files.items():
            with self._open(Path(file)) as tensors:
                for name in names:
                    if name not in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                        raise UserError(f"{self.key}: {file} lacks {name}, which the index says it holds; fetch the folder again")
                    yield name, tensors.get_tensor(name)

    def one(self, name: str) -> Tensor:
        """The tensor of that name; it lies in the mapped file."""
        file = next(file for file, names in self.files.items() if name in names)
        with self._open(Path(file)) as tensors:
            return tensors.get_tensor(name)

    def _names(self, file: Path) -> list[str]:
        with self._open(file) as tensors:
            return list(tensors.keys())

    def _read_index(self, index: Path) -> None:
        weight_map = read_json(index, self.key).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{self.key}: {index} has no weight_map; fetch the folder again")
        for name, file in weight_map.items():
            if not isinstance(file, str) or file != Path(file).name or file in ("", ".", "..") or "\\" in file:
                raise UserError(f"{self.key}: {index} places {name} in {file!r}; an index may name files of its own folder only")
            path = index.parent / file
            if str(path) not in self.files and not path.is_file():
                raise UserError(f"{self.key}: {path} is missing, and {index.name} names it; fetch the folder again")
            self.files.setdefault(str(path), []).append(name)

    @contextlib.contextmanager
    def _open(self, file: Path) -> Iterator[Any]:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    yield tensors
            else:
                yield _LoadedBin(file)
        except pickle.UnpicklingError:
            raise UserError(
                f"{self.key}: {file} holds more than plain tensors and was not loaded; "
                "save its tensors as .safetensors, or as a .bin that is a dict of tensors"
            ) from None
        except UserError:
            raise
        except Exception as error:  # a crafted file may fail in any way
            raise UserError(f"{self.key}: {file} cannot be read as weights ({_one_line(error)}); fetch it again") from None


class _LoadedBin:
    """A torch pickle of a flat dict of tensors, with safe_open's two methods."""

    def __init__(self, file: Path) -> None:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files older than torch 1.6 cannot be mapped.
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in loaded.items()):
            raise ValueError("not a flat dict of tensors")
        self._tensors: dict[str, Tensor] = loaded

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def read_json(path: Path, key: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError that begins with the config key `key`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = f"give the folder of a model in the Hugging Face format{or_download(path.parent)}"
        raise UserError(f"{key}: {path} does not exist; {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{key}: {path} cannot be read as JSON ({_one_line(error)}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{key}: {path} holds a JSON {type(value).__name__}, an object is needed; fetch it again")
    return value


def read_optional_json(path: Path, key: str) -> dict[str, Any]:
    """The JSON object in `path`, or an empty one when there is no such file."""
    return read_json(path, key) if path.is_file() else {}


def without_code(value: Any) -> Any:
    """`value`, of JSON, without the fields that name code of a checkpoint's own (`auto_map`), at any depth."""
    if isinstance(value, Mapping):
        return {name: without_code(inner) for name, inner in value.items() if name not in _CODE}
    return [without_code(inner) for inner in value] if isinstance(value, list) else value


def dump_json(value: Mapping[str, Any], path: Path) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
