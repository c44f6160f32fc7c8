"""Implementation `triton` of layer_norm: our kernels, which keep x only, with one machine code for every number of rows."""

import torch.nn.functional as F
from torch import Tensor

from fastllava_kernels._device import norms
from fastllava_kernels._device.launch import needs_gpu, takes
from fastllava_kernels.room import Implementation


def _forward(x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """Compute the norm, [..., D] in x's dtype, rounded once."""
    x_ND, weight_D, bias_D = x_ND.contiguous(), weight_D.contiguous(), bias_D.contiguous()
    if not takes(x_ND):
        return F.layer_norm(x_ND, weight_D.shape, weight_D, bias_D, eps)
    from . import kernel_layer_norm

    return kernel_layer_norm.forward(x_ND, weight_D, bias_D, eps)


def _backward(grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, eps: float, wants_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x and, when wanted, of weight and bias, summed in fp32; empty tensors when not."""
    grad_ND, x_ND, weight_D = grad_ND.contiguous(), x_ND.contiguous(), weight_D.contiguous()
    if takes(x_ND):
        from . import kernel_layer_norm

        d_x, d_weight, d_bias = kernel_layer_norm.backward(grad_ND, x_ND, weight_D, eps, wants_weight)
    else:
        mean_N, rstd_N = norms.mean_and_rstd_of(x_ND, eps)
        d_x, d_weight, d_bias = norms.layer_norm_backward(grad_ND, x_ND, weight_D, mean_N, rstd_N, wants_weight)
    return d_x, norms.or_none(d_weight, weight_D), norms.or_none(d_bias, weight_D)


layer_norm_triton = norms.define("layer_norm_triton", _forward, _backward, statistics=False)

IMPLEMENTATION = Implementation(layer_norm_triton, needs_gpu, interpretable=True)
