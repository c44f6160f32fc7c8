"""Reference of masked_linear_cross_entropy: gather, lm_head, fp32 cross-entropy, weighted sum."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllava_kernels.contract import Contract, fits, whole
from fastllava_kernels.indices import inside, or_else
from fastllava_kernels.room import Implementation


def masked_linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, supervised_rows: Tensor, targets_M: Tensor, weights_M: Tensor
) -> Tensor:
    """Compute `sum_i weights[i] * CE(hidden[supervised_rows[i]] @ weight.T, targets[i])` with logits in fp32: an fp32 scalar.

    hidden: [T, D] after the final norm; weight: [V, D] of the lm_head, in any dtype, rounded to hidden's for the product;
    supervised_rows: int32 [M], each row once; targets: int64 [M]; weights: fp32 [M], no gradient. M = 0 gives 0 and zero gradients.
    Not materialised: logits of rows that are not supervised.

    Rows without a label are left out of supervised_rows: -100 is none, nor is any other target outside the vocabulary. With
    such a target, or with a supervised row that is no row of hidden, the loss is NaN in every implementation and on every device.
    """
    rows, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
    wanted_MD = hidden_TD.index_select(0, or_else(supervised_rows, rows, 0))
    wanted_MD = wanted_MD.masked_fill(~inside(supervised_rows, rows).unsqueeze(1), torch.nan)
    logits_MV = F.linear(wanted_MD, weight_VD.to(hidden_TD.dtype))
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    losses_M = F.cross_entropy(logits_MV, or_else(targets_M, vocabulary, 0), reduction="none")
    return (losses_M * weights_M.where(inside(targets_M, vocabulary), torch.nan)).sum()


def check(hidden_TD: Tensor, weight_VD: Tensor, supervised_rows: Tensor, targets_M: Tensor, weights_M: Tensor) -> None:
    """Raises ValueError for sizes that do not fit."""
    room, given = "masked_linear_cross_entropy", (hidden_TD, weight_VD)
    fits(hidden_TD.ndim == weight_VD.ndim == 2, room, "hidden is [T, D] and weight [V, D]", *given)
    fits(hidden_TD.shape[1] == weight_VD.shape[1] and weight_VD.shape[0] > 0, room, "hidden is [T, D] and weight [V, D]", *given)
    given = supervised_rows, targets_M, weights_M
    what = "supervised_rows, targets and weights are [M], the first two whole numbers"
    fits(supervised_rows.shape == targets_M.shape == weights_M.shape and weights_M.ndim == 1, room, what, *given)
    fits(whole(supervised_rows, targets_M) and weights_M.is_floating_point(), room, what, *given)
    fits(hidden_TD.shape[0] > 0 or not supervised_rows.shape[0], room, "there is no row to supervise", hidden_TD, supervised_rows)


CONTRACT = Contract(check, no_gradient=("weights_M",), one_dtype=False)
IMPLEMENTATION = Implementation(masked_linear_cross_entropy)
