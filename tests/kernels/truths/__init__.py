"""One module a room: `truth`, `CASES`, `wrong` and `WRONG_CASE`."""

import importlib
from types import ModuleType


def truth_of(room: str) -> ModuleType:
    """The module of a room; a test fails for a room without one."""
    return importlib.import_module(f"truths.{room}")
