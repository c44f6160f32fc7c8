"""Shapes, inputs and cost of layer_norm."""

from typing import Any

import torch

from fastllava_kernels.llava15 import BATCHES, Draw
from fastllava_kernels.workload import Cost, Pass, Shape, Workload


def shapes() -> dict[str, Shape]:
    """Shapes: rows N of all images and width C: the tower's, the same beside every decoder."""
    return {
        name: {"rows": BATCHES[size].tower_rows, "width": BATCHES[size].tower_width} for name, size in (("tower", "7b"), ("tiny", "tiny"))
    }


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Draw x, weight, bias, eps; the tower is frozen, nothing learns."""
    draw = Draw(device, dtype, seed)
    width = shape["width"]
    return draw.normal(shape["rows"], width), draw.normal(width), draw.normal(width), 1e-5


def cost(shape: Shape, dtype: torch.dtype, part: Pass) -> Cost:
    """No products. Forward reads x and writes the result; backward reads x and the result's gradient and writes x's."""
    moved = (2 if part == "forward" else 3) * shape["rows"] * shape["width"] + 2 * shape["width"]
    return Cost(flops=0, bytes=moved * dtype.itemsize)


WORKLOAD = Workload(shapes(), inputs, cost)
