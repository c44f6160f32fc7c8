"""What a benchmark or a test feeds a room with, and the least work that any implementation must do on it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

Pass = Literal["forward", "backward"]
Shape = Mapping[str, Any]
"""Sizes by name, such as {"rows": 16384, "width": 4096}."""


@dataclass(frozen=True)
class Cost:
    """The least that a pass must do: FLOPs of its matrix products (a multiply-add is two), bytes read and written once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Workload:
    """Shapes of a room by name, inputs at a shape, and what a pass costs at least.

    shapes: "7b", "13b", "1.1b" (one micro-batch of LLaVA-1.5 with that decoder), "tiny" (for a CPU), and the odd ones
    that tests want ("ragged", "empty", ...). inputs(shape, dtype, device, seed): the arguments of the room's reference;
    tensors that take a gradient require it. cost(shape, dtype, pass).
    """

    shapes: Mapping[str, Shape]
    inputs: Callable[[Shape, torch.dtype, torch.device, int], tuple[Any, ...]]
    cost: Callable[[Shape, torch.dtype, Pass], Cost]
