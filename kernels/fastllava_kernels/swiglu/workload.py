"""Shapes, inputs and cost of swiglu."""

from typing import Any

import torch

from fastllava_kernels.llava15 import Draw, sizes
from fastllava_kernels.workload import Cost, Pass, Shape, Workload


def shapes() -> dict[str, Shape]:
    """Shapes: rows T and the inner width F of the decoder's MLP."""
    return {name: {"rows": batch.rows, "width": decoder.inner} for name, decoder, batch in sizes()}


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Draw gate and up; both learn."""
    draw = Draw(device, dtype, seed)
    gate_TF, up_TF = (draw.normal(shape["rows"], shape["width"], learns=True) for _ in range(2))
    return gate_TF, up_TF


def cost(shape: Shape, dtype: torch.dtype, part: Pass) -> Cost:
    """No products. Forward reads gate and up and writes the result; backward reads those and a gradient and writes two."""
    return Cost(flops=0, bytes=(3 if part == "forward" else 5) * shape["rows"] * shape["width"] * dtype.itemsize)


WORKLOAD = Workload(shapes(), inputs, cost)
