"""The two products of a frozen linear layer whose weight is NF4: the weight is dequantised a block at a time, and the library multiplies.

A product within whose tiles weights are dequantised would read 2 bytes a weight less, and do the same work for each block of rows again:
at thousands of rows the library's product of a dequantised block is the faster one. Shape letters: T rows, D inputs, F outputs.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllava_kernels.nf4 import BLOCK, Nf4, scales, unpacked

AT_ONCE = 2**24
"""Weights of a dequantised block, about: 32 MB in bf16, of which much stays in an H100's L2 until the product reads it."""

Part = Callable[[Nf4, slice, slice, torch.dtype], Tensor]
"""Dequantises rows and columns of a weight: contiguous, in a dtype. Columns are whole blocks, or all of them."""


def forward(part: Part, x_TD: Tensor, weight: Nf4, bias_F: Tensor | None) -> Tensor:
    """Compute `x @ dequantised.T + bias`, [T, F] in x's dtype; the bias may have any."""
    outputs, inputs = sizes(weight)
    bias = None if bias_F is None else bias_F.to(x_TD.dtype)
    out_TF = x_TD.new_empty(x_TD.shape[0], outputs)
    for rows in pieces(outputs, inputs, BLOCK):
        dequantised = part(weight, rows, slice(0, inputs), x_TD.dtype)
        into = out_TF[:, rows]
        if bias is None:
            torch.mm(x_TD, dequantised.t(), out=into)
        else:
            torch.addmm(bias[rows], x_TD, dequantised.t(), out=into)
    return out_TF


def input_gradient(part: Part, d_out_TF: Tensor, weight: Nf4, into: Tensor | None = None) -> Tensor:
    """Compute `d_out @ dequantised`, [T, D] in its dtype; added to `into`, and there, where that is given."""
    outputs, inputs = sizes(weight)
    d_x_TD = d_out_TF.new_empty(d_out_TF.shape[0], inputs) if into is None else into
    # Columns, so that each sum is rounded once.
    for columns in pieces(inputs, outputs, BLOCK) if inputs % BLOCK == 0 else [slice(0, inputs)]:
        dequantised, place = part(weight, slice(0, outputs), columns, d_out_TF.dtype), d_x_TD[:, columns]
        if into is None:
            torch.mm(d_out_TF, dequantised, out=place)
        else:
            torch.addmm(place, d_out_TF, dequantised, out=place)
    return d_x_TD


def product(part: Part, x_TD: Tensor, weight: Tensor | Nf4, bias_F: Tensor | None) -> Tensor:
    """Compute `x @ weight.T + bias`, [T, F] in x's dtype, of a weight that is quantised or not."""
    if isinstance(weight, Nf4):
        return forward(part, x_TD, weight, bias_F)
    return F.linear(x_TD, weight.to(x_TD.dtype), None if bias_F is None else bias_F.to(x_TD.dtype))


def added_gradient(part: Part, d_out_TF: Tensor, weight: Tensor | Nf4, into: Tensor | None) -> Tensor:
    """Compute `d_out @ weight`, [T, D], of a weight that is quantised or not; added to `into` within the product."""
    if isinstance(weight, Nf4):
        return input_gradient(part, d_out_TF, weight, into)
    weight = weight.to(d_out_TF.dtype)
    return d_out_TF @ weight if into is None else torch.addmm(into, d_out_TF, weight, out=into)


def sizes(weight: Nf4) -> tuple[int, int]:
    """Return (outputs F, inputs D)."""
    return weight.codes.shape[0], 2 * weight.codes.shape[1]


def pieces(count: int, width: int, multiple: int) -> Iterator[slice]:
    """Cut `count` rows of `width` into pieces of nearly equal length, AT_ONCE weights or fewer, in multiples of `multiple` rows."""
    most = max(multiple, AT_ONCE // max(width, 1) // multiple * multiple)
    even = -(-count // max(1, -(-count // most)))
    size = max(multiple, -(-even // multiple) * multiple)
    yield from (slice(start, min(start + size, count)) for start in range(0, count, size))


def workspace_bytes(codes: Tensor, dtype: torch.dtype) -> int:
    """Return what either product allocates at once, beside its result: the largest dequantised block."""
    outputs, inputs = codes.shape[0], 2 * codes.shape[1]
    rows = max((piece.stop - piece.start for piece in pieces(outputs, inputs, BLOCK)), default=0) * inputs
    columns = max((piece.stop - piece.start for piece in pieces(inputs, outputs, BLOCK)), default=0) * outputs
    return max(rows, columns if inputs % BLOCK == 0 else outputs * inputs) * dtype.itemsize


def plain_part(weight: Nf4, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
    """Dequantise rows and columns of a weight in plain PyTorch: fp32 products, rounded once."""
    outputs, inputs = sizes(weight)
    if inputs % BLOCK:
        first, last = rows.start * inputs, rows.stop * inputs
        scale = scales(weight)[first // BLOCK : -(-last // BLOCK)].repeat_interleave(BLOCK)[first % BLOCK :][: last - first]
        return unpacked(weight.codes[rows].reshape(-1)).mul_(scale).view(-1, inputs).to(dtype)
    blocks = slice(columns.start // BLOCK, columns.stop // BLOCK)
    scale = scales(weight).view(outputs, -1)[rows, blocks]
    values = unpacked(weight.codes[rows, columns.start // 2 : columns.stop // 2].reshape(-1))
    return values.view(*scale.shape, BLOCK).mul_(scale.unsqueeze(-1)).view(len(scale), -1).to(dtype)
