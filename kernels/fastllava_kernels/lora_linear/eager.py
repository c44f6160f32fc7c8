"""What the kernels of lora_linear compute, in plain PyTorch on any device: the low-rank products behind a dropout.

T rows, D columns, n layers of rank R. h and its gradient d_h: [T, n, R]; A: those of all layers, one below the other, [n R, D], in the
dtype of x; keys [T] and streams [n] as in the reference; below: the dropout's threshold, more than 0.
"""

import torch
from torch import Tensor

from fastllava_kernels._device import philox
from fastllava_kernels.mm32 import mm32


def shrink(x_TD: Tensor, A: Tensor, keys: Tensor, streams: Tensor, below: int) -> Tensor:
    """Compute h = drop(x) @ A.T of each layer."""
    layers, rank = len(streams), A.shape[0] // len(streams)
    h = x_TD.new_empty(x_TD.shape[0], layers, rank)
    for index in range(layers):
        seen = x_TD.masked_fill(philox.dropped(keys, streams[index], x_TD.shape[1], below), 0.0)
        into = h[:, index]
        torch.addmm(into, seen, A[index * rank : (index + 1) * rank].t(), beta=0, alpha=philox.correction(below), out=into)
    return h


def add_to_input_gradient(d_x_TD: Tensor, d_h: Tensor, A: Tensor, keys: Tensor, streams: Tensor, below: int) -> None:
    """Add to d_x the gradient of x through each layer's h."""
    layers, rank = d_h.shape[1:]
    for index in range(layers):
        part = torch.addmm(d_x_TD, d_h[:, index], A[index * rank : (index + 1) * rank], beta=0, alpha=philox.correction(below))
        d_x_TD += part.masked_fill_(philox.dropped(keys, streams[index], d_x_TD.shape[1], below), 0.0)


def A_gradient(d_h: Tensor, x_TD: Tensor, keys: Tensor, streams: Tensor, below: int) -> Tensor:
    """Compute the gradient of A, [n R, D], as fp32 sums (fp64 of fp64)."""
    layers, rank = d_h.shape[1:]
    gradient = x_TD.new_empty(layers * rank, x_TD.shape[1], dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for index in range(layers):
        seen = x_TD.masked_fill(philox.dropped(keys, streams[index], x_TD.shape[1], below), 0.0)
        mm32(d_h[:, index].t(), seen, out=gradient[index * rank : (index + 1) * rank])
    return gradient.mul_(philox.correction(below))
