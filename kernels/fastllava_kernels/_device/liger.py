"""Liger's Triton kernels behind our ops: when they can run, and on which tensors.

What is used are its functions below autograd, each told to write over nothing that others may read. Its rows are
contiguous, so an op makes contiguous what is not. Hsu et al. 2024, arXiv 2410.10989.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from fastllava_kernels._device import launch

CAST_AS_LLAMA = 0
"""Liger's casting mode "llama", as the number that its backward wants: statistics in fp32, the weight multiplied after rounding."""


@cache
def _installed() -> bool:
    return find_spec("liger_kernel") is not None


def needs_liger(device: torch.device, dtype: torch.dtype) -> str | None:
    """The `unsupported` of an implementation by Liger: why it cannot run on `device`, or None."""
    reason = launch.needs_gpu(device, dtype)
    if reason is None and not _installed():
        return "liger-kernel is not installed: pip install liger-kernel"
    return reason


def takes(tensor: Tensor, interpretable: bool = False) -> bool:
    """Whether Liger's kernel runs on this tensor, not the same in plain PyTorch: on a GPU, and where Triton interprets one that it can."""
    return tensor.is_cuda or (interpretable and launch.takes(tensor) and _installed())
