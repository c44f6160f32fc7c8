"""Shapes, inputs and cost of splice."""

from typing import Any

import torch

from fastllava_kernels.llava15 import Draw, in_both_stages, sizes
from fastllava_kernels.workload import Cost, Pass, Shape, Workload


def shapes() -> dict[str, Shape]:
    """Shapes: rows T, patches P of them in samples, width D, vocabulary V; "-stage2": the embedding learns."""
    found = {
        name: {
            "rows": batch.rows,
            "patches": batch.patches,
            "samples": batch.samples,
            "width": decoder.width,
            "vocabulary": decoder.vocabulary,
        }
        for name, decoder, batch in sizes()
    }
    return in_both_stages(found, "embedding_learns")


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Draw projected, which learns, the embedding, token ids, text rows, patch rows."""
    draw = Draw(device, dtype, seed)
    return draw.normal(shape["patches"], shape["width"], learns=True), *draw.text(shape)


def cost(shape: Shape, dtype: torch.dtype, part: Pass) -> Cost:
    """No products. Forward reads the patches and one embedding row a text row, and writes T rows.

    Backward reads and writes the patches' gradients; an embedding that learns: the text rows' gradients read, its whole
    gradient written.
    """
    patches, width, learns = shape["patches"], shape["width"], shape["embedding_learns"]
    text = max(shape["rows"] - patches, shape["samples"])
    master = torch.promote_types(dtype, torch.float32).itemsize
    if part == "forward":
        embedded = text * width * (master if learns else dtype.itemsize)
        return Cost(0, embedded + (text + 2 * patches) * width * dtype.itemsize)
    embedding = learns * (text * width * dtype.itemsize + shape["vocabulary"] * width * master)
    return Cost(0, 2 * patches * width * dtype.itemsize + embedding)


WORKLOAD = Workload(shapes(), inputs, cost)
