"""The ops a model is built with: one implementation of every room, chosen once and handed to each module."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastllava.errors import UserError
from fastllava_kernels import choose, rooms
from fastllava_kernels.room import REFERENCE, SEPARATE, Sizes


class Ops:
    """One function per room under the room's name, such as `ops.rms_norm(x, weight, eps)`; each has its reference's signature.

    A room whose choice is "separate" has none: the rooms that it is made of run in its place.
    """

    chosen: dict[str, str]
    """The implementation in use, by room."""

    def __init__(self, chosen: Mapping[str, str]) -> None:
        self.chosen = dict(chosen)
        for name, implementation in chosen.items():
            if implementation != SEPARATE:
                setattr(self, name, rooms()[name].implementations[implementation].function)

    def only(self, *names: str) -> "Ops":
        """The ops of these rooms and no others: what a module keeps, so that what it holds is what it may use."""
        return Ops({name: self.chosen[name] for name in names})

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def choose_ops(
    kernels: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
    sizes: Sizes | None = None,
    repeats: bool = False,
) -> Ops:
    """The implementations that `kernels` (room -> name or "auto"; a room left out is "auto") gives on this device and dtype.

    `compiled`: they become part of graphs of torch.compile; `sizes`: of the model (`Origin.sizes`), which "auto" then heeds;
    `repeats`: only those that give the same bits for the same input.
    Raises UserError when one that was asked for by name cannot run here.
    """
    try:
        return Ops(
            {name: choose(room, kernels.get(name, "auto"), device, dtype, compiled, sizes, repeats) for name, room in rooms().items()}
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def reference_ops() -> Ops:
    """The reference of every room."""
    return Ops(dict.fromkeys(rooms(), REFERENCE))


def modules_by_room(modules: Iterable[nn.Module]) -> dict[str, int]:
    """How many of the modules hold each room's op in their `ops`; rooms that none holds are left out."""
    held = (getattr(module, "ops", None) for module in modules)
    return dict(Counter(name for ops in held if isinstance(ops, Ops) for name in ops.chosen))
