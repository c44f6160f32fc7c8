"""Implementation `triton` of rms_norm: our kernels, which keep x only, with one machine code for every number of rows."""

from torch import Tensor

from fastllava_kernels._device import norms
from fastllava_kernels._device.launch import needs_gpu, takes
from fastllava_kernels.room import Implementation


def _forward(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Compute the norm, [..., D] in x's dtype, rounded where the reference is."""
    x_TD, weight_D = x_TD.contiguous(), weight_D.contiguous()
    if not takes(x_TD):
        return norms.rms_norm(x_TD, weight_D, eps)[0]
    from .kernel_rms_norm import RMS

    return RMS.forward(x_TD, None, weight_D, eps)[0]


def _backward(grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, wants_weight: bool) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x and, when wanted, of the weight, summed in fp32; an empty tensor when not."""
    grad_TD, x_TD, weight_D = grad_TD.contiguous(), x_TD.contiguous(), weight_D.contiguous()
    if not takes(x_TD):
        d_x, d_weight = norms.rms_norm_backward(grad_TD, x_TD, weight_D, norms.rstd_of(x_TD, eps))
        return d_x.to(x_TD.dtype).view(x_TD.shape), norms.or_none(d_weight if wants_weight else None, weight_D)
    from .kernel_rms_norm import RMS

    d_x, d_weight = RMS.backward(grad_TD, None, x_TD, weight_D, eps, wants_weight)
    return d_x, norms.or_none(d_weight, weight_D)


rms_norm_triton = norms.define("rms_norm_triton", _forward, _backward, statistics=False)

IMPLEMENTATION = Implementation(rms_norm_triton, needs_gpu, interpretable=True)
