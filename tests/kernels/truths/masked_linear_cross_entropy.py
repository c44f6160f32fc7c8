"""Room masked_linear_cross_entropy: the op once more in fp64 without the op it judges, its cases, and its nearest wrong one."""

from collections.abc import Sequence

import torch
from judging import Args, draw
from torch import Tensor

from fastllava_kernels import rooms
from fastllava_kernels.room import REFERENCE


def truth(hidden: Tensor, weight: Tensor, supervised_rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    loss = hidden.sum() * 0
    for row, target, share in zip(supervised_rows.tolist(), targets.tolist(), weights.tolist(), strict=True):
        logits = weight @ hidden[row]
        loss = loss + share * (logits.exp().sum().log() - logits[target])
    return loss


def loss_inputs(rows: int, supervised: Sequence[int], vocabulary: int = 11) -> Args:
    count = len(supervised)
    targets = torch.tensor([(5 * row + 1) % vocabulary for row in supervised], dtype=torch.int64)
    weights = torch.linspace(0.0, 0.7, count) if count else torch.zeros(0)
    return draw(rows, 6), draw(vocabulary, 6, seed=1), torch.tensor(list(supervised), dtype=torch.int32), targets, weights


CASES: dict[str, Args] = {
    "usual": loss_inputs(9, [1, 2, 5, 8]),
    "every row": loss_inputs(4, range(4)),
    "one token": loss_inputs(1, [0]),
    "none supervised": loss_inputs(5, []),
    "no row": loss_inputs(0, []),
    "rows in any order": loss_inputs(9, [8, 2, 5, 1]),
    "V no multiple of a block": loss_inputs(5, [0, 3], 101),
    "V = 1": loss_inputs(3, [1], 1),
    "V = 32003": loss_inputs(3, [0, 2], 32003),
    "V = 32064": loss_inputs(3, [1], 32064),
    "V too long for a block": loss_inputs(2, [1], 32769),
}


def wrong(hidden: Tensor, weight: Tensor, supervised_rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The weights' sum divided out once more."""
    reference = rooms()["masked_linear_cross_entropy"].implementations[REFERENCE].function
    return reference(hidden, weight, supervised_rows, targets, weights) / weights.sum()


WRONG_CASE = "every row"
