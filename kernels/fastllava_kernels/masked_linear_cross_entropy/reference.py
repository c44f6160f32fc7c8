"""Reference of masked_linear_cross_entropy: gather, lm_head, fp32 cross-entropy, weighted sum."""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, supervised_rows: Tensor, targets_M: Tensor, weights_M: Tensor
) -> Tensor:
    """fp32 scalar: `sum_i weights[i] * CE(hidden[supervised_rows[i]] @ weight.T, targets[i])`, logits in fp32.

    hidden: [T, D] after the final norm; weight: [V, D] of the lm_head, in any dtype, rounded to hidden's for the product;
    supervised_rows: int32 [M], each row once; targets: int64 [M]; weights: fp32 [M]. M = 0 gives 0 and zero gradients.
    Not materialised: logits of rows that are not supervised.
    """
    logits_MV = F.linear(hidden_TD.index_select(0, supervised_rows), weight_VD.to(hidden_TD.dtype))
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    return (F.cross_entropy(logits_MV, targets_M, reduction="none") * weights_M).sum()
