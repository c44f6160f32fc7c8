"""Reference of nf4_linear: the frozen linear layer of QLoRA (Dettmers et al. 2023, arXiv 2305.14314)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllava_kernels.contract import Contract, fits
from fastllava_kernels.nf4 import BLOCK, NESTED_BLOCK, Nf4, dequantise
from fastllava_kernels.room import Implementation


def nf4_linear(x_TD: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, bias_F: Tensor | None) -> Tensor:
    """Compute `F.linear(x, dequantise(Nf4(codes, absmax, nested_absmax, offset), x.dtype), bias)`, [T, F] in x's dtype.

    x: [T, D]; codes: uint8 [F, D / 2], D even; absmax, nested_absmax, offset: as `fastllava_kernels.nf4.Nf4` has them; bias: [F] in any
    dtype, rounded to x's, or None. x alone gets a gradient. Not materialised by other implementations: the whole dequantised weight;
    nor do they keep x.
    """
    weight = dequantise(Nf4(codes, absmax, nested_absmax, offset), x_TD.dtype)
    return F.linear(x_TD, weight, None if bias_F is None else bias_F.to(x_TD.dtype))


def check(x_TD: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, bias_F: Tensor | None) -> None:
    """Raises ValueError for sizes that do not fit."""
    given = [x_TD, codes, absmax, nested_absmax, offset, *(() if bias_F is None else (bias_F,))]
    fits(codes.ndim == 2 and codes.dtype is torch.uint8, "nf4_linear", "codes are uint8 [F, D / 2]", codes)
    fits(x_TD.ndim == 2 and x_TD.shape[1] == 2 * codes.shape[1], "nf4_linear", "x is [T, D] and codes [F, D / 2]", x_TD, codes)
    blocks = -(-2 * codes.numel() // BLOCK)
    double = absmax.dtype is torch.uint8
    fits(absmax.shape == (blocks,), "nf4_linear", f"absmax has an element for each of {blocks} blocks", absmax)
    nested = -(-blocks // NESTED_BLOCK) if double else 0
    fits(
        nested_absmax.shape == (nested,) and offset.shape == (int(double),),
        "nf4_linear",
        "nested_absmax and offset are there where absmax is uint8, and only there",
        *given[2:5],
    )
    fits(bias_F is None or bias_F.shape == codes.shape[:1], "nf4_linear", "bias is [F] and codes [F, D / 2]", *given[5:], codes)


CONTRACT = Contract(check, no_gradient=("absmax", "nested_absmax", "offset", "bias_F"), one_dtype=False)
IMPLEMENTATION = Implementation(nf4_linear)
