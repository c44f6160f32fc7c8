"""Implementation `compiled` of add_rms_norm: torch.compile of the reference."""

from fastllava_kernels._device.compiled import compiled_implementation

from .reference import add_rms_norm

IMPLEMENTATION = compiled_implementation(add_rms_norm)
