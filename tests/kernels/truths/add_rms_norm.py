"""Room add_rms_norm: the op once more in fp64 without the op it judges, its cases, and its nearest wrong one."""

import torch
from judging import Args, draw
from torch import Tensor


def truth(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = x + residual
    rows = [row / (sum(v * v for v in row) / len(row) + eps).sqrt() * weight for row in summed]
    return (torch.stack(rows) if rows else summed * weight), summed


CASES: dict[str, Args] = {
    "usual": (draw(7, 16), draw(7, 16, seed=3), draw(16, seed=1), 1e-6),
    "small values, where eps counts": (draw(7, 16, scale=1e-3), draw(7, 16, seed=3, scale=1e-3), draw(16, seed=1), 1e-6),
    "a width that fills no block": (draw(5, 21), draw(5, 21, seed=3), draw(21, seed=1), 1e-6),
    "one row": (draw(1, 16), draw(1, 16, seed=3), draw(16, seed=1), 1e-6),
    "no row": (draw(0, 16), draw(0, 16, seed=3), draw(16, seed=1), 1e-6),
}


def wrong(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of the sum's first term only."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight, x + residual


WRONG_CASE = "usual"
