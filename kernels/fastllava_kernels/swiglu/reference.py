"""Reference of swiglu (Shazeer 2020, arXiv 2002.05202)."""

import torch.nn.functional as F
from torch import Tensor

from fastllava_kernels.contract import Contract, fits
from fastllava_kernels.room import Implementation


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Compute `silu(gate) * up`, [T, F] in the inputs' dtype."""
    return F.silu(gate_TF) * up_TF


def check(gate_TF: Tensor, up_TF: Tensor) -> None:
    """Raises ValueError for sizes that do not fit."""
    fits(gate_TF.shape == up_TF.shape, "swiglu", "gate and up are both [T, F]", gate_TF, up_TF)


CONTRACT = Contract(check)
IMPLEMENTATION = Implementation(swiglu)
