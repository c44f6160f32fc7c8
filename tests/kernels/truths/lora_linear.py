"""Room lora_linear: the op once more in fp64 without the op it judges, its cases, and its nearest wrong one."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from judging import Args, Table, draw
from torch import Tensor

from fastllava_kernels.nf4 import Nf4, layers_of
from truths import nf4_linear

LAYERS = Sequence[Tensor]


def philox(key: int, counter: Sequence[int]) -> list[int]:
    """Philox 4x32 with 7 rounds, in whole numbers of Python."""
    k0, k1 = key % 2**32, key // 2**32 % 2**32
    c0, c1, c2, c3 = counter
    for _ in range(7):
        even, odd = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = odd >> 32 ^ c1 ^ k0, odd % 2**32, even >> 32 ^ c3 ^ k1, even % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def numbers_of(key: int, stream: int, width: int) -> list[int]:
    """The 16 bits that decide about each element of a row."""
    blocks = [philox(key, (block, stream % 2**32, stream // 2**32 % 2**32, 0)) for block in range((width + 7) // 8)]
    return [blocks[at // 8][at % 8 // 2] // 2 ** (16 * (at % 2)) % 2**16 for at in range(width)]


def mask(keys: Tensor, stream: int, width: int, dropout: float) -> Tensor:
    """What each element of x is multiplied by."""
    least = math.floor(dropout * 2**16 + 0.5)
    kept = [[number >= least for number in numbers_of(key, stream, width)] for key in keys.tolist()]
    return torch.tensor(kept, dtype=torch.float64).reshape(len(keys), width) / (1 - least / 2**16)


def dequantised(weight: Nf4) -> Tensor:
    return nf4_linear.weights(nf4_linear.halves(weight.codes, 4, 0), *weight[1:])


def truth(
    x: Tensor,
    weights: LAYERS,
    biases: Sequence[Tensor | None],
    A: LAYERS,
    B: LAYERS,
    scale: float,
    dropout: float,
    keys: Tensor,
    streams: Tensor,
) -> tuple[Tensor, ...]:
    """The weight of each layer with the product added; what is dropped changes x for the product alone."""
    outs = []
    for weight, bias, down, up, stream in zip(layers_of(weights), biases, A, B, streams.tolist(), strict=True):
        seen = x * mask(keys, stream, x.shape[1], dropout).to(x.dtype) if len(keys) else x
        dense = dequantised(weight).to(x.dtype) if isinstance(weight, Nf4) else weight
        out = torch.cat([x, seen], 1) @ torch.cat([dense, scale * up @ down], 1).T
        outs.append(out if bias is None else out + bias)
    return tuple(outs)


def numbers(count: int, seed: int) -> Tensor:
    """int64 of all sizes and signs."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


def inputs(
    rows: int,
    width: int,
    outputs: Sequence[int],
    rank: int,
    dropout: float = 0.25,
    bias: bool = False,
    draws: bool = True,
    nf4: bool | None = None,
) -> Args:
    """Layers of these widths, with keys where it `draws`; nf4: whether the scales of quantised weights are quantised too."""
    weights: list[Any] = [Table(draw(out, width, seed=10 + i, scale=width**-0.5)) for i, out in enumerate(outputs)]
    if nf4 is not None:
        weights = [part for out in outputs for part in nf4_linear.given(0, out, width, nf4)[1:5]]
    biases = [Table(draw(out, seed=20 + i)) if bias and i != 1 else None for i, out in enumerate(outputs)]
    A = [draw(rank, width, seed=30 + i, scale=width**-0.5) for i in range(len(outputs))]
    B = [draw(out, rank, seed=40 + i, scale=rank**-0.5) for i, out in enumerate(outputs)]
    return draw(rows, width, seed=1), weights, biases, A, B, 2.0, dropout, numbers(rows if draws else 0, 2), numbers(len(outputs), 3)


CASES: dict[str, Args] = {
    "usual": inputs(9, 24, (24, 8, 8), 4),
    "biases": inputs(9, 16, (16, 8, 8), 4, bias=True),
    "one layer": inputs(6, 40, (16,), 8, dropout=0.05),
    "widths that 8 does not divide": inputs(7, 13, (5, 9), 3),
    "more than a tile of everything": inputs(70, 150, (70, 45), 20, dropout=0.5),
    "nothing drawn": inputs(9, 24, (24, 8, 8), 4, draws=False),
    "no dropout": inputs(9, 24, (24, 8), 4, dropout=0.0),
    "NF4": inputs(6, 128, (6, 4), 4, nf4=False),
    "NF4, scales quantised, biases": inputs(6, 48, (6, 4), 4, bias=True, nf4=True),
    "one row": inputs(1, 24, (24, 8), 4),
    "no row": inputs(0, 24, (24, 8), 4),
}


def wrong(
    x: Tensor, weights: LAYERS, biases: Any, A: LAYERS, B: LAYERS, scale: float, dropout: float, keys: Tensor, streams: Tensor
) -> Any:
    """What is dropped of one layer is what should be of another."""
    return truth(x, weights, biases, A, B, scale, dropout, keys, streams.flip(0))


WRONG_CASE = "usual"
