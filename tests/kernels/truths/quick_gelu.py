"""Room quick_gelu: the op once more in fp64 without the op it judges, its cases, and its nearest wrong one."""

import torch
from judging import Args, draw
from torch import Tensor


def truth(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


CASES: dict[str, Args] = {"usual": (draw(3, 5, scale=3.0),), "no row": (draw(0, 5),)}


wrong = torch.nn.functional.gelu


WRONG_CASE = "usual"
