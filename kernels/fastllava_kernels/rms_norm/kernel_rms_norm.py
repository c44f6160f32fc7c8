"""Triton kernels of rms_norm."""

from fastllava_kernels._device.rms import RmsKernels

RMS = RmsKernels("rms_norm", add=False)
KERNELS = RMS.kernels
