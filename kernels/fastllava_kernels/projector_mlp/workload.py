"""Shapes, inputs and cost of projector_mlp."""

from typing import Any

import torch

from fastllava_kernels.llava15 import Draw, sizes
from fastllava_kernels.workload import Cost, Pass, Shape, Workload


def shapes() -> dict[str, Shape]:
    """Shapes: patches P, tower width C, decoder width D."""
    return {name: {"patches": batch.patches, "tower_width": batch.tower_width, "width": decoder.width} for name, decoder, batch in sizes()}


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Draw features of the frozen tower, two layers as masters that learn."""
    draw = Draw(device, dtype, seed)
    features_PC = draw.normal(shape["patches"], shape["tower_width"])
    return features_PC, draw.projector(shape["tower_width"], shape["width"])


def cost(shape: Shape, dtype: torch.dtype, part: Pass) -> Cost:
    """Forward: two products; reads features and masters, writes P rows.

    Backward: the gradients of both weights and of the hidden layer, none of the features; reads the rows' gradients, features
    and the second weight, writes fp32 gradients of the masters. The hidden layer between the passes counts no bytes.
    """
    patches, tower, width = shape["patches"], shape["tower_width"], shape["width"]
    master = torch.promote_types(dtype, torch.float32).itemsize
    first, second = 2.0 * patches * tower * width, 2.0 * patches * width * width
    masters = (tower * width + width * width + 2 * width) * master
    moved = patches * (tower + width) * dtype.itemsize + masters
    if part == "forward":
        return Cost(first + second, moved)
    return Cost(first + 2 * second, moved + width * width * master)


WORKLOAD = Workload(shapes(), inputs, cost)
