"""Reference of add_rms_norm: the residual stream of a pre-norm transformer, added and normed."""

import torch
from torch import Tensor

from fastllava_kernels.contract import Contract, fits
from fastllava_kernels.room import Implementation


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute (`rms_norm(x + residual, weight, eps)`, `x + residual`), both [T, D] in x's dtype; statistics in fp32 of the rounded sum."""
    summed = x_TD + residual_TD
    sum32 = summed.to(torch.promote_types(summed.dtype, torch.float32))
    normed = sum32 * torch.rsqrt(sum32.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed.to(x_TD.dtype), summed


def check(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> None:
    """Raises ValueError for sizes that do not fit."""
    good = x_TD.ndim == 2 and residual_TD.shape == x_TD.shape and weight_D.shape == x_TD.shape[1:]
    fits(good, "add_rms_norm", "x and residual are [T, D] and weight [D]", x_TD, residual_TD, weight_D)


CONTRACT = Contract(check)
IMPLEMENTATION = Implementation(add_rms_norm)
