"""Shapes, inputs and cost of quick_gelu."""

from typing import Any

import torch

from fastllava_kernels.llava15 import BATCHES, Draw
from fastllava_kernels.workload import Cost, Pass, Shape, Workload


def shapes() -> dict[str, Shape]:
    """Shapes: rows N of all images and the inner width of the tower's MLP, the same beside every decoder."""
    return {
        name: {"rows": BATCHES[size].tower_rows, "width": BATCHES[size].tower_inner} for name, size in (("tower", "7b"), ("tiny", "tiny"))
    }


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Draw x; the tower is frozen, nothing learns."""
    return (Draw(device, dtype, seed).normal(shape["rows"], shape["width"]),)


def cost(shape: Shape, dtype: torch.dtype, part: Pass) -> Cost:
    """No products. Forward reads x and writes the result; backward reads x and the result's gradient and writes x's."""
    return Cost(flops=0, bytes=(2 if part == "forward" else 3) * shape["rows"] * shape["width"] * dtype.itemsize)


WORKLOAD = Workload(shapes(), inputs, cost)
