"""Room swiglu: the op once more in fp64 without the op it judges, its cases, and its nearest wrong one."""

import torch
from judging import Args, draw
from torch import Tensor


def truth(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


CASES: dict[str, Args] = {
    "usual": (draw(5, 8, scale=3.0), draw(5, 8, seed=1)),
    "one row": (draw(1, 8), draw(1, 8, seed=1)),
    "no row": (draw(0, 8), draw(0, 8, seed=1)),
}


def wrong(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.gelu(gate) * up


WRONG_CASE = "usual"
