"""Implementation `xformers` of attention: its memory_efficient_attention by FlashAttention (Lefaudeux et al. 2022).

The masks are made of the lengths on the device.
"""

from typing import Any

from torch import Tensor

from fastllava_kernels.room import Implementation

from .availability import needs_width_of_flash, needs_xformers, unordered_xformers
from .flash import Packed, activate, define


class Xformers:
    """Forward with the grouped form [1, T, G, R, K], which reads keys once; backward has none and gets them repeated."""

    def forward(self, given: Packed) -> tuple[Tensor, Tensor]:
        """Compute (attention [T, H, K], log of the sum of exponentials [H, T] in fp32)."""
        from xformers.ops import fmha

        activate(None)
        q_THK, k_TGK, v_TGK, *_ = given
        groups = k_TGK.shape[1]
        q = q_THK.unflatten(1, (groups, -1)).unsqueeze(0)
        k, v = (x.unsqueeze(2).unsqueeze(0).expand(q.shape) for x in (k_TGK, v_TGK))
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, mask_of(given), op=operators()[0])
        return out.reshape(q_THK.shape), lse.reshape(q_THK.shape[1], len(q_THK))

    def backward(self, grad_THK: Tensor, given: Packed, out_THK: Tensor, lse_HT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of q, k and v."""
        from xformers.ops import fmha

        activate(None)
        q_THK, k_TGK, v_TGK, *_ = given
        each = q_THK.shape[1] // k_TGK.shape[1]
        k_THK, v_THK = (x.repeat_interleave(each, dim=1) if each > 1 else x for x in (k_TGK, v_TGK))
        # The operator itself: the functions above it refuse deterministic algorithms, which it has where it runs PyTorch's own kernels.
        grads = operators()[1].apply(
            fmha.Context(out=out_THK.unsqueeze(0), lse=lse_HT.unsqueeze(0)),
            fmha.Inputs(query=q_THK.unsqueeze(0), key=k_THK.unsqueeze(0), value=v_THK.unsqueeze(0), attn_bias=mask_of(given)),
            grad_THK.unsqueeze(0),
        )
        dk, dv = (x.squeeze(0) for x in (grads.dk, grads.dv))
        if each > 1:
            dk, dv = (x.unflatten(1, (-1, each)).float().sum(2).to(x.dtype) for x in (dk, dv))
        return grads.dq.squeeze(0), dk, dv


def mask_of(given: Packed) -> Any:
    """Make xformers' mask of packed samples without their lengths on the host, which only its checks and dense masks read."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, BlockDiagonalMask, _SeqLenInfo

    lengths = _SeqLenInfo(seqstart=given.cu_seqlens, max_seqlen=given.max_seqlen, min_seqlen=0, seqstart_py=[0, len(given.q_THK)])
    return (BlockDiagonalCausalMask if given.causal else BlockDiagonalMask)(q_seqinfo=lengths, k_seqinfo=lengths)


def operators() -> Any:
    """Return (forward, backward) of the newest FlashAttention that this xformers has here."""
    from xformers.ops import fmha

    newest = fmha.flash3 if fmha.flash3.FwOp.is_available() else fmha.flash
    return newest.FwOp, newest.BwOp


IMPLEMENTATION = Implementation(define("xformers", Xformers()), needs_xformers, needs_width_of_flash, unordered_xformers)
