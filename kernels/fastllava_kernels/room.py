"""What a room is, how one is found, and how an implementation is chosen; imports neither torch nor Triton.

A room is a package `fastllava_kernels/<op>/` whose `__init__.py` defines `ROOM`. Its folder name is also its config key
(`kernels.<op>`), test id, benchmark argument and results row. `reference.py` in the same folder is the specification.
The names of its implementations are known at once; their code is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import fastllava_kernels

if TYPE_CHECKING:
    import torch

    from fastllava_kernels.contract import Contract
    from fastllava_kernels.workload import Workload

REFERENCE = "reference"
SEPARATE = "separate"
"""The value of a room's toggle with which the rooms that it is made of run in its place."""


def runs_anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    """The `unsupported` of an implementation with no demands: None on every device and dtype."""
    return None


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that decide which implementation can run it."""

    head_widths: Mapping[str, int]
    """K of each part with attention, under the part's name in words for the user."""


def fits_any(sizes: Sizes) -> str | None:
    """The `unfit` of an implementation with no demands: None for every model."""
    return None


def ordered(device: torch.device) -> str | None:
    """The `unordered` of an implementation that adds in one order wherever PyTorch asks for deterministic algorithms: None everywhere."""
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    `function` has the signature of the room's reference. `unsupported(device, dtype)` is the reason why it cannot run
    there, in words for the user, or None; `unfit(sizes)` the reason why it cannot run that model; `unordered(device)` the
    reason why it gives other bits the next time, although `torch.use_deterministic_algorithms` is on.
    """

    function: Callable[..., Any]
    unsupported: Callable[[torch.device, torch.dtype], str | None] = runs_anywhere
    unfit: Callable[[Sizes], str | None] = fits_any
    unordered: Callable[[torch.device], str | None] = ordered
    untraceable: str | None = None
    """Why torch.compile cannot take it into one graph, in words for the user; None when it can."""
    interpretable: bool = False
    """Made of Triton kernels of this package, which tests run on a CPU through Triton's interpreter, in fp32 and fp16."""
    auto_on: frozenset[str] = frozenset({"cpu", "cuda"})
    """Device types on which `auto` may take it; by name it runs wherever it can."""


class Implementations(Mapping[str, Implementation]):
    """The implementations of a room's folder by name; iterating over the names imports nothing.

    `<name>` is the `IMPLEMENTATION` of `<name>_op.py`, or of `reference.py`, put behind the `CONTRACT` of `reference.py`.
    """

    def __init__(self, room: str, names: Sequence[str]) -> None:
        self._room, self._names, self._loaded = room, tuple(names), dict[str, Implementation]()

    def __getitem__(self, name: str) -> Implementation:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._loaded:
            one = _module(self._room, name if name == REFERENCE else f"{name}_op").IMPLEMENTATION
            contract = _module(self._room, REFERENCE).CONTRACT
            self._loaded[name] = replace(one, function=contract.kept(self._room, one.function))
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Room:
    """An op: its name, what it computes in one line, and its implementations by name, best first for `auto`."""

    name: str
    summary: str
    implementations: Mapping[str, Implementation]
    parts: tuple[str, ...] = ()
    """Rooms that together compute the same, one after another; whoever uses the room runs them for the value "separate"."""

    @classmethod
    def of_folder(cls, name: str, summary: str, implementations: Sequence[str], parts: tuple[str, ...] = ()) -> Room:
        """The room of the folder `name` with a file for each of these implementations."""
        return cls(name, summary, Implementations(name, implementations), parts)

    def __post_init__(self) -> None:
        if REFERENCE not in self.implementations:
            raise ValueError(f"room {self.name}: no implementation named '{REFERENCE}'; every room has one")

    @property
    def values(self) -> tuple[str, ...]:
        """What the room's toggle may be."""
        return ("auto", *self.implementations, *((SEPARATE,) if self.parts else ()))

    @property
    def contract(self) -> Contract:
        """What every implementation keeps to, from the room's reference.py."""
        return _module(self.name, REFERENCE).CONTRACT

    @property
    def slack(self) -> Mapping[torch.dtype, float]:
        """How much farther from fp64 truth than the reference an implementation may be, by dtype."""
        return self.contract.slack

    @property
    def workload(self) -> Workload:
        """Shapes, inputs and costs, from the room's workload.py."""
        return _module(self.name, "workload").WORKLOAD


def _module(room: str, name: str) -> ModuleType:
    return importlib.import_module(f"fastllava_kernels.{room}.{name}")


@cache
def rooms() -> Mapping[str, Room]:
    """Every room by name, in alphabetical order, found by looking at the folders of this package."""
    found = {}
    for module in pkgutil.iter_modules(fastllava_kernels.__path__):
        if not module.ispkg or module.name.startswith("_"):
            continue
        room = importlib.import_module(f"fastllava_kernels.{module.name}").ROOM
        if room.name != module.name:
            raise ValueError(f"room {room.name}: its folder is {module.name}; they must have one name")
        found[room.name] = room
    return dict(sorted(found.items()))


def choose(
    room: Room,
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
    sizes: Sizes | None = None,
    repeats: bool = False,
) -> str:
    """The name of the implementation that runs: `wanted`, or for "auto" the first that can; "separate" where the room has parts.

    `compiled`: it becomes part of a graph of torch.compile; `sizes`: those of the model that it is to run; `repeats`: it must give
    the same bits for the same input. Raises ValueError in words for the user when `wanted` is no implementation or cannot run:
    there is no silent fallback.
    """
    names = list(room.implementations)
    if wanted == "auto":
        able = (n for n in names if why_not(room, n, device, dtype, compiled, sizes, repeats) is None)
        return next(n for n in able if device.type in room.implementations[n].auto_on)
    if wanted == SEPARATE and room.parts:
        return wanted
    if wanted not in room.implementations:
        raise ValueError(f"kernels.{room.name}: no implementation '{wanted}'; write one of {', '.join(room.values)}")
    reason = why_not(room, wanted, device, dtype, compiled, sizes, repeats)
    if reason is not None:
        raise ValueError(f"kernels.{room.name}: '{wanted}' cannot run here ({reason}); write kernels.{room.name}=auto")
    return wanted


def why_not(
    room: Room,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
    sizes: Sizes | None = None,
    repeats: bool = False,
) -> str | None:
    """Why implementation `name` cannot run on `device` in `dtype`, in a graph, a model of these sizes, or to the same bits; or None."""
    one = room.implementations[name]
    reasons = (
        lambda: one.unsupported(device, dtype),
        lambda: one.untraceable if compiled else None,
        lambda: one.unfit(sizes) if sizes else None,
        lambda: one.unordered(device) if repeats else None,
    )
    return next((reason for ask in reasons if (reason := ask()) is not None), None)
