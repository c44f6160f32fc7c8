"""The reference of a room through torch.compile, as an implementation: elementwise ops and norms fuse into one kernel a pass."""

import os
import shutil
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from fastllava_kernels.room import Implementation

FEWEST = 2
"""Rows from which a graph is worth having: torch.compile makes one of its own for 0 rows and one for 1 row."""


def compiled(reference: Callable[..., Any], backend: str | Callable[..., Any] = "inductor") -> Callable[..., Any]:
    """Return `reference` as one graph, compiled at the first call and once for every number of rows.

    Rows are the first axis of every argument with two axes or more; the other sizes are constants of the graph. Where a
    larger graph is being compiled around it, it is the reference, which that graph fuses; so it is for fewer rows than FEWEST.
    """

    @cache
    def graph() -> Callable[..., Any]:
        return torch.compile(reference, fullgraph=True, backend=backend)

    @wraps(reference)
    def function(*args: Any) -> Any:
        with_rows = [x for x in args if isinstance(x, Tensor) and x.ndim > 1]
        if torch.compiler.is_compiling() or any(x.shape[0] < FEWEST for x in with_rows):
            return reference(*args)
        for x in with_rows:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return graph()(*args)

    return function


def compiled_implementation(reference: Callable[..., Any]) -> Implementation:
    """The implementation `compiled` of a room: its reference through torch.compile, which `auto` takes on a GPU only."""
    return Implementation(compiled(reference), needs_compiler, auto_on=frozenset({"cuda"}))


def needs_compiler(device: torch.device, dtype: torch.dtype) -> str | None:
    """The `unsupported` of a compiled reference: why torch.compile cannot make code for `device`, or None."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "torch.compile needs compute capability 7.0 or newer"
        return None
    return None if _has_cxx_compiler() else "torch.compile needs a C++ compiler for the CPU: install g++"


@cache
def _has_cxx_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None
