"""Room attention: the op once more in fp64 without the op it judges, its cases, and its nearest wrong one."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from judging import Args, draw
from torch import Tensor

from fastllava_kernels import rooms
from fastllava_kernels.room import REFERENCE


def truth(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
    """One row and one head after another."""
    group = q.shape[1] // k.shape[1]
    bounds = cu_seqlens.tolist()
    out = []
    for start, end in pairwise(bounds):
        for row in range(start, end):
            seen = slice(start, row + 1 if causal else end)
            for head in range(q.shape[1]):
                scores = (k[seen, head // group] * q[row, head]).sum(-1) / math.sqrt(q.shape[2])
                share = torch.exp(scores - scores.max().detach())
                out.append((share / share.sum()) @ v[seen, head // group])
    return torch.stack(out).view(q.shape) if out else q * 1


def attention_inputs(lengths: Sequence[int], heads: int, key_heads: int, causal: bool) -> Args:
    rows = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    query, key, value = (draw(rows, n, 8, seed=seed) for seed, n in enumerate((heads, key_heads, key_heads)))
    return query, key, value, cu_seqlens, max(lengths, default=0), causal


CASES: dict[str, Args] = {
    "ragged": attention_inputs([1, 5, 3], 4, 4, True),
    "ragged, not causal": attention_inputs([1, 5, 3], 4, 4, False),
    "equal lengths": attention_inputs([4, 4], 4, 4, True),
    "equal lengths, not causal": attention_inputs([4, 4], 4, 4, False),
    "grouped": attention_inputs([2, 6], 4, 2, True),
    "grouped, equal lengths": attention_inputs([3, 3], 4, 1, True),
    "one row": attention_inputs([1], 2, 2, True),
    "empty samples between": attention_inputs([0, 3, 0, 0, 2, 0], 4, 2, True),
    "empty samples between, not causal": attention_inputs([0, 3, 0, 0, 2, 0], 4, 2, False),
    "empty samples only": attention_inputs([0, 0], 2, 2, True),
    "no sample": attention_inputs([], 2, 2, True),
}


def wrong(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
    """Samples see each other."""
    whole = torch.tensor([0, len(q)], dtype=torch.int32)
    return rooms()["attention"].implementations[REFERENCE].function(q, k, v, whole, len(q), causal)


WRONG_CASE = "ragged"
