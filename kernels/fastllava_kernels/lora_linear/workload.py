"""Shapes, inputs and cost of lora_linear."""

from typing import Any

import torch

from fastllava_kernels.llava15 import Draw, sizes
from fastllava_kernels.nf4 import BLOCK, NESTED_BLOCK, quantise
from fastllava_kernels.workload import Cost, Pass, Shape, Workload

RANK, SCALE, DROPOUT = 128, 2.0, 0.05
"""Those of the original's recipe."""


def shapes() -> dict[str, Shape]:
    """Shapes: rows T, width D of the input, the width F of each result, rank R; those of q, k, v, of gate and up, and of down.

    Those of o have NF4 weights; "-double": the scales are quantised too.
    """
    found: dict[str, Shape] = {}
    for name, decoder, batch in sizes():
        rank = min(RANK, decoder.width // 8)
        keys = decoder.key_heads * decoder.head_dim
        of = {
            name: (decoder.width, (decoder.heads * decoder.head_dim, keys, keys)),
            f"{name}-gate-up": (decoder.width, (decoder.inner, decoder.inner)),
            f"{name}-down": (decoder.inner, (decoder.width,)),
        }
        of |= {f"{name}-nf4{kind}": (decoder.width, (decoder.width,)) for kind in ("", "-double")}
        for key, (width, outputs) in of.items():
            weights = "nf4_double" if key.endswith("-double") else "nf4" if key.endswith("-nf4") else "dense"
            found[key] = {"rows": batch.rows, "width": width, "outputs": outputs, "rank": rank, "weights": weights}
    return found


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Draw rows that get a gradient, frozen weights, low-rank masters that learn, a key for each row; there are no biases."""
    draw = Draw(device, dtype, seed)
    width, outputs, rank = shape["width"], shape["outputs"], shape["rank"]
    x_TD = draw.normal(shape["rows"], width, learns=True)
    weights = [draw.normal(out, width, scale=width**-0.5) for out in outputs]
    if shape["weights"] != "dense":
        weights = [part for weight in weights for part in quantise(weight.float(), double=shape["weights"] == "nf4_double")]
    A = [draw.normal(rank, width, scale=width**-0.5, learns=True, master=True) for _ in outputs]
    B = [draw.normal(out, rank, scale=0.1 * rank**-0.5, learns=True, master=True) for out in outputs]
    keys, streams = draw.integers(2**62, shape["rows"]), draw.integers(2**62, len(outputs))
    return x_TD, weights, [None] * len(outputs), A, B, SCALE, DROPOUT, keys, streams


def cost(shape: Shape, dtype: torch.dtype, part: Pass) -> Cost:
    """Forward: three products a layer; reads x, weights and masters, writes the results and the low-rank hidden values.

    Backward: those of x through the weight and through the low-rank product, and of both masters; reads the results' gradients,
    x, the hidden values, weights and masters, writes the gradients of x and of the masters, in fp32. Dequantised weights count no bytes.
    """
    rows, width, rank, layers, out = shape["rows"], shape["width"], shape["rank"], len(shape["outputs"]), sum(shape["outputs"])
    base, low = 2.0 * rows * width * out, 2.0 * rows * rank * (layers * width + out)
    masters = rank * (layers * width + out) * torch.promote_types(dtype, torch.float32).itemsize
    bits = {"dense": 8 * dtype.itemsize, "nf4": 4 + 32 / BLOCK, "nf4_double": 4 + 8 / BLOCK + 32 / (BLOCK * NESTED_BLOCK)}
    moved = rows * (width + out + layers * rank) * dtype.itemsize + width * out * bits[shape["weights"]] / 8 + masters
    if part == "forward":
        return Cost(base + low, moved)
    return Cost(base + 2 * low, moved + rows * width * dtype.itemsize + masters)


WORKLOAD = Workload(shapes(), inputs, cost)
