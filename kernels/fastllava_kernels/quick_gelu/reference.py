"""Reference of quick_gelu, the sigmoid approximation of GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""

import torch
from torch import Tensor

from fastllava_kernels.contract import Contract
from fastllava_kernels.room import Implementation


def quick_gelu(x: Tensor) -> Tensor:
    """Compute `x * sigmoid(1.702 x)`, elementwise, any shape, in x's dtype."""
    return x * torch.sigmoid(1.702 * x)


def check(x: Tensor) -> None:
    """Accept any shape."""


CONTRACT = Contract(check)
IMPLEMENTATION = Implementation(quick_gelu)
