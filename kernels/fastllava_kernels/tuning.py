"""Block sizes, warps and stages of the Triton kernels, from tables that are written offline and never change in a run.

Autotuning during training would let ranks and runs pick different configurations, and so different sums. A table is
`tables/<arch>.json`: kernel -> Triton minor version -> rows (the bucket's upper bound, or "any") -> configuration.
`python -m fastllava_kernels.tune` writes them.
"""

import importlib
import json
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

import fastllava_kernels
from fastllava_kernels.launch import INTERPRETED

TABLES = Path(__file__).parent / "tables"
ANY = "any"

FUSION = {"enable_fp_fusion": True}
"""Said at every launch: Triton 3.10 turns the default, and a multiply-add rounded twice gives other bits."""

Config = Mapping[str, int]
"""Constants of a kernel such as BLOCK_M, and num_warps, num_stages."""

_overridden: dict[str, Config] = {}


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel (one variant of it) as the tables, the tuner and the ahead-of-time gate see it.

    A module with kernels lists them in `KERNELS`.
    """

    name: str
    """Its key in the tables, such as "projector_splice.linear_gelu"."""
    function: Any
    """What `@triton.jit` made."""
    signature: Mapping[str, str]
    """Triton's type of every parameter that is no constant, as in bf16 training: "*bf16", "*fp32", "*i64", "i32", "fp32"."""
    constants: Mapping[str, Any]
    """The constexpr parameters that are not tuned."""
    candidates: Mapping[str, Sequence[Config]]
    """Configurations to choose from for "sm_80", "sm_90" and "interpreter", the likely best first."""
    room: str
    """The room whose workload times it."""
    rows: str
    """The size in that workload's shapes that the buckets bound."""
    buckets: Sequence[int] = ()
    """Upper bounds of rows to tune apart; above the last one and without any, "any"."""
    divisible: frozenset[str] = field(default_factory=frozenset)
    """Integers that are multiples of 16 in training, such as strides; pointers always are."""
    matmul: bool = False
    """Has a tl.dot fed from memory: the gate wants tensor-core and asynchronous-copy instructions."""


@cache
def kernels() -> Mapping[str, Kernel]:
    """Every kernel by name, from the `KERNELS` of every module of this package."""
    found: dict[str, Kernel] = {}
    for module in pkgutil.walk_packages(fastllava_kernels.__path__, "fastllava_kernels."):
        for kernel in getattr(importlib.import_module(module.name), "KERNELS", ()):
            if kernel.name in found:
                raise ValueError(f"two kernels are called {kernel.name}")
            found[kernel.name] = kernel
    return dict(sorted(found.items()))


def config(kernel: str, rows: int, device: torch.device) -> dict[str, Any]:
    """The configuration of `kernel` for a problem of `rows` rows on `device`.

    Takes the newest Triton minor version in the table that is not newer than the one running, else the oldest; and the
    smallest bucket that holds `rows`. Raises KeyError when the table of this architecture has no such kernel.
    """
    chosen = _overridden[kernel] if kernel in _overridden else _bucket(_versions(architecture(device), kernel), rows)
    return {**chosen, **FUSION}


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
    """The table of an architecture as it lies in tables/."""
    return json.loads((TABLES / f"{arch}.json").read_text(encoding="utf-8"))


@cache
def _versions(arch: str, kernel: str) -> Mapping[str, Config]:
    table = read_table(arch)
    if kernel not in table:
        raise KeyError(f"tables/{arch}.json has no kernel '{kernel}': run python -m fastllava_kernels.tune")
    versions = sorted(table[kernel], key=_minor)
    running = _minor(triton.__version__)
    return table[kernel][next((v for v in reversed(versions) if _minor(v) <= running), versions[0])]


def _bucket(buckets: Mapping[str, Config], rows: int) -> Config:
    bounds = sorted(int(bound) for bound in buckets if bound != ANY)
    fitting = next((str(bound) for bound in bounds if rows <= bound), ANY)
    return buckets[fitting] if fitting in buckets else buckets[str(bounds[-1])]


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def flatten(table: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Config]]:
    """Every (kernel, Triton minor, bucket, configuration) of a table."""
    for kernel, versions in table.items():
        for minor, buckets in versions.items():
            for bucket, chosen in buckets.items():
                yield kernel, minor, bucket, chosen
