"""Reference of rope: rotary embedding in the half-split form of Llama (Su et al. 2021, arXiv 2104.09864)."""

import torch
from torch import Tensor

from fastllava_kernels.contract import Contract, fits
from fastllava_kernels.room import Implementation


def rope(q_THK: Tensor, k_TGK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries [T, H, K] and keys [T, G, K], in their dtype: `x * cos + rotate_half(x) * sin`; cos and sin per row."""
    cos_T1K, sin_T1K = cos_TK.unsqueeze(1), sin_TK.unsqueeze(1)
    return _rotate(q_THK, cos_T1K, sin_T1K), _rotate(k_TGK, cos_T1K, sin_T1K)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def check(q_THK: Tensor, k_TGK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> None:
    """Raises ValueError for sizes that do not fit, and for an odd head width K, whose columns make no pairs."""
    given = q_THK, k_TGK, cos_TK, sin_TK
    fits(q_THK.ndim == k_TGK.ndim == 3, "rope", "q is [T, H, K], k [T, G, K], cos and sin [T, K]", *given)
    rows, _, width = q_THK.shape
    good = (k_TGK.shape[0], k_TGK.shape[2]) == cos_TK.shape == sin_TK.shape == (rows, width)
    fits(good, "rope", "q is [T, H, K], k [T, G, K], cos and sin [T, K]", *given)
    fits(width % 2 == 0, "rope", f"the width of a head must be even, and is {width}", *given)


CONTRACT = Contract(check, no_gradient=("cos_TK", "sin_TK"))
IMPLEMENTATION = Implementation(rope)
