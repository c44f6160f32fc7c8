"""Shapes, inputs and cost of add_rms_norm."""

from typing import Any

import torch

from fastllava_kernels.llava15 import Draw, in_both_stages, sizes
from fastllava_kernels.workload import Cost, Pass, Shape, Workload


def shapes() -> dict[str, Shape]:
    """Shapes: rows T and width D; "-stage2": the weight learns too."""
    return in_both_stages({name: {"rows": batch.rows, "width": decoder.width} for name, decoder, batch in sizes()}, "weight_learns")


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Draw x and residual, which learn, weight, eps."""
    draw = Draw(device, dtype, seed)
    x_TD, residual_TD = (draw.normal(shape["rows"], shape["width"], learns=True) for _ in range(2))
    return x_TD, residual_TD, draw.normal(shape["width"], learns=bool(shape["weight_learns"])), 1e-5


def cost(shape: Shape, dtype: torch.dtype, part: Pass) -> Cost:
    """No products. Forward reads x and residual and writes two results.

    Backward reads the sum and the gradients of both results and writes one gradient: x's and residual's are the same numbers.
    """
    rows, width = shape["rows"], shape["width"]
    moved = 4 * rows * width + width * (1 if part == "forward" else 1 + shape["weight_learns"])
    return Cost(flops=0, bytes=moved * dtype.itemsize)


WORKLOAD = Workload(shapes(), inputs, cost)
