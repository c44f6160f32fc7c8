"""What the kernels of `linear` and `rows` compute, in plain PyTorch on any device: deterministic and without a sync.

Sizes as there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllava_kernels.indices import inside, or_else
from fastllava_kernels.mm32 import mm32


def linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor) -> Tensor:
    """Compute x @ weight.T + bias, [M, N]; the bias may have any dtype."""
    return F.linear(x_MK, weight_NK, bias_N.to(x_MK.dtype))


def linear_gelu(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Compute (pre, GELU(pre)), both [M, N], with pre = x @ weight.T + bias; pre is empty unless `keep`."""
    pre_MN = linear(x_MK, weight_NK, bias_N)
    return pre_MN if keep else pre_MN.new_empty(0), F.gelu(pre_MN)


def gelu_backward(d_out_MK: Tensor, weight_KN: Tensor, pre_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (d_pre, GELU(pre), column sums of d_pre in fp32 or wider) with d_pre = (d_out @ weight) * GELU'(pre)."""
    d_pre_MN = torch.ops.aten.gelu_backward(d_out_MK @ weight_KN, pre_MN)
    return d_pre_MN, F.gelu(pre_MN), column_sums(d_pre_MN)


def column_sums(x_MN: Tensor) -> Tensor:
    """Sum each column, [N], in fp32 or wider."""
    return x_MN.sum(0, dtype=torch.promote_types(x_MN.dtype, torch.float32))


def weight_gradient(d_out_MN: Tensor, x_MK: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute d_out.T @ x [N, K] in `dtype`, rounded once: an fp32 master weight gets the sums as they are."""
    if dtype == d_out_MN.dtype:
        return d_out_MN.t() @ x_MK
    return mm32(d_out_MN.t(), x_MK).to(dtype)


def gather_rows(source_TD: Tensor, places_P: Tensor, want_sum: bool) -> tuple[Tensor, Tensor]:
    """Gather source[places] [P, D], zeros where that is no row of source, such as T, and its column sums [D], empty unless `want_sum`."""
    rows = source_TD.shape[0]
    if not rows:
        out_PD = source_TD.new_zeros(len(places_P), source_TD.shape[1])
    else:
        out_PD = source_TD.index_select(0, or_else(places_P, rows, 0)).masked_fill_(~inside(places_P, rows)[:, None], 0.0)
    return out_PD, column_sums(out_PD) if want_sum else out_PD.new_empty(0)


def embedding_gradient(d_hidden_TD: Tensor, table_VD: Tensor, ids_T: Tensor, places: Tensor) -> Tensor:
    """Sum for each token, in fp32 or wider, d_hidden over the rows in `places` that hold it: [V, D] in the table's dtype.

    A place outside the rows and a token outside the table count nowhere.
    """
    if not len(ids_T):
        return torch.zeros_like(table_VD)
    safe = or_else(places, len(ids_T), 0)
    rows = d_hidden_TD.index_select(0, safe)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    # -1 is the padding, whose rows are left out.
    ids = torch.where(inside(places, len(ids_T)), or_else(ids_T.index_select(0, safe), len(table_VD), -1), -1)
    # The backward of nn.Embedding sorts; index_add would add with atomics on a GPU.
    return torch.ops.aten.embedding_dense_backward(rows, ids, len(table_VD), -1, False).to(table_VD.dtype)
