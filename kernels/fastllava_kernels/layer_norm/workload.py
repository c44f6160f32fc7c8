"""Shapes, inputs and cost of layer_norm."""

from typing import Any

import torch

from fastllava_kernels.llava15 import BATCHES, Draw
from fastllava_kernels.workload import Cost, Pass, Shape, Workload

LEARNS = {"": (0, 0), "-frozen": (1, 0), "-learns": (1, 1)}
"""Whether x learns, and weight and bias, by the end of a shape's name: nothing in the frozen tower, in an MPT as the stage has it."""


def shapes() -> dict[str, Shape]:
    """Shapes: rows N of all images and width C: the tower's, the same beside every decoder; "-frozen", "-learns": with a backward."""
    return {
        f"{name}{suffix}": {"rows": batch.tower_rows, "width": batch.tower_width, "x_learns": x_learns, "weight_learns": weight_learns}
        for name, batch in (("tower", BATCHES["7b"]), ("tiny", BATCHES["tiny"]))
        for suffix, (x_learns, weight_learns) in LEARNS.items()
    }


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Draw x, weight, bias, eps."""
    draw, width, learns = Draw(device, dtype, seed), shape["width"], bool(shape["weight_learns"])
    x_NC = draw.normal(shape["rows"], width, learns=bool(shape["x_learns"]))
    return x_NC, draw.normal(width, learns=learns), draw.normal(width, learns=learns), 1e-5


def cost(shape: Shape, dtype: torch.dtype, part: Pass) -> Cost:
    """No products. Forward reads x and writes the result; backward reads x and the result's gradient and writes x's."""
    rows, width = shape["rows"], shape["width"]
    moved = 2 * rows * width + 2 * width if part == "forward" else 3 * rows * width + width * (1 + 2 * shape["weight_learns"])
    return Cost(flops=0, bytes=moved * dtype.itemsize)


WORKLOAD = Workload(shapes(), inputs, cost)
