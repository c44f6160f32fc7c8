"""Shapes, inputs and cost of nf4_linear."""

from typing import Any

import torch

from fastllava_kernels.llava15 import Draw, sizes
from fastllava_kernels.nf4 import BLOCK, NESTED_BLOCK
from fastllava_kernels.workload import Cost, Pass, Shape, Workload


def shapes() -> dict[str, Shape]:
    """Shapes: rows T, width D, outputs F of a layer of the MLP; "-double": the scales are quantised too."""
    found: dict[str, Shape] = {}
    for name, decoder, batch in sizes():
        shape = {"rows": batch.rows, "width": decoder.width, "inner": decoder.inner}
        found |= {name: shape | {"double": 0}, f"{name}-double": shape | {"double": 1}}
    return found


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Draw x, which learns, and a weight as it is kept: any codes, and scales as those of weights about 1 / sqrt(D)."""
    draw = Draw(device, dtype, seed)
    width, inner = shape["width"], shape["inner"]
    blocks = -(-width * inner // BLOCK)
    nested = -(-blocks // NESTED_BLOCK)
    x_TD = draw.normal(shape["rows"], width, learns=True)
    codes = draw.integers(256, inner * width // 2).to(torch.uint8).view(inner, -1)
    usual = torch.full((1,), 2.5 * width**-0.5, device=device)
    if not shape["double"]:
        spread = draw.integers(1024, blocks) / 1024
        return x_TD, codes, usual * (0.5 + spread), usual.new_empty(0), usual.new_empty(0), None
    absmax = draw.integers(256, blocks).to(torch.uint8)
    return x_TD, codes, absmax, (0.5 + draw.integers(64, nested) / 128) * usual / 2, usual, None


def cost(shape: Shape, dtype: torch.dtype, part: Pass) -> Cost:
    """One product either way; reads rows and the quantised weight, writes rows. Dequantised weights count no bytes."""
    rows, width, inner = shape["rows"], shape["width"], shape["inner"]
    blocks = width * inner / BLOCK
    scales = blocks + 4 * blocks / NESTED_BLOCK if shape["double"] else 4 * blocks
    return Cost(2.0 * rows * width * inner, rows * (width + inner) * dtype.itemsize + width * inner / 2 + scales)


WORKLOAD = Workload(shapes(), inputs, cost)
