"""ALiBi (Press et al. 2021, arXiv 2108.12409) as columns of queries and keys: `slope * (j - i)` on the score of query i and key j.

What is the same for all keys of a query changes no share of a softmax, so `slope * j` is enough, and that is a product of a number of the
head and one of the key. Attention gets the two as further columns, so that every implementation of the room computes the bias, none builds
a mask of it, and none can leave it out.

Shape letters: T packed rows, H heads, E columns.
"""

import math

import torch
from torch import Tensor

COLUMNS = 8
"""E: FlashAttention takes widths that are multiples of 8."""
_PIECES = 3
"""Numbers of bf16 whose sum is one of fp32."""
_DIGIT = 256
"""Whole numbers up to this are exact in bf16."""
LONGEST = _DIGIT * _DIGIT
"""Rows of a sample whose positions two digits hold."""


def slopes(heads: int, steepest: float = 8) -> Tensor:
    """fp32 [H]: how fast each head forgets, a row back; bit for bit transformers' (modeling_mpt.py, build_mpt_alibi_tensor).

    From `2**(-steepest / H)` down to `2**-steepest`. Of a number of heads that is no power of 2: every second slope of the next power of
    2, then those between.
    """
    power = 2 ** math.ceil(math.log2(heads))
    exponents = torch.arange(1, power + 1, dtype=torch.float32, device="cpu") * (steepest / power)
    found = 1.0 / torch.pow(2, exponents)
    return found if power == heads else torch.cat((found[1::2], found[::2]))[:heads]


def columns_of_queries(slopes_H: Tensor, dtype: torch.dtype) -> Tensor:
    """[H, E] in `dtype` of slopes in fp64: each as a sum of pieces, once for each digit of a position."""
    pieces, rest = [], slopes_H
    for _ in range(_PIECES):
        pieces.append(rest.to(dtype))
        rest = rest - pieces[-1].double()
    return torch.stack([*pieces, *pieces, *[torch.zeros_like(pieces[0])] * (COLUMNS - 2 * _PIECES)], dim=-1)


def columns_of_keys(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, E] in `dtype`, all of it exact: the position in its sample in two digits, once for each piece of a slope."""
    low = position_ids % _DIGIT
    digits = [*[position_ids - low] * _PIECES, *[low] * _PIECES, *[torch.zeros_like(low)] * (COLUMNS - 2 * _PIECES)]
    return torch.stack(digits, dim=-1).to(dtype)
