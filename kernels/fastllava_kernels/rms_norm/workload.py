"""Shapes, inputs and cost of rms_norm."""

from typing import Any

import torch

from fastllava_kernels.llava15 import Draw, in_both_stages, sizes
from fastllava_kernels.workload import Cost, Pass, Shape, Workload


def shapes() -> dict[str, Shape]:
    """Shapes: rows T and width D; "-stage2": the weight learns too."""
    return in_both_stages({name: {"rows": batch.rows, "width": decoder.width} for name, decoder, batch in sizes()}, "weight_learns")


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Draw x, which learns, weight, eps."""
    draw = Draw(device, dtype, seed)
    x_TD = draw.normal(shape["rows"], shape["width"], learns=True)
    return x_TD, draw.normal(shape["width"], learns=bool(shape["weight_learns"])), 1e-5


def cost(shape: Shape, dtype: torch.dtype, part: Pass) -> Cost:
    """No products. Forward reads x and writes the result; backward reads x and the result's gradient and writes x's."""
    rows, width = shape["rows"], shape["width"]
    moved = 2 * rows * width + width if part == "forward" else 3 * rows * width + width * (1 + shape["weight_learns"])
    return Cost(flops=0, bytes=moved * dtype.itemsize)


WORKLOAD = Workload(shapes(), inputs, cost)
