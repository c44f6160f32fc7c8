"""Op of layer_norm over Liger's kernels: one read and one write forward, mean and 1 / deviation kept per row."""

import math
from typing import Any

import torch
from torch import Tensor

from fastllava_kernels import liger
from fastllava_kernels.contract import custom_op
from fastllava_kernels.launch import on_device_of


def layer_norm_liger(x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """`layer_norm`, [..., D] in x's dtype."""
    return layer_norm_liger_forward(x_ND, weight_D, bias_D, eps)[0]


@custom_op("layer_norm_liger")
def layer_norm_liger_forward(x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normed [..., D] in x's dtype, mean and 1 / deviation of every row in fp32)."""
    x_ND, weight_D, bias_D = x_ND.contiguous(), weight_D.contiguous(), bias_D.contiguous()
    if not liger.takes(x_ND):
        x32 = x_ND.flatten(0, -2).to(liger.dtype_of_statistics(x_ND))
        mean_N = x32.mean(-1)
        centred = x32 - mean_N.unsqueeze(1)
        rstd_N = torch.rsqrt(centred.square().mean(-1) + eps)
        normed = centred * rstd_N.unsqueeze(1) * weight_D + bias_D
        return normed.to(x_ND.dtype).view(x_ND.shape), mean_N, rstd_N
    from liger_kernel.ops.layer_norm import layer_norm_forward

    with on_device_of(x_ND):
        normed, _, mean_N, rstd_N, *_ = layer_norm_forward(x_ND, weight_D, bias_D, eps)
    return normed, mean_N, rstd_N


@layer_norm_liger_forward.register_fake
def _(x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean_N, rstd_N = (x_ND.new_empty(math.prod(x_ND.shape[:-1]), dtype=liger.dtype_of_statistics(x_ND)) for _ in range(2))
    return torch.empty_like(x_ND, memory_format=torch.contiguous_format), mean_N, rstd_N


@custom_op("layer_norm_liger_backward")
def layer_norm_liger_backward(
    grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, mean_N: Tensor, rstd_N: Tensor, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and, when wanted, of weight and bias, summed in fp32; empty tensors when not."""
    grad_ND, x_ND, weight_D = grad_ND.contiguous(), x_ND.contiguous(), weight_D.contiguous()
    none = weight_D.new_empty(0)
    if not liger.takes(x_ND):
        grad32, x32 = (x.flatten(0, -2).to(rstd_N.dtype) for x in (grad_ND, x_ND))
        normed = (x32 - mean_N.unsqueeze(1)) * rstd_N.unsqueeze(1)
        scaled = grad32 * weight_D
        dx = rstd_N.unsqueeze(1) * (scaled - scaled.mean(-1, keepdim=True) - normed * (scaled * normed).mean(-1, keepdim=True))
        dx = dx.to(x_ND.dtype).view(x_ND.shape)
        if not wants_weight:
            return dx, none, none.clone()
        return dx, (grad32 * normed).sum(0).to(weight_D.dtype), grad32.sum(0).to(weight_D.dtype)
    from liger_kernel.ops.layer_norm import layer_norm_backward

    with on_device_of(x_ND):
        # Of the bias Liger reads the dtype only, and that is the weight's.
        dx, dweight, dbias = layer_norm_backward(
            grad_ND, x_ND.flatten(0, -2), weight_D, weight_D, mean_N, rstd_N, needs_dw=wants_weight, needs_db=wants_weight
        )
    return dx, none if dweight is None else dweight, none.clone() if dbias is None else dbias


@layer_norm_liger_backward.register_fake
def _(grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, mean_N: Tensor, rstd_N: Tensor, wants_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = (weight_D.new_empty(weight_D.shape if wants_weight else 0) for _ in range(2))
    return torch.empty_like(x_ND, memory_format=torch.contiguous_format), dweight, dbias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_ND, weight_D, _, _ = inputs
    _, mean_N, rstd_N = output
    ctx.save_for_backward(x_ND, weight_D, mean_N, rstd_N)
    ctx.mark_non_differentiable(mean_N, rstd_N)


def _gradients(ctx: Any, grad_ND: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    wants_weight = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, dweight, dbias = layer_norm_liger_backward(grad_ND, *ctx.saved_tensors, wants_weight)
    return dx, dweight if wants_weight else None, dbias if wants_weight else None, None


layer_norm_liger_forward.register_autograd(_gradients, setup_context=_keep)
