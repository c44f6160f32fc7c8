"""Implementation `triton` of add_rms_norm: our kernels, which keep the sum only, with one machine code for every number of rows."""

from torch import Tensor

from fastllava_kernels._device import norms
from fastllava_kernels._device.launch import needs_gpu, takes
from fastllava_kernels.room import Implementation


def _forward(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute (normed, sum), both [T, D] in x's dtype, rounded where the reference is."""
    x_TD, residual_TD, weight_D = x_TD.contiguous(), residual_TD.contiguous(), weight_D.contiguous()
    if not takes(x_TD):
        summed_TD = x_TD + residual_TD
        return norms.rms_norm(summed_TD, weight_D, eps)[0], summed_TD
    from .kernel_add_rms_norm import RMS

    return RMS.forward(x_TD, residual_TD, weight_D, eps)


def _backward(
    grad_TD: Tensor, grad_sum_TD: Tensor, summed_TD: Tensor, weight_D: Tensor, eps: float, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of x and of the residual alike, and of the weight when wanted, summed in fp32; an empty tensor when not."""
    grad_TD, grad_sum_TD, summed_TD, weight_D = (x.contiguous() for x in (grad_TD, grad_sum_TD, summed_TD, weight_D))
    if not takes(summed_TD):
        d_x, d_weight = norms.rms_norm_backward(grad_TD, summed_TD, weight_D, norms.rstd_of(summed_TD, eps))
        return (d_x + grad_sum_TD).to(summed_TD.dtype), norms.or_none(d_weight if wants_weight else None, weight_D)
    from .kernel_add_rms_norm import RMS

    d_x, d_weight = RMS.backward(grad_TD, grad_sum_TD, summed_TD, weight_D, eps, wants_weight)
    return d_x, norms.or_none(d_weight, weight_D)


add_rms_norm_triton = norms.define("add_rms_norm_triton", _forward, _backward, streams=2, statistics=False)

IMPLEMENTATION = Implementation(add_rms_norm_triton, needs_gpu, interpretable=True)
