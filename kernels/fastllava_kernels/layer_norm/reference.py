"""Reference of layer_norm (Ba et al. 2016, arXiv 1607.06450)."""

import torch.nn.functional as F
from torch import Tensor

from fastllava_kernels.contract import Contract, fits
from fastllava_kernels.room import Implementation


def layer_norm(x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """Compute `weight * (x - mean) / sqrt(var + eps) + bias` with the biased variance: [..., D] in x's dtype."""
    return F.layer_norm(x_ND, weight_D.shape, weight_D, bias_D, eps)


def check(x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> None:
    """Raises ValueError for sizes that do not fit."""
    good = x_ND.ndim > 0 and weight_D.shape == bias_D.shape == x_ND.shape[-1:]
    fits(good, "layer_norm", "x is [..., D], weight and bias [D]", x_ND, weight_D, bias_D)


CONTRACT = Contract(check)
IMPLEMENTATION = Implementation(layer_norm)
