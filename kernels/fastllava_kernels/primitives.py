"""The steps that rooms with a projector or a splice are made of: as Triton kernels, and the same in plain PyTorch for any device."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastllava_kernels import plain
from fastllava_kernels.launch import INTERPRETED


@dataclass(frozen=True)
class Primitives:
    """The steps; what each does is said in `matmul`, `rows` and `plain`."""

    linear_gelu: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    linear: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None]
    gelu_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    scatter_rows: Callable[[Tensor, Tensor, Tensor], None]
    embed_rows: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    gather_rows: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    embedding_gradient: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    bin: int
    """Rows that the buffer must have beyond T for what is cut."""


TORCH = Primitives(
    plain.linear_gelu,
    plain.linear,
    plain.gelu_backward,
    plain.scatter_rows,
    plain.embed_rows,
    plain.gather_rows,
    plain.embedding_gradient,
    bin=1,
)


@cache
def _triton() -> Primitives:
    # Here, as a machine without Triton can still train with the other implementations.
    from fastllava_kernels import matmul, rows

    return Primitives(
        matmul.linear_gelu,
        matmul.linear,
        matmul.gelu_backward,
        rows.scatter_rows,
        rows.embed_rows,
        rows.gather_rows,
        rows.embedding_gradient,
        bin=0,
    )


def torch_primitives(tensor: Tensor) -> Primitives:
    """Those of an implementation `torch`."""
    return TORCH


def triton_primitives(tensor: Tensor) -> Primitives:
    """Those of an implementation `triton`: kernels on a GPU and in the interpreter's dtypes, plain PyTorch on other CPU tensors."""
    interpreted = INTERPRETED and tensor.dtype in (torch.float32, torch.float16)
    return _triton() if tensor.is_cuda or interpreted else TORCH
