"""xformers' memory_efficient_attention (Lefaudeux et al. 2022) by its FlashAttention, masks made of the lengths on the device."""

from typing import Any

from torch import Tensor

from .flash import activate, define


class Xformers:
    """Forward with the grouped form [1, T, G, R, K], which reads keys once; backward has none and gets them repeated."""

    def forward(
        self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool
    ) -> tuple[Tensor, Tensor]:
        from xformers.ops import fmha

        activate(None)
        groups = k_TGK.shape[1]
        q = q_THK.unflatten(1, (groups, -1)).unsqueeze(0)
        k, v = (x.unsqueeze(2).unsqueeze(0).expand(q.shape) for x in (k_TGK, v_TGK))
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(
            q, k, v, mask_of(cu_seqlens, max_seqlen, len(q_THK), causal), op=operators()[0]
        )
        return out.reshape(q_THK.shape), lse.reshape(q_THK.shape[1], len(q_THK))

    def backward(
        self,
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
        from xformers.ops import fmha

        activate(None)
        each = q_THK.shape[1] // k_TGK.shape[1]
        k_THK, v_THK = (x.repeat_interleave(each, dim=1) if each > 1 else x for x in (k_TGK, v_TGK))
        mask = mask_of(cu_seqlens, max_seqlen, len(q_THK), causal)
        # The operator itself: the functions above it refuse to run it in a fixed order, which it can.
        grads = operators()[1].apply(
            fmha.Context(out=out_THK.unsqueeze(0), lse=lse_HT.unsqueeze(0)),
            fmha.Inputs(query=q_THK.unsqueeze(0), key=k_THK.unsqueeze(0), value=v_THK.unsqueeze(0), attn_bias=mask),
            grad_THK.unsqueeze(0),
        )
        dk, dv = (x.squeeze(0) for x in (grads.dk, grads.dv))
        if each > 1:
            dk, dv = (x.unflatten(1, (-1, each)).float().sum(2).to(x.dtype) for x in (dk, dv))
        return grads.dq.squeeze(0), dk, dv


def mask_of(cu_seqlens: Tensor, max_seqlen: int, rows: int, causal: bool) -> Any:
    """xformers' mask of packed samples without their lengths on the host, which only its checks and dense masks read."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, BlockDiagonalMask, _SeqLenInfo

    lengths = _SeqLenInfo(seqstart=cu_seqlens, max_seqlen=max_seqlen, min_seqlen=0, seqstart_py=[0, rows])
    return (BlockDiagonalCausalMask if causal else BlockDiagonalMask)(q_seqinfo=lengths, k_seqinfo=lengths)


def operators() -> Any:
    """(forward, backward) of the newest FlashAttention that this xformers has here."""
    from xformers.ops import fmha

    newest = fmha.flash3 if fmha.flash3.FwOp.is_available() else fmha.flash
    return newest.FwOp, newest.BwOp


xformers = define("xformers", Xformers())
