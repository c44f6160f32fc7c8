"""Implementation `triton` of lora_linear: the low-rank products behind a dropout are kernels, which draw the mask where they use it."""

from torch import Tensor

from fastllava_kernels._device import nf4
from fastllava_kernels._device.launch import kernels_or, needs_gpu, takes
from fastllava_kernels.room import Implementation

from . import eager
from .autograd import define


def _part(tensor: Tensor) -> nf4.Part:
    if not takes(tensor):
        return nf4.plain_part
    from .kernel_dequantise import DEQUANTISE

    return DEQUANTISE.part


_CODE = kernels_or(eager, f"{__package__}.kernel_lora")

IMPLEMENTATION = Implementation(define("triton", _CODE, _part), needs_gpu, interpretable=True)
