"""What the implementations share: the walk over chunks of supervised rows, with the gradients formed on the way.

Shape letters: T packed rows, M supervised rows, N rows of one chunk, D width, V vocabulary.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastllava_kernels.indices import inside, or_else
from fastllava_kernels.mm32 import mm32

CHUNK = 1024
"""Most supervised rows at a time. On an H100 the [1024, 4096] product of the input gradient is 128 tiles of 128 x 256 for its
132 multiprocessors; the chunk's fp32 logits are 131 MB at V = 32000."""


class Result(NamedTuple):
    """What forward gives. The gradients are those for an upstream gradient of 1, times `scale` if any; empty where nobody asked."""

    loss: Tensor
    """The weighted sum, an fp32 scalar."""
    d_rows: Tensor
    """The gradient, fp32 [M, D], of the supervised rows, from logit gradients rounded to hidden's dtype."""
    residual: Tensor
    """What, fp32 [M], that rounding took from the target's logit gradient; times the target's weight row it completes d_rows."""
    d_weight: Tensor
    """The gradient of the weight, fp32 [V, D], or empty when `d_logits` is kept for it."""
    rows: Tensor
    """The supervised rows [M, D], beside `d_logits`."""
    d_logits: Tensor
    """The gradients of the logits, [M, V] in hidden's dtype, rows `padded(V)` elements apart."""
    scale: Tensor
    """The scale, fp32 [1], of gradients in fp16, else empty."""


class LossRows(Protocol):
    """Losses and logit gradients of a chunk."""

    def __call__(
        self, logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, gradient_NV: Tensor, wants_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Return (weighted losses fp32 [N], residual fp32 [N]); write the logits' gradients, which may be where the fp32 logits are."""
        ...


def chunks(rows: int, most: int) -> list[tuple[int, int]]:
    """Return (start, end) of pieces of nearly equal length, at most `most` rows, in multiples of 128 where that fits."""
    if rows == 0:
        return []
    even = -(-rows // -(-rows // most))
    size = min(most, -(-even // 128) * 128)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def padded(vocabulary: int) -> int:
    """Return the elements from one row of logits to the next, a multiple of 64 whatever V is: products over V read whole vectors."""
    return -(-vocabulary // 64) * 64


def keeps_logit_gradients(rows: int, width: int, dtype: torch.dtype) -> bool:
    """Whether the weight's gradient waits for backward: as long as the logit gradients take no more memory than it would.

    Then it is written once. Formed in forward it is written, read, scaled by the upstream gradient and written again: three
    passes over [V, D] in fp32, 1.6 GB at V = 32000, D = 4096.
    """
    return rows * dtype.itemsize <= 4 * width


def is_scaled(dtype: torch.dtype, wants_gradient: bool) -> bool:
    """Whether logit gradients in `dtype` are kept times a scale: 1 / tokens times a probability is too small for fp16."""
    return dtype is torch.float16 and wants_gradient


def headroom(weights_M: Tensor) -> Tensor:
    """Return, fp32 [1], the power of two that brings the largest weight, so the largest logit gradient, to between 2**13 and 2**14.

    fp16 ends at 2**16. Below, probabilities down to 2**-28 of that row keep all digits of fp16, and those down to 2**-38 some.
    """
    if not weights_M.shape[0]:
        return weights_M.new_ones(1)
    _, exponent = torch.frexp(weights_M.abs().amax(0, keepdim=True))
    return torch.ldexp(torch.ones_like(weights_M[:1]), (14 - exponent).clamp(-100, 100))


def workspace_bytes(rows: int, dtype: torch.dtype, weight: Tensor, wants_gradient: bool, wants_weight: bool) -> int:
    """Return what `forward` allocates at once for `rows` supervised rows beside its inputs and what it returns."""
    (vocabulary, width), wide = weight.shape, torch.promote_types(dtype, torch.float32)
    longest = max((end - start for start, end in chunks(rows, CHUNK)), default=0)
    keeps = wants_weight and keeps_logit_gradients(rows, width, dtype)
    in_place = wants_gradient and dtype == wide
    logits = 0 if in_place else longest * padded(vocabulary) * wide.itemsize
    gradients = longest * padded(vocabulary) * dtype.itemsize if wants_gradient and not keeps else 0
    gathered = 0 if keeps else rows * width * dtype.itemsize
    return logits + gradients + gathered + (0 if weight.dtype == dtype else weight.numel() * dtype.itemsize)


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
    """Compute the loss and the gradients that are wanted: work proportional to M, fp32 logits of a chunk at a time, no wait for the device.

    A supervised row that is no row of hidden is NaN.
    """
    count, (vocabulary, width) = supervised_rows.shape[0], weight_VD.shape
    dtype, wide = hidden_TD.dtype, torch.promote_types(hidden_TD.dtype, torch.float32)
    wants = wants_hidden or wants_weight
    keeps = wants_weight and keeps_logit_gradients(count, width, dtype)
    weight, rows = weight_VD.to(dtype), hidden_TD.index_select(0, or_else(supervised_rows, hidden_TD.shape[0], 0))
    rows.masked_fill_(~inside(supervised_rows, hidden_TD.shape[0]).unsqueeze(1), torch.nan)
    weights = weights_M.to(wide)
    scale = headroom(weights) if is_scaled(dtype, wants) else weights.new_empty(0)
    weights = weights * scale if len(scale) else weights
    losses = rows.new_empty(count, dtype=wide)
    d_rows = rows.new_empty((count, width) if wants_hidden else (0, width), dtype=wide)
    residual = rows.new_empty(count if wants_hidden else 0, dtype=wide)
    d_weight = rows.new_empty((vocabulary, width) if wants_weight and not keeps else (0, width), dtype=wide)
    pieces = chunks(count, CHUNK)
    longest = max((end - start for start, end in pieces), default=0)
    d_logits = rows.new_empty(count if keeps else longest if wants else 0, padded(vocabulary))
    # fp32 gradients take the place of the logits.
    in_place = wants and dtype == wide
    buffer = d_logits if in_place else rows.new_empty(longest, padded(vocabulary), dtype=wide)
    for start, end in pieces:
        kept = slice(start, end) if keeps else slice(0, end - start)
        gradient = d_logits[kept, :vocabulary]
        logits = mm32(rows[start:end], weight.t(), out=gradient if in_place else buffer[: end - start, :vocabulary])
        losses[start:end], rest = loss_rows(logits, targets_M[start:end], weights[start:end], gradient, wants)
        if wants_hidden:
            mm32(gradient, weight, out=d_rows[start:end])
            residual[start:end] = rest
        if wants_weight and not keeps:
            mm32(gradient.t(), rows[start:end], out=d_weight, accumulate=start > 0)
    loss = losses.sum() / scale[0] if len(scale) else losses.sum()
    if keeps:
        return Result(loss, d_rows, residual, d_weight, rows, d_logits[:, :vocabulary], scale)
    return Result(loss, d_rows, residual, d_weight, rows.new_empty(0, width), rows.new_empty(0, vocabulary), scale)
