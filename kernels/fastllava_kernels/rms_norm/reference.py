"""Reference of rms_norm: as LlamaRMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467)."""

import torch
from torch import Tensor

from fastllava_kernels.contract import Contract, fits
from fastllava_kernels.room import Implementation


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Compute `weight * (x / sqrt(mean(x^2) + eps))`, [T, D] in x's dtype; statistics in fp32, rounded to x's dtype before `weight`."""
    x32 = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed.to(x_TD.dtype)


def check(x_TD: Tensor, weight_D: Tensor, eps: float) -> None:
    """Raises ValueError for sizes that do not fit."""
    fits(x_TD.ndim > 0 and weight_D.shape == x_TD.shape[-1:], "rms_norm", "x is [..., D] and weight [D]", x_TD, weight_D)


CONTRACT = Contract(check)
IMPLEMENTATION = Implementation(rms_norm)
