"""Implementation `triton` of masked_linear_cross_entropy: products by the library on compacted rows in chunks, kernels between them."""

from fastllava_kernels._device.launch import kernels_or, needs_gpu
from fastllava_kernels.room import Implementation

from . import eager
from .autograd import define

IMPLEMENTATION = Implementation(define("triton", kernels_or(eager, f"{__package__}.kernel_loss_rows")), needs_gpu, interpretable=True)
