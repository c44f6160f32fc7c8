"""The ops a model is built with: one implementation of every room, chosen once and handed to each module."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fastllava.errors import UserError
from fastllava_kernels import choose, rooms


class Ops:
    """One function per room under the room's name, such as `ops.rms_norm(x, weight, eps)`; each has its reference's signature."""

    chosen: dict[str, str]
    """The implementation in use, by room."""

    def __init__(self, chosen: Mapping[str, str]) -> None:
        self.chosen = dict(chosen)
        for name, implementation in chosen.items():
            setattr(self, name, rooms()[name].implementations[implementation].function)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def choose_ops(kernels: Mapping[str, str], device: torch.device, dtype: torch.dtype) -> Ops:
    """The implementations that `kernels` (room -> name or "auto"; a room left out is "auto") gives on this device and dtype.

    Raises UserError when one that was asked for by name cannot run here.
    """
    try:
        return Ops({name: choose(room, kernels.get(name, "auto"), device, dtype) for name, room in rooms().items()})
    except ValueError as error:
        raise UserError(str(error)) from None
