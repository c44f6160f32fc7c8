"""Implementation `liger` of rms_norm: Liger's kernels with one read and one write forward, 1 / rms kept per row."""

from torch import Tensor

from fastllava_kernels._device import liger, norms
from fastllava_kernels._device.launch import on_device_of
from fastllava_kernels.room import Implementation


def _forward(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute (normed [..., D] in x's dtype, 1 / rms of every row in fp32)."""
    x_TD, weight_D = x_TD.contiguous(), weight_D.contiguous()
    if not liger.takes(x_TD):
        return norms.rms_norm(x_TD, weight_D, eps)
    from liger_kernel.ops.rms_norm import rms_norm_forward

    with on_device_of(x_TD):
        normed, _, rstd_T, *_ = rms_norm_forward(x_TD, weight_D, eps, 0.0, liger.CAST_AS_LLAMA, row_mode=None)
    return normed, rstd_T


def _backward(grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, wants_weight: bool) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x and, when wanted, of the weight, summed in fp32; an empty tensor when not."""
    grad_TD, x_TD, weight_D = grad_TD.contiguous(), x_TD.contiguous(), weight_D.contiguous()
    if not liger.takes(x_TD):
        d_x, d_weight = norms.rms_norm_backward(grad_TD, x_TD, weight_D, rstd_T)
        return d_x.to(x_TD.dtype).view(x_TD.shape), norms.or_none(d_weight if wants_weight else None, weight_D)
    from liger_kernel.ops.rms_norm import rms_norm_backward
    from liger_kernel.ops.utils import calculate_settings

    block, warps = calculate_settings(x_TD.shape[-1])
    with on_device_of(x_TD):
        # Not in place: the cotangent is read again when the graph is retained.
        d_x, d_weight = rms_norm_backward(
            grad_TD, x_TD.flatten(0, -2), weight_D, rstd_T, 0.0, liger.CAST_AS_LLAMA, block, warps,
            in_place=False, row_mode=None, needs_dw=wants_weight,
        )  # fmt: skip
    return d_x, norms.or_none(d_weight, weight_D)


_op = norms.define("rms_norm_liger", _forward, _backward)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Compute the room's op, [..., D] in x's dtype."""
    return _op(x_TD, weight_D, eps)[0]


IMPLEMENTATION = Implementation(rms_norm, liger.needs_liger)
