"""Implementation `triton` of rope: our kernel, which reads its inputs once and writes beside them, where Liger's writes over copies."""

from typing import Any

import torch
from torch import Tensor

from fastllava_kernels._device.launch import needs_gpu, takes
from fastllava_kernels.contract import custom_op
from fastllava_kernels.room import Implementation

from .reference import rope


@custom_op("rope_triton")
def rope_triton(q_THK: Tensor, k_TGK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries [T, H, K] and keys [T, G, K], in their dtype, rounded once. cos and sin are tables: they get no gradient."""
    if not takes(q_THK):
        return rope(q_THK.contiguous(), k_TGK.contiguous(), cos_TK, sin_TK)
    from . import kernel_rotate

    return kernel_rotate.rotate(q_THK, k_TGK, cos_TK, sin_TK, backward=False)


@custom_op("rope_triton_backward")
def rope_triton_backward(grad_q_THK: Tensor, grad_k_TGK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of q and k: the cotangents turned back."""
    if not takes(grad_q_THK):
        half = sin_TK.shape[1] // 2
        swapped = torch.cat((sin_TK[:, half:], sin_TK[:, :half]), dim=1)
        return rope(grad_q_THK.contiguous(), grad_k_TGK.contiguous(), cos_TK, -swapped)
    from . import kernel_rotate

    return kernel_rotate.rotate(grad_q_THK, grad_k_TGK, cos_TK, sin_TK, backward=True)


@rope_triton.register_fake
@rope_triton_backward.register_fake
def _(q_THK: Tensor, k_TGK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> tuple[Tensor, Tensor]:
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THK, k_TGK))
    return q_out, k_out


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[2:])


def _gradients(ctx: Any, grad_q_THK: Tensor, grad_k_TGK: Tensor) -> tuple[Tensor | None, ...]:
    return *rope_triton_backward(grad_q_THK, grad_k_TGK, *ctx.saved_tensors), None, None


rope_triton.register_autograd(_gradients, setup_context=_keep)

IMPLEMENTATION = Implementation(rope_triton, needs_gpu, interpretable=True)
