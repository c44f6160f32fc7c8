"""Shapes, inputs and cost of projector_splice."""

from typing import Any

import torch

from fastllava_kernels.llava15 import Draw, in_both_stages, sizes
from fastllava_kernels.workload import Cost, Pass, Shape, Workload


def shapes() -> dict[str, Shape]:
    """Shapes: rows T, patches P of them in samples, tower width C, decoder width D, vocabulary V; "-stage2": the embedding learns."""
    found = {
        name: {
            "rows": batch.rows,
            "patches": batch.patches,
            "samples": batch.samples,
            "tower_width": batch.tower_width,
            "width": decoder.width,
            "vocabulary": decoder.vocabulary,
        }
        for name, decoder, batch in sizes()
    }
    return in_both_stages(found, "embedding_learns")


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Draw features of the frozen tower, two layers as masters that learn, the embedding, token ids, text rows, patch rows."""
    draw = Draw(device, dtype, seed)
    features_PC = draw.normal(shape["patches"], shape["tower_width"])
    return features_PC, draw.projector(shape["tower_width"], shape["width"]), *draw.text(shape)


def cost(shape: Shape, dtype: torch.dtype, part: Pass) -> Cost:
    """Forward: two products; reads features, masters and one embedding row a text row, writes T rows.

    Backward: the gradients of both weights and of the hidden layer, none of the features; reads the patch rows' gradients,
    features and the second weight, writes fp32 gradients of the masters; an embedding that learns: the text rows'
    gradients read, its whole gradient written. The hidden layer between the passes counts no bytes.
    """
    patches, tower, width, learns = shape["patches"], shape["tower_width"], shape["width"], shape["embedding_learns"]
    text = max(shape["rows"] - patches, shape["samples"])
    master = torch.promote_types(dtype, torch.float32).itemsize
    first, second = 2.0 * patches * tower * width, 2.0 * patches * width * width
    masters = (tower * width + width * width + 2 * width) * master
    features = patches * tower * dtype.itemsize
    if part == "forward":
        embedded = text * width * (master if learns else dtype.itemsize)
        return Cost(first + second, features + masters + embedded + (text + patches) * width * dtype.itemsize)
    embedding = learns * (text * width * dtype.itemsize + shape["vocabulary"] * width * master)
    upstream = patches * width * dtype.itemsize
    return Cost(first + 2 * second, features + width * width * master + upstream + masters + embedding)


WORKLOAD = Workload(shapes(), inputs, cost)
