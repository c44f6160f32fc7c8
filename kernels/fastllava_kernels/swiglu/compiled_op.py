"""Implementation `compiled` of swiglu: torch.compile of the reference."""

from fastllava_kernels._device.compiled import compiled_implementation

from .reference import swiglu

IMPLEMENTATION = compiled_implementation(swiglu)
