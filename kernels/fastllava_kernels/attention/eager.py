"""Attention written out in PyTorch, sample after sample, on any device: what the ops compute where a library cannot.

It reads the samples' lengths on the host and holds one sample's scores at a time. Shape letters: n rows of a sample,
G key/value heads, R query heads a key/value head.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .lengths import lengths_of


def forward(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Compute (attention [T, H, K] in q's dtype, log of the sum of exponentials [H, T] in fp32)."""
    out_THK = torch.empty_like(q_THK, memory_format=torch.contiguous_format)
    lse_HT = q_THK.new_empty((q_THK.shape[1], q_THK.shape[0]), dtype=_wide(q_THK))
    for rows in _samples(cu_seqlens, len(q_THK)):
        q_nGRK, k_nGK, v_nGK = _heads(q_THK[rows], k_TGK), _wider(k_TGK[rows]), _wider(v_TGK[rows])
        scores = _scores(q_nGRK, k_nGK, causal)
        out_THK[rows] = torch.einsum("grij,jgk->igrk", scores.softmax(-1), v_nGK).flatten(1, 2).to(q_THK.dtype)
        lse_HT[:, rows] = scores.logsumexp(-1).flatten(0, 1)
    return out_THK, lse_HT


def backward(
    grad_THK: Tensor, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v in their dtypes; the shares are computed again, in fp32."""
    dq_THK, dk_TGK, dv_TGK = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THK, k_TGK, v_TGK))
    for rows in _samples(cu_seqlens, len(q_THK)):
        q_nGRK, k_nGK, v_nGK = _heads(q_THK[rows], k_TGK), _wider(k_TGK[rows]), _wider(v_TGK[rows])
        grad_nGRK = _heads(grad_THK[rows], k_TGK)
        share = _scores(q_nGRK, k_nGK, causal).softmax(-1)
        dshare = torch.einsum("igrk,jgk->grij", grad_nGRK, v_nGK)
        dscores = share * (dshare - (share * dshare).sum(-1, keepdim=True)) * q_THK.shape[2] ** -0.5
        dq_THK[rows] = torch.einsum("grij,jgk->igrk", dscores, k_nGK).flatten(1, 2).to(q_THK.dtype)
        dk_TGK[rows] = torch.einsum("grij,igrk->jgk", dscores, q_nGRK).to(k_TGK.dtype)
        dv_TGK[rows] = torch.einsum("grij,igrk->jgk", share, grad_nGRK).to(v_TGK.dtype)
    return dq_THK, dk_TGK, dv_TGK


def _samples(cu_seqlens: Tensor, rows: int) -> Iterator[slice]:
    bounds = [0, *accumulate(lengths_of(cu_seqlens, rows) if rows else [])]
    return (slice(start, end) for start, end in pairwise(bounds) if start < end)


def _scores(q_nGRK: Tensor, k_nGK: Tensor, causal: bool) -> Tensor:
    scores = torch.einsum("igrk,jgk->grij", q_nGRK, k_nGK) * q_nGRK.shape[3] ** -0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores


def _heads(x_nHK: Tensor, k_TGK: Tensor) -> Tensor:
    return _wider(x_nHK).unflatten(1, (k_TGK.shape[1], -1))


def _wider(x: Tensor) -> Tensor:
    return x.to(_wide(x))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
