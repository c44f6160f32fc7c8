"""By hand: the bytes that the decoder's layers keep between forward and backward, by what is computed again (`train.recompute`).

Of the ops that a GPU takes by itself: norms that keep their input, rope that keeps nothing but its tables, swiglu that
keeps gate and up, FlashAttention. Other implementations of a room keep more. The table is in `fastllava.model.recompute`.
"""

import torch

from fastllava.config import Recompute
from fastllava.model.llama import LlamaConfig

STATISTICS = 4
"""Bytes of a fp32 statistic: a head's log of the sum of exponentials of a row."""


def activation_bytes(
    llama: LlamaConfig, rows: int, recompute: Recompute, dtype: torch.dtype, frozen: bool, supervised: int | None = None
) -> int:
    """What all layers keep of a micro-batch of `rows` packed rows, from its forward to its backward.

    `frozen`: the decoder does not train, so no input of a linear is kept. `supervised`: rows for which the last layer is computed
    (`train.last_layer=supervised`), None for all. Rope's tables and the final norm's input count, the norm's result is lm_head's.
    """
    last = rows if supervised is None else supervised
    inner = (llama.num_hidden_layers - 1) * _layer(llama, rows, rows, recompute, dtype, frozen)
    tables = 2 * rows * llama.head_dim * dtype.itemsize
    final = last * llama.hidden_size * dtype.itemsize
    gathered = 0
    if supervised is not None and recompute == "none" and not frozen:
        # Inputs of q_proj and o_proj, beside the whole ones that k_proj, v_proj and attention keep.
        gathered = last * (llama.hidden_size + _widths(llama)[0]) * dtype.itemsize
    return inner + _layer(llama, rows, last, recompute, dtype, frozen) + gathered + tables + final


def recomputed_bytes(llama: LlamaConfig, rows: int, recompute: Recompute, dtype: torch.dtype, frozen: bool) -> int:
    """What backward holds beside that while it goes through one layer, all that `none` would have kept of it."""
    return _layer(llama, rows, rows, "none", dtype, frozen) - _layer(llama, rows, rows, recompute, dtype, frozen)


def weight_copy_bytes(llama: LlamaConfig, recompute: Recompute, dtype: torch.dtype) -> int:
    """The copies in `dtype` of a trained decoder's fp32 weights that are held at once; none of a frozen one, or of a sharded one's layers.

    Every layer's are kept for backward with recompute none; else they are made again, a layer at a time.
    """
    if dtype == torch.float32:
        return 0
    queries, keys = _widths(llama)
    layer = llama.hidden_size * (2 * queries + 2 * keys + 3 * llama.intermediate_size) * dtype.itemsize
    return layer * (llama.num_hidden_layers if recompute == "none" else 1)


def _widths(llama: LlamaConfig) -> tuple[int, int]:
    """The width of all query heads together, and that of all key heads."""
    return llama.num_attention_heads * llama.head_dim, llama.num_key_value_heads * llama.head_dim


def _layer(llama: LlamaConfig, rows: int, wanted: int, recompute: Recompute, dtype: torch.dtype, frozen: bool) -> int:
    """The bytes that one layer keeps of `rows` rows when it computes the result for `wanted` of them."""
    width, inner = llama.hidden_size, llama.intermediate_size
    queries, keys = _widths(llama)
    if recompute == "full":
        return rows * width * dtype.itemsize
    # x, k, v and attention; with the queries, laid out on all rows for attention, or as q_proj gave them.
    values = rows * (width + 2 * keys + queries) + (rows if recompute == "none" else wanted) * queries
    # o_proj's, with or without x; gate and up.
    values += wanted * (width + (0 if recompute == "selective" else 2 * inner))
    statistics = rows * llama.num_attention_heads
    if recompute == "none":
        values += 0 if frozen else rows * width + wanted * (width + inner)
    return values * dtype.itemsize + statistics * STATISTICS
