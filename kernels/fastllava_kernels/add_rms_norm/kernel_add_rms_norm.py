"""Triton kernels of add_rms_norm."""

from fastllava_kernels._device.rms import RmsKernels

RMS = RmsKernels("add_rms_norm", add=True)
KERNELS = RMS.kernels
