"""Implementation `compiled` of rms_norm: torch.compile of the reference."""

from fastllava_kernels._device.compiled import compiled_implementation

from .reference import rms_norm

IMPLEMENTATION = compiled_implementation(rms_norm)
