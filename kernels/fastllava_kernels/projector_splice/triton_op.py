"""Implementation `triton` of projector_splice: the projector's kernels, the last of which writes each patch straight to its place.

Not materialised: projected patches apart from the result, text embeddings apart from it, padding.
"""

from fastllava_kernels._device.launch import kernels_or, needs_gpu
from fastllava_kernels.room import Implementation

from . import eager
from .autograd import define

IMPLEMENTATION = Implementation(define("triton", kernels_or(eager, f"{__package__}.kernel_place")), needs_gpu, interpretable=True)
