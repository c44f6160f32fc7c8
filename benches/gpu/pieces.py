"""The pieces of `fastllava bench gpu`, in the order of their worth on a GPU that is there for minutes only."""

import importlib
from collections.abc import Iterator, Mapping

from benches.gpu.context import Piece

MODULES = {
    "ceilings": "ceilings",
    "tests": "tests",
    "kernels": "kernels",
    "step": "steps",
    "peers": "steps",
    "ablate": "steps",
    "profile": "profile",
    "tuning": "tuning",
    "sanitizer": "sanitizer",
}
"""By piece, the module of benches/gpu with a `Piece` of that name in capitals."""


class Pieces(Mapping[str, Piece]):
    """Each is imported when it is asked for: a process needs one of them, and some import for seconds."""

    def __getitem__(self, name: str) -> Piece:
        return getattr(importlib.import_module(f"benches.gpu.{MODULES[name]}"), name.upper())

    def __iter__(self) -> Iterator[str]:
        return iter(MODULES)

    def __len__(self) -> int:
        return len(MODULES)


PIECES: Mapping[str, Piece] = Pieces()
