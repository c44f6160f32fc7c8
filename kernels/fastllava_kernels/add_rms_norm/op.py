"""Op of add_rms_norm over Liger's fused kernels: two reads and two writes forward, 1 / rms kept per row."""

from typing import Any

import torch
from torch import Tensor

from fastllava_kernels import liger
from fastllava_kernels.contract import custom_op
from fastllava_kernels.launch import on_device_of


def add_rms_norm_liger(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(`rms_norm(x + residual)`, `x + residual`), both [T, D] in x's dtype."""
    normed_TD, summed_TD, _ = add_rms_norm_liger_forward(x_TD, residual_TD, weight_D, eps)
    return normed_TD, summed_TD


@custom_op("add_rms_norm_liger")
def add_rms_norm_liger_forward(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normed [T, D], sum [T, D], 1 / rms of every row of the sum in fp32)."""
    x_TD, residual_TD, weight_D = x_TD.contiguous(), residual_TD.contiguous(), weight_D.contiguous()
    if not liger.takes(x_TD):
        summed = x_TD + residual_TD
        sum32 = summed.to(liger.dtype_of_statistics(summed))
        rstd_T = torch.rsqrt(sum32.square().mean(-1) + eps)
        return weight_D * (sum32 * rstd_T.unsqueeze(1)).to(x_TD.dtype), summed, rstd_T
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

    with on_device_of(x_TD):
        normed, summed, rstd_T, *_ = fused_add_rms_norm_forward(x_TD, residual_TD, weight_D, eps, 0.0, liger.CAST_AS_LLAMA)
    return normed, summed, rstd_T


@add_rms_norm_liger_forward.register_fake
def _(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    normed, summed = (torch.empty_like(x_TD, memory_format=torch.contiguous_format) for _ in range(2))
    return normed, summed, x_TD.new_empty(x_TD.shape[0], dtype=liger.dtype_of_statistics(x_TD))


@custom_op("add_rms_norm_liger_backward")
def add_rms_norm_liger_backward(
    grad_TD: Tensor, grad_sum_TD: Tensor, summed_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of x and of the residual alike, and of the weight when wanted, summed in fp32; an empty tensor when not."""
    grad_TD, grad_sum_TD, summed_TD, weight_D = (x.contiguous() for x in (grad_TD, grad_sum_TD, summed_TD, weight_D))
    if not liger.takes(summed_TD):
        grad32 = grad_TD.to(rstd_T.dtype)
        normed = summed_TD.to(rstd_T.dtype) * rstd_T.unsqueeze(1)
        scaled = grad32 * weight_D
        dx = rstd_T.unsqueeze(1) * (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) + grad_sum_TD
        dweight = (grad32 * normed).sum(0).to(weight_D.dtype) if wants_weight else weight_D.new_empty(0)
        return dx.to(summed_TD.dtype), dweight
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_backward
    from liger_kernel.ops.utils import calculate_settings

    block, warps = calculate_settings(summed_TD.shape[-1])
    with on_device_of(summed_TD):
        # Not in place: the cotangent is read again when the graph is retained.
        dx, _, dweight = fused_add_rms_norm_backward(
            grad_TD,
            grad_sum_TD,
            summed_TD,
            weight_D,
            rstd_T,
            0.0,
            liger.CAST_AS_LLAMA,
            block,
            warps,
            2,
            in_place=False,
            needs_dw=wants_weight,
        )
    return dx, weight_D.new_empty(0) if dweight is None else dweight


@add_rms_norm_liger_backward.register_fake
def _(
    grad_TD: Tensor, grad_sum_TD: Tensor, summed_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(summed_TD, memory_format=torch.contiguous_format)
    return dx, weight_D.new_empty(weight_D.shape if wants_weight else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, summed_TD, rstd_T = output
    ctx.save_for_backward(summed_TD, inputs[2], rstd_T)
    ctx.mark_non_differentiable(rstd_T)


def _gradients(ctx: Any, grad_TD: Tensor, grad_sum_TD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    wants_weight = ctx.needs_input_grad[2]
    dx, dweight = add_rms_norm_liger_backward(grad_TD, grad_sum_TD, *ctx.saved_tensors, wants_weight)
    return dx, dx, dweight if wants_weight else None, None


add_rms_norm_liger_forward.register_autograd(_gradients, setup_context=_keep)
