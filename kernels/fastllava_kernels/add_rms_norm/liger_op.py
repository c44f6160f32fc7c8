"""Implementation `liger` of add_rms_norm: Liger's fused kernels with two reads and two writes forward, 1 / rms kept per row."""

from torch import Tensor

from fastllava_kernels._device import liger, norms
from fastllava_kernels._device.launch import on_device_of
from fastllava_kernels.room import Implementation


def _forward(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (normed [T, D], sum [T, D], 1 / rms of every row of the sum in fp32)."""
    x_TD, residual_TD, weight_D = x_TD.contiguous(), residual_TD.contiguous(), weight_D.contiguous()
    if not liger.takes(x_TD):
        summed_TD = x_TD + residual_TD
        normed_TD, rstd_T = norms.rms_norm(summed_TD, weight_D, eps)
        return normed_TD, summed_TD, rstd_T
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

    with on_device_of(x_TD):
        normed_TD, summed_TD, rstd_T, *_ = fused_add_rms_norm_forward(x_TD, residual_TD, weight_D, eps, 0.0, liger.CAST_AS_LLAMA)
    return normed_TD, summed_TD, rstd_T


def _backward(
    grad_TD: Tensor, grad_sum_TD: Tensor, summed_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of x and of the residual alike, and of the weight when wanted, summed in fp32; an empty tensor when not."""
    grad_TD, grad_sum_TD, summed_TD, weight_D = (x.contiguous() for x in (grad_TD, grad_sum_TD, summed_TD, weight_D))
    if not liger.takes(summed_TD):
        d_x, d_weight = norms.rms_norm_backward(grad_TD, summed_TD, weight_D, rstd_T)
        return (d_x + grad_sum_TD).to(summed_TD.dtype), norms.or_none(d_weight if wants_weight else None, weight_D)
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_backward
    from liger_kernel.ops.utils import calculate_settings

    block, warps = calculate_settings(summed_TD.shape[-1])
    with on_device_of(summed_TD):
        # Not in place: the cotangent is read again when the graph is retained.
        d_x, _, d_weight = fused_add_rms_norm_backward(
            grad_TD, grad_sum_TD, summed_TD, weight_D, rstd_T, 0.0, liger.CAST_AS_LLAMA, block, warps, 2,
            in_place=False, needs_dw=wants_weight,
        )  # fmt: skip
    return d_x, norms.or_none(d_weight, weight_D)


_op = norms.define("add_rms_norm_liger", _forward, _backward, streams=2)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute (`rms_norm(x + residual)`, `x + residual`), both [T, D] in x's dtype."""
    normed_TD, summed_TD, _ = _op(x_TD, residual_TD, weight_D, eps)
    return normed_TD, summed_TD


IMPLEMENTATION = Implementation(add_rms_norm, liger.needs_liger)
