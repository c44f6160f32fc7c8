"""Reference of rope: rotary embedding in the half-split form of Llama (Su et al. 2021, arXiv 2104.09864)."""

import torch
from torch import Tensor


def rope(q_THK: Tensor, k_TGK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries [T, H, K] and keys [T, G, K], in their dtype: `x * cos + rotate_half(x) * sin`; cos and sin per row."""
    cos_T1K, sin_T1K = cos_TK.unsqueeze(1), sin_TK.unsqueeze(1)
    return _rotate(q_THK, cos_T1K, sin_T1K), _rotate(k_TGK, cos_T1K, sin_T1K)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
