"""Shapes, inputs and cost of rope."""

from typing import Any

import torch

from fastllava_kernels.llava15 import Draw, sample_lengths, sizes
from fastllava_kernels.workload import Cost, Pass, Shape, Workload


def shapes() -> dict[str, Shape]:
    """Shapes: rows T, heads H of the queries and G of the keys, width K of a head; samples and patches say where positions restart."""
    return {
        name: {
            "rows": batch.rows,
            "heads": decoder.heads,
            "key_heads": decoder.key_heads,
            "head_dim": decoder.head_dim,
            "samples": batch.samples,
            "patches": batch.patches,
        }
        for name, decoder, batch in sizes()
    }


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Draw q and k, which learn, cos and sin at positions that restart with every sample."""
    draw = Draw(device, dtype, seed)
    lengths = sample_lengths(shape["rows"], min(shape["patches"], shape["rows"] // 2), shape["samples"])
    rows, width = sum(lengths), shape["head_dim"]
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.outer(positions, frequencies)
    cos_TK, sin_TK = (torch.cat((part, part), dim=-1).to(dtype) for part in (angles.cos(), angles.sin()))
    q_THK = draw.normal(rows, shape["heads"], width, learns=True)
    return q_THK, draw.normal(rows, shape["key_heads"], width, learns=True), cos_TK, sin_TK


def cost(shape: Shape, dtype: torch.dtype, part: Pass) -> Cost:
    """No products. Either pass reads q, k (or their gradients), cos and sin, and writes two of the size of q and k."""
    moved = 2 * shape["rows"] * shape["head_dim"] * (shape["heads"] + shape["key_heads"] + 1)
    return Cost(flops=0, bytes=moved * dtype.itemsize)


WORKLOAD = Workload(shapes(), inputs, cost)
