"""Attention by FlexAttention (Dong et al. 2024, arXiv 2412.05496) with block lists made from the samples' bounds.

create_block_mask would evaluate all T x T pairs; here [blocks, blocks] comparisons on the device give the same lists,
without a host sync, once for a cu_seqlens tensor. Traced into whatever graph is being compiled, else compiled by itself.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

BLOCK = 128
"""Rows of a block, FlexAttention's default."""


def flex(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
    """`attention`, [T, H, K] in q's dtype."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THK, k_TGK, v_TGK))
    grouped = q_THK.shape[1] != k_TGK.shape[1]
    if q_THK.shape[0] == 0:
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    elif torch.compiler.is_compiling():
        out = flex_attention(q, k, v, block_mask=block_mask(cu_seqlens, q_THK.shape[0], causal, BLOCK), enable_gqa=grouped)
    else:
        out = _compiled()(q, k, v, block_mask=_remembered(cu_seqlens, q_THK.shape[0], causal), enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


def block_mask(cu_seqlens: Tensor, rows: int, causal: bool, block: int) -> BlockMask:
    """Which blocks of rows see which: for each block of queries those of keys that it sees in part and those it sees whole."""
    device = cu_seqlens.device
    row = torch.arange(rows, dtype=torch.int32, device=device)
    # An empty sample starts where the next one does; the last of equal starts is the sample with rows.
    # Held within the samples, also where cu_seqlens does not rise.
    sample = (torch.searchsorted(cu_seqlens, row, right=True) - 1).clamp(0, cu_seqlens.shape[0] - 2)
    start, end = cu_seqlens[sample], cu_seqlens[sample + 1]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        last = query + 1 if causal else end[query]
        return (start[query] <= key) & (key < last)

    first = torch.arange(0, rows, block, dtype=torch.int32, device=device)
    after = first + block
    last = (after - 1).clamp(max=rows - 1)
    low, high = start[first], (last + 1 if causal else end[last])
    some = (first < high[:, None]) & (after > low[:, None])
    # Seen whole: by the block's first row and by its last one.
    whole = (start[last][:, None] <= first) & (after <= (first + 1 if causal else end[first])[:, None]) & (after <= rows)[:, None]
    part_count, part = _lists(some & ~whole)
    whole_count, whole_blocks = _lists(whole)
    return BlockMask.from_kv_blocks(part_count, part, whole_count, whole_blocks, BLOCK_SIZE=block, mask_mod=sees, seq_lengths=(rows, rows))


def _lists(seen: Tensor) -> tuple[Tensor, Tensor]:
    """[1, 1, blocks] how many are seen, [1, 1, blocks, blocks] their numbers first, in order."""
    order = seen.int().argsort(dim=-1, descending=True, stable=True)
    return seen.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


_masks = WeakTensorKeyDictionary()


def _remembered(cu_seqlens: Tensor, rows: int, causal: bool) -> BlockMask:
    """The mask of this very tensor, which all layers of a micro-batch share; gone with the tensor."""
    key = rows, causal, cu_seqlens._version
    made = _masks.get(cu_seqlens)
    if made is None or made[0] != key:
        made = key, block_mask(cu_seqlens, rows, causal, BLOCK)
        _masks[cu_seqlens] = made
    return made[1]


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, fullgraph=True, dynamic=True)
