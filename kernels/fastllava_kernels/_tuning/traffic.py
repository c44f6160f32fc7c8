"""The bytes that every Triton kernel loads and stores, counted in Triton's interpreter: what a mask leaves out is not moved.

    TRITON_INTERPRET=1 python -m fastllava_kernels._tuning.traffic     a JSON line for each kernel that a pass launches

Each room runs with the widths of 7B and few rows, in fp16, which has bf16's size, with fp32 masters where something learns. Kernels
run with the blocks of an H100, and those with a fixed number of programs with as many for a row as at 7B. What is read again from L2
or L1 counts again.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from triton.runtime.interpreter import InterpreterBuilder

from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels._tuning import tune, tuning
from fastllava_kernels.room import rooms
from fastllava_kernels.workload import Pass, Shape

TRITON = "triton"
ARCHITECTURE = "sm_90"
TINY = "tiny"
WIDTHS = ("width", "tower_width", "heads", "key_heads", "head_dim", "rank")
"""The sizes that are those of 7B."""
ROWS = {"rows": 192, "patches": 128}
"""Those that are neither 7B's nor the tiny shape's: a row block of a product is full."""
_PAGE_BITS = 20

Run = Literal["evaluation", "forward", "backward"]
"""Forward with no gradient wanted, as a training runs it, and the way back."""


@dataclass(frozen=True)
class Traffic:
    """What one kernel moves in one pass of a room, in bytes."""

    room: str
    shape: str
    run: Run
    kernel: str
    loaded: int
    stored: int
    once: int
    """Each byte that it loads or stores, once."""
    floor: float
    """The least that the pass of the whole room must move (the workload's cost)."""

    @property
    def moved(self) -> int:
        """Loaded and stored."""
        return self.loaded + self.stored


@dataclass
class _Touched:
    """Which addresses were moved at least once."""

    pages: dict[int, NDArray[np.uint8]] = field(default_factory=dict)

    def mark(self, addresses: NDArray[np.uint64], size: int) -> None:
        """Elements of `size` bytes at these addresses."""
        pages = addresses >> np.uint64(_PAGE_BITS)
        for page in np.unique(pages).tolist():
            marks = self.pages.setdefault(page, np.zeros(1 << _PAGE_BITS, np.uint8))
            marks[addresses[pages == page] & np.uint64((1 << _PAGE_BITS) - 1)] = size

    def bytes(self) -> int:
        """All of them together."""
        return sum(int(marks.sum(dtype=np.int64)) for marks in self.pages.values())


@dataclass
class Counter:
    """Bytes of the kernels that run while `counting` is entered, by name."""

    moved: dict[tuple[str, str], int] = field(default_factory=dict)
    """By kernel and "load" or "store"."""
    _touched: dict[tuple[str, str], _Touched] = field(default_factory=dict)
    running: str = ""

    def count(self, way: str, pointers: Any, mask: Any) -> None:
        """An access of the running kernel through a block of pointers."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        key = self.running, way
        self.moved[key] = self.moved.get(key, 0) + addresses.size * size
        self._touched.setdefault(key, _Touched()).mark(addresses.astype(np.uint64), size)

    def launched(self) -> list[str]:
        """The kernels that ran, in the order of their first access."""
        return list(dict.fromkeys(kernel for kernel, _ in self.moved))

    def of(self, kernel: str) -> tuple[int, int, int]:
        """Loaded, stored, and each byte once."""
        once = sum(touched.bytes() for (name, _), touched in self._touched.items() if name == kernel)
        return self.moved.get((kernel, "load"), 0), self.moved.get((kernel, "store"), 0), once


@contextmanager
def counting() -> Iterator[Counter]:
    """Count what kernels load and store in the interpreter, where products are not computed. Raises RuntimeError outside of it."""
    if not INTERPRETED:
        raise RuntimeError("bytes are counted in the interpreter only; set TRITON_INTERPRET=1")
    counter, before = Counter(), {name: getattr(InterpreterBuilder, name) for name in _METHODS}
    load, store, _ = before.values()

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        counter.count("load", pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        counter.count("store", pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    def no_dot(self: Any, a: Any, b: Any, sums: Any, *rest: Any, **named: Any) -> Any:
        # Moves nothing, and in fp16 takes the interpreter minutes; no address depends on it.
        return sums

    for name, method in zip(_METHODS, (counted_load, counted_store, no_dot), strict=True):
        setattr(InterpreterBuilder, name, method)
    try:
        yield counter
    finally:
        for name, method in before.items():
            setattr(InterpreterBuilder, name, method)


_METHODS = ("create_masked_load", "create_masked_store", "create_dot")


def shapes(room: str) -> Mapping[str, Shape]:
    """What a room is run at: the widths of 7B and few rows; and rows of logits that are longer than a block."""
    known, (wide_name, widths) = rooms()[room].workload.shapes, _wide(room)
    found: dict[str, Shape] = {}
    for name, tiny in known.items():
        if name.partition("-")[0] == TINY:
            wide = {key: widths[key] for key in WIDTHS if key in tiny} | {key: rows for key, rows in ROWS.items() if key in tiny}
            found[name.replace(TINY, wide_name)] = {**tiny, **wide}
    if "supervised" in known[TINY]:
        in_a_block = max(kernel.constants.get("BLOCK_V", 0) for kernel in tuning.kernels().values() if kernel.room == room)
        found["long rows"] = {**known[TINY], "supervised": 3, "vocabulary": in_a_block + 16}
    return found


def _wide(room: str) -> tuple[str, Shape]:
    """The first shape of a room beside a decoder of 7B, and its name: "7b", or "tower" for a room of that."""
    name, shape = next(iter(tune.shapes(room, tune.SIZE).items()))
    return name.partition("-")[0], shape


def measure(room: str, name: str, shape: Shape) -> list[Traffic]:
    """What each kernel of a room moves at a shape."""
    dtype = torch.float16
    workload, function = rooms()[room].workload, rooms()[room].implementations[TRITON].function
    args = workload.inputs(shape, dtype, torch.device("cpu"), 0)
    found: list[Traffic] = []

    def note(run: Run, call: Callable[[], Any]) -> Any:
        with counting() as counter, ExitStack() as stack:
            for kernel in (kernel for kernel in tuning.kernels().values() if kernel.room == room):
                tell = _teller(counter, kernel.name)
                config = _for_few_rows(kernel.candidates[ARCHITECTURE][0], shape, _wide(room)[1])
                stack.enter_context(tuning.override(kernel.name, tuning.Noted(config, tell)))
            result = call()
        part: Pass = "backward" if run == "backward" else "forward"
        floor = workload.cost(shape, dtype, part).bytes
        found.extend(Traffic(room, name, run, kernel, *counter.of(kernel), floor) for kernel in counter.launched())
        return result

    with torch.no_grad():
        note("evaluation", lambda: function(*args))
    out = _outputs(note("forward", lambda: function(*args)))
    outs = [one for one in out if one.requires_grad]
    if outs:
        # The gradient of a loss is 1, as in training.
        note("backward", lambda: torch.autograd.backward(outs, [torch.ones_like(one) for one in outs]))
    return found


def _outputs(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _for_few_rows(config: tuning.Config, shape: Shape, wide: Shape) -> tuning.Config:
    """A configuration whose fixed number of programs, if it has one, is as many for a row of `shape` as for one of `wide`."""
    if "PROGRAMS" not in config:
        return config
    return {**config, "PROGRAMS": max(1, round(config["PROGRAMS"] * shape["rows"] / wide["rows"]))}


def _teller(counter: Counter, kernel: str) -> Callable[[], None]:
    return lambda: setattr(counter, "running", kernel)


def main() -> None:
    """Print a line for each kernel that each pass of each room launches."""
    torch.set_num_threads(1)
    for room in sys.argv[1:] or [name for name, room in rooms().items() if TRITON in room.implementations]:
        for name, shape in shapes(room).items():
            for one in measure(room, name, shape):
                sys.stdout.write(json.dumps(asdict(one)) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
