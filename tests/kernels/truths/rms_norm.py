"""Room rms_norm: the op once more in fp64 without the op it judges, its cases, and its nearest wrong one."""

import torch
from judging import Args, draw
from torch import Tensor


def truth(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = [row / (sum(v * v for v in row) / len(row) + eps).sqrt() * weight for row in x.flatten(0, -2)]
    return torch.stack(rows).view(x.shape) if rows else x * weight


CASES: dict[str, Args] = {
    "usual": (draw(7, 16), draw(16, seed=1), 1e-6),
    "small values, where eps counts": (draw(7, 16, scale=1e-3), draw(16, seed=1), 1e-6),
    "a width that fills no block": (draw(5, 21), draw(21, seed=1), 1e-6),
    "heads": (draw(3, 2, 16), draw(16, seed=1), 1e-6),
    "one row": (draw(1, 16), draw(16, seed=1), 1e-6),
    "no row": (draw(0, 16), draw(16, seed=1), 1e-6),
}


def wrong(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * weight


WRONG_CASE = "small values, where eps counts"
