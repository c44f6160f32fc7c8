"""What the implementations over FlashAttention share: the ops, and PyTorch's switch between its versions.

Dao et al. 2022 to 2024, arXiv 2205.14135, 2307.08691, 2407.08608. Nothing of size n x n is held and no length is read on
the host; kept are the inputs, the output and the log of each row's sum of exponentials. Without a GPU the ops run eager.py.

Backward adds the gradients of queries in any order, unless `torch.use_deterministic_algorithms` is on: PyTorch hands that on
to versions 2, 3 and 4 as their argument `deterministic`, which costs time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl, restore_flash_attention_impl

from fastllava_kernels._device.launch import on_device_of
from fastllava_kernels.contract import custom_op

from . import eager
from .availability import WIDEST

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]


class Packed(NamedTuple):
    """The arguments of the room, as a library gets them: contiguous, on a GPU, with no bound beyond the rows."""

    q_THK: Tensor
    k_TGK: Tensor
    v_TGK: Tensor
    cu_seqlens: Tensor
    """The row where each sample starts, then T: int32 [S+1]."""
    max_seqlen: int
    causal: bool


class Library(Protocol):
    """The library that computes on CUDA tensors."""

    def forward(self, given: Packed) -> tuple[Tensor, Tensor]:
        """Compute (attention [T, H, K], log of the sum of exponentials [H, T] in fp32)."""
        ...

    def backward(self, grad_THK: Tensor, given: Packed, out_THK: Tensor, lse_HT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of q, k and v."""
        ...


def activate(wanted: str | None) -> None:
    """Turn the process's FlashAttention to `wanted`, "FA3" or "FA4", or back to PyTorch's own with None.

    The switch is PyTorch's and holds for scaled_dot_product_attention too.
    """
    if current_flash_attention_impl() == wanted:
        return
    if wanted is None:
        restore_flash_attention_impl()
    else:
        activate_flash_attention_impl(wanted)


def define(name: str, library: Library) -> Attention:
    """Return the function of implementation `name`: ops fastllava::attention_<name> and ..._backward over `library`."""

    def kernels_take(q_THK: Tensor) -> bool:
        width = q_THK.shape[2]
        if width % 8 or width > WIDEST:
            raise ValueError(
                f"kernels.attention: '{name}' takes heads whose width is a multiple of 8 up to {WIDEST}, not {width}; "
                "write kernels.attention=reference"
            )
        return q_THK.is_cuda

    @custom_op(f"attention_{name}")
    def forward(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> tuple[Tensor, Tensor]:
        q_THK, k_TGK, v_TGK = q_THK.contiguous(), k_TGK.contiguous(), v_TGK.contiguous()
        if not kernels_take(q_THK) or q_THK.shape[0] == 0:
            return eager.forward(q_THK, k_TGK, v_TGK, cu_seqlens, causal)
        with on_device_of(q_THK):
            return library.forward(Packed(q_THK, k_TGK, v_TGK, _within(cu_seqlens, q_THK), max_seqlen, causal))

    @forward.register_fake
    def _(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> tuple[Tensor, Tensor]:
        lse_HT = q_THK.new_empty((q_THK.shape[1], q_THK.shape[0]), dtype=torch.promote_types(q_THK.dtype, torch.float32))
        return torch.empty_like(q_THK, memory_format=torch.contiguous_format), lse_HT

    @custom_op(f"attention_{name}_backward")
    def backward(
        grad_THK: Tensor,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        out_THK: Tensor,
        lse_HT: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_THK, q_THK, k_TGK, v_TGK = (x.contiguous() for x in (grad_THK, q_THK, k_TGK, v_TGK))
        if not kernels_take(q_THK) or q_THK.shape[0] == 0:
            return eager.backward(grad_THK, q_THK, k_TGK, v_TGK, cu_seqlens, causal)
        with on_device_of(q_THK):
            given = Packed(q_THK, k_TGK, v_TGK, _within(cu_seqlens, q_THK), max_seqlen, causal)
            return library.backward(grad_THK, given, out_THK, lse_HT)

    @backward.register_fake
    def _(grad_THK: Tensor, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THK, k_TGK, v_TGK))
        return dq, dk, dv

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q_THK, k_TGK, v_TGK, cu_seqlens, ctx.max_seqlen, ctx.causal = inputs
        ctx.save_for_backward(q_THK, k_TGK, v_TGK, *output, cu_seqlens)
        ctx.mark_non_differentiable(output[1])
        # No zeros in place of the gradient that the log has not.
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, grad_THK: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_THK is None:
            return (None,) * 6
        return *backward(grad_THK, *ctx.saved_tensors, ctx.max_seqlen, ctx.causal), None, None, None

    forward.register_autograd(gradients, setup_context=keep)

    def attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
        return forward(q_THK, k_TGK, v_TGK, cu_seqlens, max_seqlen, causal)[0]

    return attention


def _within(cu_seqlens: Tensor, q_THK: Tensor) -> Tensor:
    """Return the bounds as int32, none beyond the rows: the kernels follow whatever stands there."""
    return cu_seqlens.clamp(0, q_THK.shape[0]).int()
