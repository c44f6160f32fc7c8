"""Shapes, inputs and cost of attention."""

import itertools
from typing import Any

import torch

from fastllava_kernels.llava15 import BATCHES, Draw, sample_lengths, sizes
from fastllava_kernels.workload import Cost, Pass, Shape, Workload


def shapes() -> dict[str, Shape]:
    """Shapes: rows T in samples, heads H and G, width K of a head; "tower": equal lengths, both ways, frozen, beside every decoder."""
    found: dict[str, Shape] = {
        name: {
            "rows": batch.rows,
            "patches": batch.patches,
            "samples": batch.samples,
            "heads": decoder.heads,
            "key_heads": decoder.key_heads,
            "head_dim": decoder.head_dim,
            "causal": 1,
            "learns": 1,
        }
        for name, decoder, batch in sizes()
    }
    for name, size in (("tower", "7b"), ("tiny-tower", "tiny")):
        batch = BATCHES[size]
        heads = {"heads": batch.tower_heads, "key_heads": batch.tower_heads, "head_dim": batch.tower_width // batch.tower_heads}
        found[name] = {"rows": batch.tower_rows, "patches": batch.tower_rows, "samples": batch.samples, "causal": 0, "learns": 0} | heads
    return found


def lengths_of(shape: Shape) -> list[int]:
    """Return the rows of each sample."""
    if not shape["causal"]:
        return [shape["rows"] // shape["samples"]] * shape["samples"]
    return sample_lengths(shape["rows"], min(shape["patches"], shape["rows"] // 2), shape["samples"])


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Draw q, k, v, cu_seqlens, max_seqlen, causal."""
    draw = Draw(device, dtype, seed)
    lengths = lengths_of(shape)
    q_THK, k_TGK, v_TGK = (
        draw.normal(sum(lengths), heads, shape["head_dim"], learns=bool(shape["learns"]))
        for heads in (shape["heads"], shape["key_heads"], shape["key_heads"])
    )
    cu_seqlens = torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
    return q_THK, k_TGK, v_TGK, cu_seqlens, max(lengths), bool(shape["causal"])


def cost(shape: Shape, dtype: torch.dtype, part: Pass) -> Cost:
    """Products over the pairs of rows that see each other: two forward, five backward.

    The five are FlashAttention's (Dao et al. 2022, arXiv 2205.14135): the scores are computed again, since keeping them
    would move more bytes than that costs. Bytes: forward reads q, k, v and writes the result; backward reads those and the
    result's gradient and writes three gradients.
    """
    pairs = sum(n * (n + 1) // 2 if shape["causal"] else n * n for n in lengths_of(shape))
    products = 2 if part == "forward" else 5
    queries, keys = shape["heads"], shape["key_heads"]
    rows = 2 * queries + 2 * keys if part == "forward" else 4 * queries + 4 * keys
    return Cost(
        flops=2.0 * products * pairs * queries * shape["head_dim"],
        bytes=rows * sum(lengths_of(shape)) * shape["head_dim"] * dtype.itemsize,
    )


WORKLOAD = Workload(shapes(), inputs, cost)
