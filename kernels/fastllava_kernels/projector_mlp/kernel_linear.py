"""Triton kernels of projector_mlp: Linear with the GELU in its epilogue, Linear, and the backward through a GELU."""

from fastllava_kernels._device.linear import LinearKernels

LINEAR = LinearKernels("projector_mlp", ("linear_gelu", "linear_gelu_only", "linear", "gelu_backward"))
KERNELS = LINEAR.kernels

linear_gelu, linear, gelu_backward = LINEAR.linear_gelu, LINEAR.linear, LINEAR.gelu_backward
