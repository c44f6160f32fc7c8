"""What the implementations share: the walk over chunks of supervised rows, with the gradients formed on the way.

Shape letters: T packed rows, M supervised rows, N rows of one chunk, D width, V vocabulary.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastllava_kernels.mm32 import mm32

CHUNK = 1024
"""Most supervised rows at a time. On an H100 the [1024, 4096] product of the input gradient is 128 tiles of 128 x 256 for its
132 multiprocessors; the chunk's fp32 logits are 131 MB at V = 32000."""


class Result(NamedTuple):
    """What forward gives. The gradients are those for an upstream gradient of 1; empty where nobody asked."""

    loss: Tensor
    """fp32 scalar."""
    d_rows: Tensor
    """fp32 [M, D]: gradient of the supervised rows, from logit gradients rounded to hidden's dtype."""
    residual: Tensor
    """fp32 [M]: what that rounding took from the target's logit gradient; times the target's weight row it completes d_rows."""
    d_weight: Tensor
    """fp32 [V, D]."""


class LossRows(Protocol):
    """Losses and logit gradients of a chunk."""

    def __call__(
        self, logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, dtype: torch.dtype, wants_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(weighted losses fp32 [N], their logit gradients [N, V] in `dtype`, residual fp32 [N]); may overwrite the fp32 logits."""
        ...


def chunks(rows: int, most: int) -> list[tuple[int, int]]:
    """(start, end) of pieces of nearly equal length, at most `most` rows, in multiples of 128 where that fits."""
    if rows == 0:
        return []
    even = -(-rows // -(-rows // most))
    size = min(most, -(-even // 128) * 128)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    supervised_rows: Tensor,
    targets_M: Tensor,
    weights_M: Tensor,
    wants_hidden: bool,
    wants_weight: bool,
    loss_rows: LossRows,
) -> Result:
    """The loss, and the gradients that are wanted; work proportional to M, logits of one chunk at a time, no wait for the device."""
    rows, (vocabulary, width) = supervised_rows.shape[0], weight_VD.shape
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    weight = weight_VD.to(hidden_TD.dtype)
    losses = hidden_TD.new_empty(rows, dtype=wide)
    d_rows = hidden_TD.new_empty((rows, width) if wants_hidden else (0, width), dtype=wide)
    residual = hidden_TD.new_empty(rows if wants_hidden else 0, dtype=wide)
    d_weight = hidden_TD.new_empty((vocabulary, width) if wants_weight else (0, width), dtype=wide)
    pieces = chunks(rows, CHUNK)
    if not pieces:
        d_weight.zero_()
    # Rows start at multiples of 64 elements whatever V is, so that products over V read whole vectors.
    logits_buffer = hidden_TD.new_empty(max((end - start for start, end in pieces), default=0), padded(vocabulary), dtype=wide)
    for start, end in pieces:
        chunk = hidden_TD.index_select(0, supervised_rows[start:end])
        logits = mm32(chunk, weight.t(), out=logits_buffer[: end - start, :vocabulary])
        losses[start:end], d_logits, rest = loss_rows(
            logits, targets_M[start:end], weights_M[start:end], hidden_TD.dtype, wants_hidden or wants_weight
        )
        if wants_hidden:
            mm32(d_logits, weight, out=d_rows[start:end])
            residual[start:end] = rest
        if wants_weight:
            mm32(d_logits.t(), chunk, out=d_weight, accumulate=start > 0)
    return Result(losses.sum(), d_rows, residual, d_weight)


def padded(vocabulary: int) -> int:
    """Elements from one row of logits to the next."""
    return -(-vocabulary // 64) * 64
