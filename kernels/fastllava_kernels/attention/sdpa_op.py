"""Implementation `sdpa` of attention: PyTorch's scaled_dot_product_attention as an op, for torch.compile, on any device.

It reads the samples' lengths on the host in both passes, so it waits for a GPU. It keeps its inputs only; backward
computes a sample's shares again and holds them: fp32 [H, n, n] for n rows.
"""

from typing import Any

import torch
from torch import Tensor

from fastllava_kernels.contract import custom_op
from fastllava_kernels.room import Implementation

from . import eager
from .reference import attention


@custom_op("attention_sdpa")
def sdpa(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
    """Compute `attention`, [T, H, K] in q's dtype."""
    return attention(q_THK, k_TGK, v_TGK, cu_seqlens, max_seqlen, causal).contiguous()


@sdpa.register_fake
def _(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
    return torch.empty_like(q_THK, memory_format=torch.contiguous_format)


@custom_op("attention_sdpa_backward")
def sdpa_backward(
    grad_THK: Tensor, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v."""
    return eager.backward(grad_THK, q_THK, k_TGK, v_TGK, cu_seqlens, causal)


@sdpa_backward.register_fake
def _(grad_THK: Tensor, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THK, k_TGK, v_TGK))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q_THK, k_TGK, v_TGK, cu_seqlens, _, ctx.causal = inputs
    ctx.save_for_backward(q_THK, k_TGK, v_TGK, cu_seqlens)


def _gradients(ctx: Any, grad_THK: Tensor) -> tuple[Tensor | None, ...]:
    return *sdpa_backward(grad_THK, *ctx.saved_tensors, ctx.causal), None, None, None


sdpa.register_autograd(_gradients, setup_context=_keep)

IMPLEMENTATION = Implementation(sdpa)
