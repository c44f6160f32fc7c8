"""Triton kernels of nf4_linear: rows and columns of the weight, dequantised."""

from fastllava_kernels._device.dequantise import Dequantise

DEQUANTISE = Dequantise("nf4_linear", "inner")
KERNELS = DEQUANTISE.kernels
