"""Reference of attention: PyTorch's scaled_dot_product_attention, one sample after another."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllava_kernels.contract import Contract, fits, whole
from fastllava_kernels.room import Implementation

from .lengths import lengths_of


def attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
    """Compute `softmax(q k^T / sqrt(K)) v` inside each sample, below the diagonal when `causal`: [T, H, K] in q's dtype.

    q: [T, H, K]; k, v: [T, G, K] with G dividing H (grouped-query attention); cu_seqlens: int32 [S+1], the row where
    each sample starts, then T; max_seqlen: rows of the longest sample.

    Raises ValueError when cu_seqlens is no such list. Implementations that do not read it on the host stay within the rows then,
    and what they compute is of no use: whoever makes cu_seqlens on a device adds `indices.nan_unless_bounds` to what follows.
    """
    # Reads cu_seqlens on the host: a reference may wait for the device, an implementation for training may not.
    lengths = lengths_of(cu_seqlens, q_THK.shape[0])
    grouped = q_THK.shape[1] != k_TGK.shape[1]
    if all(length == max_seqlen for length in lengths):
        q, k, v = (x.unflatten(0, (len(lengths), max_seqlen)).transpose(1, 2) for x in (q_THK, k_TGK, v_TGK))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)
    outs = []
    for sample in zip(q_THK.split(lengths), k_TGK.split(lengths), v_TGK.split(lengths), strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in sample)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        outs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outs)


def check(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> None:
    """Raises ValueError for sizes that do not fit."""
    given = q_THK, k_TGK, v_TGK, cu_seqlens
    what = "q is [T, H, K], k and v [T, G, K] with G dividing H, cu_seqlens whole numbers [S+1]"
    fits(q_THK.ndim == k_TGK.ndim == 3 and k_TGK.shape == v_TGK.shape, "attention", what, *given)
    good = q_THK.shape[0] == k_TGK.shape[0] and q_THK.shape[2] == k_TGK.shape[2] and k_TGK.shape[1] > 0
    fits(good and q_THK.shape[1] % k_TGK.shape[1] == 0, "attention", what, *given)
    good = cu_seqlens.ndim == 1 and whole(cu_seqlens) and cu_seqlens.shape[0] > (1 if q_THK.shape[0] else 0)
    fits(good, "attention", what, *given)


CONTRACT = Contract(check)
IMPLEMENTATION = Implementation(attention, untraceable="it reads the samples' lengths on the host")
