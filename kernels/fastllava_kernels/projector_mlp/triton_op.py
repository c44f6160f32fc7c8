"""Implementation `triton` of projector_mlp: each Linear a kernel with its GELU in the epilogue, forward and backward."""

from fastllava_kernels._device import plain
from fastllava_kernels._device.launch import kernels_or, needs_gpu
from fastllava_kernels.room import Implementation

from .autograd import define

IMPLEMENTATION = Implementation(define("triton", kernels_or(plain, f"{__package__}.kernel_linear")), needs_gpu, interpretable=True)
