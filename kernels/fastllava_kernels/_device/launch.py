"""What every Triton launch needs to know: whether it is interpreted, whether it can run, and on which device."""

import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs the kernels on CPU tensors: for tests in fp32 and fp16 (its bf16 is wrong), never for training."""

OLDEST = (8, 0)
"""Compute capability from which the kernels are tested: A100's."""


def needs_gpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """The `unsupported` of a Triton kernel: why it cannot run on `device`, or None."""
    if device.type != "cuda":
        return "it is a Triton kernel and needs a CUDA GPU"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"it needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it computes in bf16, fp16 or fp32, not {str(dtype).removeprefix('torch.')}"
    return None


def takes(tensor: Tensor) -> bool:
    """Whether the package's own kernels run on this tensor: on a GPU, and where Triton interprets one in a dtype that it can."""
    return tensor.is_cuda or (INTERPRETED and tensor.dtype in (torch.float32, torch.float16))


def kernels_or(eager: ModuleType, kernels: str) -> Callable[[Tensor], ModuleType]:
    """Return what gives the module that computes where a tensor lies: the one named `kernels` where kernels take it, else `eager`.

    The kernels are imported at the first launch: a machine without Triton can still train with the other implementations.
    """
    return lambda tensor: importlib.import_module(kernels) if takes(tensor) else eager


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's GPU the current one: Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def inner_contiguous(x: Tensor) -> Tensor:
    """Return x, copied if neighbours in a row are no neighbours in memory; rows may lie at any distance."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def cdiv(size: int, block: int) -> int:
    """Return how many blocks hold `size`: on the host what triton.cdiv is in a kernel, which takes 5 us outside of one."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """Return the least power of 2 that holds `size`, 1 at least."""
    return 1 << max(0, size - 1).bit_length()
