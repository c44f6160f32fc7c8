"""Op of rms_norm over Liger's kernels: one read and one write forward, 1 / rms kept per row."""

import math
from typing import Any

import torch
from torch import Tensor

from fastllava_kernels import liger
from fastllava_kernels.contract import custom_op
from fastllava_kernels.launch import on_device_of


def rms_norm_liger(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`rms_norm`, [..., D] in x's dtype."""
    return rms_norm_liger_forward(x_TD, weight_D, eps)[0]


@custom_op("rms_norm_liger")
def rms_norm_liger_forward(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed [..., D] in x's dtype, 1 / rms of every row in fp32)."""
    x_TD, weight_D = x_TD.contiguous(), weight_D.contiguous()
    if not liger.takes(x_TD):
        x32 = x_TD.flatten(0, -2).to(liger.dtype_of_statistics(x_TD))
        rstd_T = torch.rsqrt(x32.square().mean(-1) + eps)
        return weight_D * (x32 * rstd_T.unsqueeze(1)).to(x_TD.dtype).view(x_TD.shape), rstd_T
    from liger_kernel.ops.rms_norm import rms_norm_forward

    with on_device_of(x_TD):
        normed, _, rstd_T, *_ = rms_norm_forward(x_TD, weight_D, eps, 0.0, liger.CAST_AS_LLAMA, row_mode=None)
    return normed, rstd_T


@rms_norm_liger_forward.register_fake
def _(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd_T = x_TD.new_empty(math.prod(x_TD.shape[:-1]), dtype=liger.dtype_of_statistics(x_TD))
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format), rstd_T


@custom_op("rms_norm_liger_backward")
def rms_norm_liger_backward(grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, wants_weight: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and, when wanted, of the weight, summed in fp32; an empty tensor when not."""
    grad_TD, x_TD, weight_D = grad_TD.contiguous(), x_TD.contiguous(), weight_D.contiguous()
    if not liger.takes(x_TD):
        grad32, x32 = (x.flatten(0, -2).to(rstd_T.dtype) for x in (grad_TD, x_TD))
        normed = x32 * rstd_T.unsqueeze(1)
        scaled = grad32 * weight_D
        dx = rstd_T.unsqueeze(1) * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        dweight = (grad32 * normed).sum(0).to(weight_D.dtype) if wants_weight else weight_D.new_empty(0)
        return dx.to(x_TD.dtype).view(x_TD.shape), dweight
    from liger_kernel.ops.rms_norm import rms_norm_backward
    from liger_kernel.ops.utils import calculate_settings

    block, warps = calculate_settings(x_TD.shape[-1])
    with on_device_of(x_TD):
        # Not in place: the cotangent is read again when the graph is retained.
        dx, dweight = rms_norm_backward(
            grad_TD,
            x_TD.flatten(0, -2),
            weight_D,
            rstd_T,
            0.0,
            liger.CAST_AS_LLAMA,
            block,
            warps,
            in_place=False,
            row_mode=None,
            needs_dw=wants_weight,
        )
    return dx, weight_D.new_empty(0) if dweight is None else dweight


@rms_norm_liger_backward.register_fake
def _(grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, wants_weight: bool) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    return dx, weight_D.new_empty(weight_D.shape if wants_weight else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TD, weight_D, _ = inputs
    ctx.save_for_backward(x_TD, weight_D, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_TD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    wants_weight = ctx.needs_input_grad[1]
    dx, dweight = rms_norm_liger_backward(grad_TD, *ctx.saved_tensors, wants_weight)
    return dx, dweight if wants_weight else None, None


rms_norm_liger_forward.register_autograd(_gradients, setup_context=_keep)
