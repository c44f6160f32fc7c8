"""Implementation `liger` of layer_norm: Liger's kernels with one read and one write forward, mean and 1 / deviation kept per row."""

from torch import Tensor

from fastllava_kernels._device import liger, norms
from fastllava_kernels._device.launch import on_device_of
from fastllava_kernels.room import Implementation


def _forward(x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (normed [..., D] in x's dtype, mean and 1 / deviation of every row in fp32)."""
    x_ND, weight_D, bias_D = x_ND.contiguous(), weight_D.contiguous(), bias_D.contiguous()
    if not liger.takes(x_ND):
        mean_N, rstd_N = norms.mean_and_rstd_of(x_ND, eps)
        normed_ND = (norms.rows_of(x_ND) - mean_N.unsqueeze(1)) * rstd_N.unsqueeze(1) * weight_D + bias_D
        return normed_ND.to(x_ND.dtype).view(x_ND.shape), mean_N, rstd_N
    from liger_kernel.ops.layer_norm import layer_norm_forward

    with on_device_of(x_ND):
        normed_ND, _, mean_N, rstd_N, *_ = layer_norm_forward(x_ND, weight_D, bias_D, eps)
    return normed_ND, mean_N, rstd_N


def _backward(
    grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, mean_N: Tensor, rstd_N: Tensor, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x and, when wanted, of weight and bias, summed in fp32; empty tensors when not."""
    grad_ND, x_ND, weight_D = grad_ND.contiguous(), x_ND.contiguous(), weight_D.contiguous()
    if not liger.takes(x_ND):
        d_x, d_weight, d_bias = norms.layer_norm_backward(grad_ND, x_ND, weight_D, mean_N, rstd_N, wants_weight)
    else:
        from liger_kernel.ops.layer_norm import layer_norm_backward

        with on_device_of(x_ND):
            # Liger reads nothing of the bias but its dtype, which is the weight's.
            d_x, d_weight, d_bias = layer_norm_backward(
                grad_ND, x_ND.flatten(0, -2), weight_D, weight_D, mean_N, rstd_N, needs_dw=wants_weight, needs_db=wants_weight
            )
    return d_x, norms.or_none(d_weight, weight_D), norms.or_none(d_bias, weight_D)


_op = norms.define("layer_norm_liger", _forward, _backward)


def layer_norm(x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """Compute the room's op, [..., D] in x's dtype."""
    return _op(x_ND, weight_D, bias_D, eps)[0]


IMPLEMENTATION = Implementation(layer_norm, liger.needs_liger)
