"""Block sizes, warps and stages of the Triton kernels, which are chosen offline and never change in a run.

Autotuning during training would let ranks and runs pick different configurations, and so different sums. A kernel lists its
candidates, the likely best first, and runs with the first one unless a table says otherwise: `tables/<arch>.json`, kernel ->
Triton minor version -> rows (the bucket's upper bound, or "any") -> configuration. `tune` writes them.
"""

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels.room import rooms

TABLES = Path(__file__).parent / "tables"
ANY = "any"
FIRST = "first candidate"
"""What a kernel runs with when no table has it."""

FUSION = {"enable_fp_fusion": True}
"""Options said at every launch: Triton 3.10 turns the default, and a multiply-add rounded twice gives other bits."""

Config = Mapping[str, int]
"""Constants of a kernel such as BLOCK_M, and num_warps, num_stages."""

_overridden: dict[str, Config] = {}


class Noted(Mapping[str, int]):
    """A configuration that knows whether a launch has taken it, and tells when one does."""

    def __init__(self, config: Config, tell: Callable[[], Any] = lambda: None) -> None:
        self._config, self._tell, self.taken = config, tell, False

    def __getitem__(self, key: str) -> int:
        self.taken = True
        self._tell()
        return self._config[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel (one variant of it) as the tables, the tuner and the ahead-of-time gate see it.

    A room's module with kernels has them in `KERNELS`, by name.
    """

    name: str
    """Its key in the tables, such as "projector_splice.linear_place": the room whose workload times it, then its own."""
    function: Any
    """The function that `@triton.jit` made."""
    signature: Mapping[str, str]
    """Triton's type of every parameter that is no constant, as in bf16 training: "*bf16", "*fp32", "*i64", "i32", "fp32"."""
    constants: Mapping[str, Any]
    """The constexpr parameters that are not tuned."""
    candidates: Mapping[str, Sequence[Config]]
    """Configurations to choose from for "sm_80", "sm_90" and "interpreter", the likely best first."""
    rows: str
    """The size in the shapes of the room's workload that the buckets bound."""
    buckets: Sequence[int] = ()
    """Upper bounds of rows to tune apart; above the last one and without any, "any"."""
    divisible: frozenset[str] = field(default_factory=frozenset)
    """Integers that are multiples of 16 in training, such as strides; pointers always are."""
    unaligned: Mapping[str, Any] = field(default_factory=dict)
    """Those of `constants` that are other ones for sizes that 16 does not divide."""
    matmul: bool = False
    """Whether it has a tl.dot fed from memory, so that the gate wants tensor-core and asynchronous-copy instructions."""

    @property
    def room(self) -> str:
        """The room's name, which is the first part of the kernel's."""
        return self.name.partition(".")[0]


def by_name(described: Iterable[Kernel]) -> Mapping[str, Kernel]:
    """Kernels by name, as a module's `KERNELS` has them."""
    return {kernel.name: kernel for kernel in described}


@cache
def kernels() -> Mapping[str, Kernel]:
    """Every kernel by name, from the `KERNELS` of every room's `kernel_*.py`."""
    found: dict[str, Kernel] = {}
    for room in rooms():
        package = importlib.import_module(f"fastllava_kernels.{room}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if module.name.rpartition(".")[2].startswith("kernel_"):
                for name, kernel in importlib.import_module(module.name).KERNELS.items():
                    if name in found or kernel.room != room:
                        raise ValueError(f"{module.name}: {name} is another kernel's name or not the room's")
                    found[name] = kernel
    return dict(sorted(found.items()))


def config(kernel: Kernel, rows: int, device: torch.device) -> dict[str, Any]:
    """The configuration of `kernel` for a problem of `rows` rows on `device`.

    A kernel that the table of this architecture leaves out runs with its first candidate. Of one that the table has, takes the
    newest Triton minor version that is not newer than the one running, else the oldest; and the smallest bucket that holds `rows`.
    """
    if kernel.name in _overridden:
        return {**_overridden[kernel.name], **FUSION}
    arch = architecture(device)
    buckets = _buckets(arch, kernel.name)
    return {**(kernel.candidates[arch][0] if buckets is None else _bucket(buckets, rows)), **FUSION}


@contextmanager
def override(kernel: str, chosen: Config) -> Iterator[None]:
    """Run `kernel` with this configuration: for tuning, benchmarks and tests."""
    _overridden[kernel] = chosen
    try:
        yield
    finally:
        del _overridden[kernel]


def architecture(device: torch.device) -> str:
    """The table for `device`: "sm_90" from compute capability 9.0 on, "sm_80" before, "interpreter" without a GPU."""
    if device.type != "cuda" or INTERPRETED:
        return "interpreter"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] >= 9 else "sm_80"


@cache
def read_table(arch: str) -> Mapping[str, Mapping[str, Mapping[str, Config]]]:
    """The table of an architecture as it lies in tables/; empty where there is none."""
    path = TABLES / f"{arch}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@cache
def _buckets(arch: str, kernel: str) -> Mapping[str, Config] | None:
    table = read_table(arch)
    if kernel not in table:
        return None
    versions = sorted(table[kernel], key=_minor)
    running = _minor(triton.__version__)
    return table[kernel][next((v for v in reversed(versions) if _minor(v) <= running), versions[0])]


def _bucket(buckets: Mapping[str, Config], rows: int) -> Config:
    bounds = sorted(int(bound) for bound in buckets if bound != ANY)
    fitting = next((str(bound) for bound in bounds if rows <= bound), ANY)
    return buckets[fitting] if fitting in buckets else buckets[str(bounds[-1])]


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def configurations(arch: str) -> Iterator[tuple[str, str, str, Config]]:
    """Every (kernel, what it was chosen with, bucket, configuration) on an architecture: the table's entries, else first candidates.

    Raises ValueError where the table has a kernel that the code has not.
    """
    table = read_table(arch)
    if gone := set(table) - set(kernels()):
        raise ValueError(f"tables/{arch}.json has {', '.join(sorted(gone))}, which the code has not: run the tuner")
    for name, kernel in kernels().items():
        if name not in table:
            yield name, FIRST, ANY, kernel.candidates[arch][0]
        for minor, buckets in table.get(name, {}).items():
            yield from ((name, f"Triton {minor}", bucket, chosen) for bucket, chosen in buckets.items())
