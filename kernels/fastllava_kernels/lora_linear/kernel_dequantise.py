"""Triton kernels of lora_linear for NF4 weights: rows and columns of one, dequantised."""

from fastllava_kernels._device.dequantise import Dequantise

DEQUANTISE = Dequantise("lora_linear", "rows")
KERNELS = DEQUANTISE.kernels
