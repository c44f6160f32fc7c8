"""Room layer_norm: the op once more in fp64 without the op it judges, its cases, and its nearest wrong one."""

from judging import Args, draw
from torch import Tensor


def truth(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centred * (centred.square().sum(-1, keepdim=True) / x.shape[-1] + eps) ** -0.5 * weight + bias


CASES: dict[str, Args] = {
    "usual": (draw(7, 16), draw(16, seed=1), draw(16, seed=2), 1e-5),
    "small values, where eps counts": (draw(7, 16, scale=1e-3), draw(16, seed=1), draw(16, seed=2), 1e-5),
    "two axes before": (draw(2, 3, 16), draw(16, seed=1), draw(16, seed=2), 1e-5),
    "a width that fills no block": (draw(5, 21), draw(21, seed=1), draw(21, seed=2), 1e-5),
    "one row": (draw(1, 16), draw(16, seed=1), draw(16, seed=2), 1e-5),
    "no row": (draw(0, 16), draw(16, seed=1), draw(16, seed=2), 1e-5),
}


def wrong(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0).sqrt() + eps) * weight + bias


WRONG_CASE = "small values, where eps counts"
