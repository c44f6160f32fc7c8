"""Implementation `triton` of nf4_linear: a kernel dequantises a block of the weight at a time, and the library multiplies."""

from torch import Tensor

from fastllava_kernels._device import nf4
from fastllava_kernels._device.launch import needs_gpu, takes
from fastllava_kernels.room import Implementation

from .autograd import define


def dequantiser(tensor: Tensor) -> nf4.Part:
    """Return what dequantises a part of a weight where the tensor lies."""
    if not takes(tensor):
        return nf4.plain_part
    from .kernel_dequantise import DEQUANTISE

    return DEQUANTISE.part


IMPLEMENTATION = Implementation(define("triton", dequantiser), needs_gpu, interpretable=True)
