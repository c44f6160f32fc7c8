"""Implementation `liger` of rope: Liger's kernel, which turns queries and keys in one launch; only cos and sin are kept for backward."""

from typing import Any

import torch
from torch import Tensor

from fastllava_kernels._device import liger
from fastllava_kernels._device.launch import on_device_of
from fastllava_kernels.contract import custom_op
from fastllava_kernels.room import Implementation

from .reference import rope


@custom_op("rope_liger")
def rope_liger(q_THK: Tensor, k_TGK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries [T, H, K] and keys [T, G, K], in their dtype. cos and sin are tables: they get no gradient.

    Only the first halves of cos' and sin's rows are read; the second ones repeat them.
    """
    if not liger.takes(q_THK, interpretable=True):
        return rope(q_THK.contiguous(), k_TGK.contiguous(), cos_TK, sin_TK)
    from liger_kernel.ops.rope import rope_forward

    with on_device_of(q_THK):
        q, k, _, _ = rope_forward(_to_overwrite(q_THK), _to_overwrite(k_TGK), cos_TK, sin_TK)
    return _rows_first(q), _rows_first(k)


@custom_op("rope_liger_backward")
def rope_liger_backward(grad_q_THK: Tensor, grad_k_TGK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of q and k: the cotangents turned back."""
    if not liger.takes(grad_q_THK, interpretable=True):
        return rope(grad_q_THK.contiguous(), grad_k_TGK.contiguous(), cos_TK, -sin_TK)
    from liger_kernel.ops.rope import rope_backward

    with on_device_of(grad_q_THK):
        q, k = rope_backward(_to_overwrite(grad_q_THK), _to_overwrite(grad_k_TGK), cos_TK, sin_TK)
    return _rows_first(q), _rows_first(k)


@rope_liger.register_fake
@rope_liger_backward.register_fake
def _(q_THK: Tensor, k_TGK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(q_THK, memory_format=torch.contiguous_format),
        torch.empty_like(k_TGK, memory_format=torch.contiguous_format),
    )


def _to_overwrite(x_THK: Tensor) -> Tensor:
    """Return a copy, which Liger writes over, in the shape that it wants: [1, H, T, K] with T before H in memory."""
    return x_THK.clone(memory_format=torch.contiguous_format).unsqueeze(0).transpose(1, 2)


def _rows_first(x_1HTK: Tensor) -> Tensor:
    return x_1HTK.transpose(1, 2).squeeze(0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[2:])


def _gradients(ctx: Any, grad_q_THK: Tensor, grad_k_TGK: Tensor) -> tuple[Tensor | None, ...]:
    return *rope_liger_backward(grad_q_THK, grad_k_TGK, *ctx.saved_tensors), None, None


rope_liger.register_autograd(_gradients, setup_context=_keep)

IMPLEMENTATION = Implementation(rope_liger, liger.needs_liger, interpretable=True)
