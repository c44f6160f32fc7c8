"""Room rms_norm: the op once more in fp64 without the op it judges, its cases, and its nearest wrong one."""

import torch
from judging import Args, draw
from torch import Tensor


def truth(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.stack([row / (sum(v * v for v in row) / len(row) + eps).sqrt() * weight for row in x]) if len(x) else x * weight


CASES: dict[str, Args] = {
    "usual": (draw(7, 16), draw(16, seed=1), 1e-6),
    "small values, where eps counts": (draw(7, 16, scale=1e-3), draw(16, seed=1), 1e-6),
    "one row": (draw(1, 16), draw(16, seed=1), 1e-6),
    "no row": (draw(0, 16), draw(16, seed=1), 1e-6),
}


def wrong(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * weight


WRONG_CASE = "small values, where eps counts"
