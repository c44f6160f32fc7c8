"""Reads a pickle of plain values: lists, objects, texts and numbers. One that asks for anything else is refused before it runs.

RefCOCO's annotations are pickles, and a pickle may run whatever code its writer chose.
"""

import io
import pickle
from pathlib import Path
from typing import Any

from fastllava.data.records import open_records
from fastllava.errors import UserError

_LARGEST = 2 * 2**30


class _PlainUnpickler(pickle.Unpickler):
    """Finds no class and no function."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")

    def persistent_load(self, pid: Any, /) -> Any:
        raise pickle.UnpicklingError("it asks for an object from elsewhere")


def read_plain_pickle(path: Path) -> Any:
    """The value of the pickle, texts of Python 2 as Latin-1. Raises UserError."""
    with open_records(path) as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise UserError(f"{path}: has more than {_LARGEST >> 30} GiB, so it is no pickle of RefCOCO's; give refs(unc).p or the like")
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except MemoryError:
        raise UserError(f"{path}: asks for more memory than there is; fetch the file again") from None
    except Exception as error:
        # Damaged pickles raise whatever their bytes happen to lead to.
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: is no pickle of plain lists, objects, texts and numbers ({said}); fetch the file again") from None
