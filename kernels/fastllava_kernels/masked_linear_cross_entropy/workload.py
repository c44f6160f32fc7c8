"""Shapes, inputs and cost of masked_linear_cross_entropy."""

from typing import Any

import torch

from fastllava_kernels.llava15 import Draw, sizes
from fastllava_kernels.workload import Cost, Pass, Shape, Workload

SHARES = (1, 5, 20, 50, 100)
"""Percent of the rows that are supervised: captions of stage 1 have about 5, conversations of stage 2 about 20."""


def shapes() -> dict[str, Shape]:
    """Shapes: rows T, M of them supervised, width D, vocabulary V; "-head": the head learns.

    "7b" and its like are 5 % with a head that learns, which runs every kernel.
    """
    found: dict[str, Shape] = {}
    for name, decoder, batch in sizes():
        for share in (20,) if name == "tiny" else SHARES:
            shape = {"rows": batch.rows, "supervised": batch.rows * share // 100, "width": decoder.width, "vocabulary": decoder.vocabulary}
            prefix = name if name == "tiny" else f"{name}-{share}%"
            found |= {prefix: shape | {"head_learns": 0}, f"{prefix}-head": shape | {"head_learns": 1}}
        if name != "tiny":
            found[name] = found[f"{name}-5%-head"]
    return found


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Draw hidden, which learns; the head's weight, a master when it learns; supervised rows, targets, and 1 / M as each weight."""
    draw = Draw(device, dtype, seed)
    rows, width, vocabulary, supervised = shape["rows"], shape["width"], shape["vocabulary"], shape["supervised"]
    rows, learns = max(rows, supervised), bool(shape["head_learns"])
    hidden_TD = draw.normal(rows, width, learns=True)
    weight_VD = draw.normal(vocabulary, width, scale=2 / width**0.5, learns=learns, master=learns)
    weights_M = torch.full((supervised,), 1 / max(supervised, 1), device=device)
    return hidden_TD, weight_VD, draw.subset(rows, supervised), draw.integers(vocabulary, supervised), weights_M


def cost(shape: Shape, dtype: torch.dtype, part: Pass) -> Cost:
    """Forward: the logits of M rows, from those rows and the weight.

    Backward, with the logits' gradient at hand: hidden's gradient, T rows written of which M are computed from the weight;
    for a head that learns the M rows once more and an fp32 gradient of its size. Logits count no bytes.
    """
    rows, supervised, learns = max(shape["rows"], shape["supervised"]), shape["supervised"], shape["head_learns"]
    product = 2.0 * supervised * shape["width"] * shape["vocabulary"]
    master = torch.promote_types(dtype, torch.float32).itemsize
    weight = shape["vocabulary"] * shape["width"]
    read = weight * (master if learns else dtype.itemsize)
    gathered = supervised * shape["width"] * dtype.itemsize
    if part == "forward":
        return Cost(product, read + gathered)
    written = rows * shape["width"] * dtype.itemsize
    return Cost(product * (1 + learns), read + written + learns * (gathered + weight * master))


WORKLOAD = Workload(shapes(), inputs, cost)
