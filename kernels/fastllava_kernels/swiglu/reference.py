"""Reference of swiglu (Shazeer 2020, arXiv 2002.05202)."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """[T, F] in the inputs' dtype: `silu(gate) * up`."""
    return F.silu(gate_TF) * up_TF
