"""Room rope: the op once more in fp64 without the op it judges, its cases, and its nearest wrong one."""

import torch
from judging import FP64, Args, Table, draw
from torch import Tensor


def truth(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates i and i + K/2 are one complex number, turned by the row's angle i."""
    half = cos.shape[1] // 2
    turn = torch.complex(cos[:, None, :half], sin[:, None, :half])
    turned = [torch.complex(x[..., :half], x[..., half:]) * turn for x in (q, k)]
    first, second = (torch.cat((z.real, z.imag), dim=-1) for z in turned)
    return first, second


def rope_inputs(rows: int, key_heads: int) -> Args:
    angles = torch.outer(torch.arange(rows, dtype=FP64), 100.0 ** (-torch.arange(4, dtype=FP64) / 4))
    cos, sin = (torch.cat((part, part), dim=-1) for part in (angles.cos(), angles.sin()))
    return draw(rows, 4, 8), draw(rows, key_heads, 8, seed=1), Table(cos), Table(sin)


CASES: dict[str, Args] = {
    "usual": rope_inputs(6, 4),
    "grouped": rope_inputs(6, 2),
    "one row": rope_inputs(1, 4),
    "no row": rope_inputs(0, 4),
}


def wrong(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring coordinates in place of halves."""
    swapped = [torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) for x in (q, k)]
    return q * cos[:, None] + swapped[0] * sin[:, None], k * cos[:, None] + swapped[1] * sin[:, None]


WRONG_CASE = "usual"
