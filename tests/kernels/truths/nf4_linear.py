"""Room nf4_linear: the op once more in fp64 without the op it judges, its cases, and its nearest wrong one."""

import torch
from judging import Args, Table, draw
from torch import Tensor

from fastllava_kernels.nf4 import CODE, nested_code


def truth(x: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, bias: Tensor | None) -> Tensor:
    return times(x, weights(halves(codes, 4, 0), absmax, nested_absmax, offset), bias)


def halves(codes: Tensor, first: int, second: int) -> list[list[int]]:
    """Both codes of each byte, which lie so many bits from its end, by row."""
    return [[half for byte in row for half in (byte >> first & 15, byte >> second & 15)] for row in codes.tolist()]


def weights(indices: list[list[int]], absmax: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """One weight after another, its scale and its value in fp32."""
    scales = absmax
    if absmax.dtype is torch.uint8:
        values = nested_code(torch.device("cpu"))
        scales = torch.stack([values[index] * nested_absmax[block // 256] + offset[0] for block, index in enumerate(absmax.tolist())])
    flat = [torch.tensor(CODE[index]) * scales[place // 64] for place, index in enumerate(index for row in indices for index in row)]
    return torch.stack(flat).view(len(indices), -1)


def times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x @ weight.to(x.dtype).T
    return out if bias is None else out + bias


def given(rows: int, outputs: int, inputs: int, double: bool = False, bias: bool = False) -> Args:
    draws = torch.Generator().manual_seed(rows + outputs + inputs)
    codes = torch.randint(256, (outputs, inputs // 2), generator=draws, dtype=torch.uint8)
    blocks = -(-outputs * inputs // 64)
    absmax, none = torch.rand(blocks, generator=draws) + 0.5, torch.empty(0)
    scales = absmax, none, none
    if double:
        nested = torch.rand(-(-blocks // 256), generator=draws) / 4 + 0.25
        scales = torch.randint(256, (blocks,), generator=draws, dtype=torch.uint8), nested, torch.tensor([1.0])
    return draw(rows, inputs), codes, *scales, Table(draw(outputs, seed=1)) if bias else None


CASES: dict[str, Args] = {
    "usual": given(7, 6, 128),
    "usual, scales quantised": given(7, 6, 128, double=True),
    "a bias": given(5, 3, 64, bias=True),
    "more scales than one scale of scales is for": given(2, 130, 128, double=True),
    "blocks across rows": given(5, 6, 48, double=True),
    "a block that is not full": given(5, 3, 38, bias=True),
    "one row": given(1, 4, 64),
    "no row": given(0, 4, 64),
}


def wrong(x: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, bias: Tensor | None) -> Tensor:
    """The second code of a byte first."""
    return times(x, weights(halves(codes, 0, 4), absmax, nested_absmax, offset), bias)


WRONG_CASE = "usual"
