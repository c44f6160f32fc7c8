"""Implementation `triton` of splice: two kernels forward, and none that adds a float in two orders."""

from fastllava_kernels._device.launch import kernels_or, needs_gpu
from fastllava_kernels.room import Implementation

from . import eager
from .autograd import define

IMPLEMENTATION = Implementation(define("triton", kernels_or(eager, f"{__package__}.kernel_rows")), needs_gpu, interpretable=True)
